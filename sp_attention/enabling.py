"""`enable`: one line that makes a model sequence-parallel, and the handle that undoes it."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from inspect import signature
from itertools import count
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from sp_attention.agreement import first_reason, share_problem
from sp_attention.attention import Backend
from sp_attention.errors import UnsupportedError
from sp_attention.exchange import Peers
from sp_attention.groups import Group, resolve
from sp_attention.loss import sharded_causal_loss
from sp_attention.masks import describe
from sp_attention.region import Hooks, Region
from sp_attention.registry import find
from sp_attention.rehearsal import Findings, batch_of, explore, same, undisturbed
from sp_attention.ulysses import UlyssesAttention

# Our keys in transformers' registries of attention functions. Every enabled model has its own, never used again, so
# that a copy of a model that was disabled since finds nothing instead of another model's attention.
_PREFIX = "sp_attention_"
_KEYS = (f"{_PREFIX}{number}" for number in count())


@dataclass(eq=False)
class Handle:
    """An enabled model. As a context manager it disables the model at the end.

    peers: the ranks that share its sequences, None when this rank is alone and nothing was changed.
    """

    backend: Backend
    peers: Peers | None
    findings: Findings | None
    region: Region | None
    _undo: ExitStack

    def disable(self) -> None:
        """Make the model what it was before `enable`: hooks, attributes, configuration and registries."""
        self._undo.close()

    def report(self) -> str:
        """What each part of each kind of layer does, and why, as text for people."""
        if self.peers is None or self.findings is None or self.region is None:
            return "sp_attention: one rank, so nothing is changed"
        world = dist.get_world_size()
        size, kernel = self.peers.size, self.backend.kernel
        groups = f"{world} processes = {world // size} group{'s' if world > size else ''} x {size} ranks, "
        lines = [f"sp_attention: {'' if world % size else groups}each sequence shared by its group, kernel {kernel!r}"]
        kinds: dict[str, list[str]] = {}
        for layer in self.findings.layers:
            parts = {
                name.removeprefix(f"{layer.name}."): kind
                for name, kind in self.findings.kinds.items()
                if name.startswith(f"{layer.name}.")
            }
            text = "\n".join(f"    {part}: {kind}" for part, kind in sorted(parts.items()))
            kinds.setdefault(text, []).append(layer.name.rsplit(".", 1)[-1])
        for text, which in kinds.items():
            lines += [f"  {self.findings.stack}, layers {', '.join(which)}:", text]
        loss = self.region.sharded_loss
        logits = f"are whole: {loss}" if isinstance(loss, str) else "stay sharded in training with labels, else whole"
        lines.append(f"  logits {logits}")
        if self.region.untrainable is not None:
            lines.append(f"  training is refused: {self.region.untrainable}")
        return "\n".join(lines)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.disable()


def enable(
    model: nn.Module, backend: str = "auto", *, group: Group | None = None, sp_size: int | None = None
) -> Handle:
    """Make a transformers model sequence-parallel: every rank passes the same whole batch, and computes a part of it.

    model: a PreTrainedModel, or a module that wraps one, on its device and in any float dtype, float64 included.
    backend: the kernel, such as "sdpa"; "auto" takes the one of highest priority for the model's device.
    group: the ranks that share a sequence: a ProcessGroup, a DeviceMesh dimension, or an object with
        `get_sequence_parallel_group()`. By default all processes.
    sp_size: instead of `group`, cuts all processes into groups of this many neighbouring ranks; all must call.

    Every rank of the group must call, with the same arguments and the same model. A small batch of made-up tokens is
    run through the model, whole and sharded, to prove that sharding is exact; the model's weights, buffers, modes and
    the random numbers are left as they were. On one rank nothing is changed. The loss that the model returns is that
    of the whole batch on every rank, and the mean over all ranks of each parameter's gradient, which DDP, FSDP and
    ZeRO take, is its gradient; without them call `average_gradients`.

    Raises on every rank of the group: BackendError for a backend that is unknown or cannot be used, UnsupportedError
    for a model that cannot be proven exact, ValueError for arguments that do not fit and a model that is enabled.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise ValueError(f"{type(model).__name__} is not a transformers model, nor does it contain one")
    peers = resolve(group, sp_size, inner.device)
    chosen = _agreed(lambda: _choose(inner, backend), peers)
    undo = ExitStack()
    if peers is None:
        return Handle(chosen, None, None, None, undo)
    try:
        findings, region = _install(inner, chosen, peers, undo)
    except BaseException:
        undo.close()
        raise
    return Handle(chosen, peers, findings, region, undo)


def _choose(model: PreTrainedModel, backend: str) -> Backend:
    if any(str(config._attn_implementation).startswith(_PREFIX) for config in _configs(model)):
        raise ValueError(
            f"this {type(model).__name__} is already enabled, or shares its configuration object with a model that is: "
            "call disable() on the handle first, or build the model from copy.deepcopy(config)"
        )
    if model.device.type == "meta":
        raise UnsupportedError("the model's weights are not materialised (meta device): load them before enable()")
    return find(model.device.type, backend)


def _install(model: PreTrainedModel, backend: Backend, peers: Peers, undo: ExitStack) -> tuple[Findings, Region]:
    """Rehearse, put everything in place, rehearse sharded; whatever is put in place can be undone by `undo`."""
    key = next(_KEYS)
    names = {id(module): name for name, module in model.named_modules()}
    attention = UlyssesAttention(backend, peers, lambda module: names.get(id(module), type(module).__name__))
    with undisturbed(model):
        findings = _rehearsed(lambda: _attend_through(model, attention, key, peers, undo), peers)
        batch = batch_of(model, 2, max(13, 2 * peers.size + 1))
        labelled = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
        is_causal = "labels" in signature(model.forward).parameters and model.loss_function is ForCausalLMLoss
        whole, whole_labelled = _rehearsed(lambda: (model(**batch), model(**labelled) if is_causal else None), peers)

        hooks = Hooks(Region(findings.layers, findings.models, key, "the model has no causal loss"), peers)
        hooks.install()
        undo.callback(hooks.remove)
        _rehearsed(lambda: _require_same(model(**batch), whole, f"{type(model).__name__} sharded"), peers)
        if is_causal and findings.untrainable is None:
            loss = sharded_causal_loss(ForCausalLMLoss, peers)
            _set_loss(model, loss, undo)
            hooks.region = replace(hooks.region, sharded_loss=loss)
            reason = first_reason(_needs_whole_logits(model, labelled, whole_labelled, peers), peers)
            hooks.region = replace(hooks.region, sharded_loss=reason or loss)
        hooks.region = replace(hooks.region, untrainable=findings.untrainable)
    return findings, hooks.region


def _attend_through(
    model: PreTrainedModel, attention: UlyssesAttention, key: str, peers: Peers, undo: ExitStack
) -> Findings:
    """Let the model attend through us, unsharded, and explore it; the numbers must be those of its own attention."""
    model.eval()
    unpadded = {"input_ids": batch_of(model, 2, 2 * peers.size + 1)["input_ids"]}
    expected = model(**unpadded)
    attended: list[nn.Module] = []

    def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        attended.append(module)
        return attention(module, *args, **kwargs)

    before = [(config, config._attn_implementation) for config in _configs(model)]
    AttentionInterface.register(key, recorded)
    AttentionMaskInterface.register(key, describe)
    undo.callback(_restore, before, key)
    model.set_attn_implementation(key)
    findings = explore(model, attended, peers.size)
    AttentionInterface.register(key, attention)
    trains = model.training
    _require_same(model.eval()(**unpadded), expected, f"kernel {attention.backend.kernel!r}")
    model.train(trains)
    return findings


def _require_same(output: Any, expected: Any, what: str) -> None:
    if not same(output, expected):
        raise UnsupportedError(
            f"{what} gives other numbers than the model on its own; what causes this is not covered yet"
        )


def _needs_whole_logits(model: PreTrainedModel, batch: dict[str, Tensor], whole: Any, peers: Peers) -> str | None:
    """None when all that follows the stack of layers works with one span of it, or why it does not."""
    try:
        output = model(**batch)
    except (RuntimeError, ValueError) as error:  # of shapes that do not fit, on every rank alike
        return f"on a part of the sequence the model raises {type(error).__name__}"
    span = peers.span(batch["input_ids"].shape[1])
    mine = {"loss": whole["loss"], "logits": whole["logits"][:, span.start : span.stop]}
    if same({"loss": output["loss"], "logits": output["logits"]}, mine):
        return None
    return "from a part of the sequence the model computes another loss"


def _set_loss(model: PreTrainedModel, loss: Callable[..., Tensor], undo: ExitStack) -> None:
    own = vars(model).get("_loss_function")
    model.loss_function = loss
    undo.callback(lambda: delattr(model, "_loss_function") if own is None else setattr(model, "loss_function", own))


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations of a model and of the models in it, each before the ones it contains."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: PreTrainedConfig) -> None:
        found.setdefault(id(config), config)
        for name in config.sub_configs:
            if getattr(config, name, None) is not None:
                add(getattr(config, name))

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            add(module.config)
    return list(found.values())


def _restore(before: list[tuple[PreTrainedConfig, str | None]], key: str) -> None:
    # Setting a configuration sets those inside it too, so they come after it.
    for config, implementation in before:
        config._attn_implementation = implementation
    # transformers has a function to register and none to take back.
    AttentionInterface._global_mapping.pop(key, None)
    AttentionMaskInterface._global_mapping.pop(key, None)


Result = TypeVar("Result")


def _agreed(step: Callable[[], Result], peers: Peers | None) -> Result:
    """The result of a step; when it refuses on any rank, the same error on every rank."""
    problem: Exception | None = None
    try:
        result = step()
    except (UnsupportedError, ValueError) as error:
        problem = error
    share_problem(problem, peers)
    return result


def _rehearsed(step: Callable[[], Result], peers: Peers) -> Result:
    """As `_agreed`, for a step that runs the model: an error of the model's own is a reason to refuse it."""

    def guarded() -> Result:
        try:
            return step()
        except UnsupportedError:
            raise
        except Exception as error:
            raise UnsupportedError(f"the rehearsal in enable() failed: {type(error).__name__}: {error}") from error

    return _agreed(guarded, peers)
