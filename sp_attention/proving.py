"""Put a model's region in place, and prove that the sharded model gives what the whole one gives.

What cannot be proven falls back step by step, slower each time: masks as tensors instead of descriptions; mixers, what
attends, whole layers on whole tensors; a region around every layer instead of one around the stack; and in the end a
refusal.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from sp_attention.agreement import first_reason, share_problem
from sp_attention.dims import Extent
from sp_attention.errors import BackendError, UnsupportedError
from sp_attention.exchange import Peers
from sp_attention.loss import sharded_causal_loss
from sp_attention.masks import describe
from sp_attention.region import DROPOUT, Forward, Hooks, Region, random_state
from sp_attention.rehearsal import EVERYTHING, Attended, Findings, Found, Run, explore, same, undisturbed
from sp_attention.specimens import Specimen, specimens
from sp_attention.ulysses import UlyssesAttention

_UNPROVEN = "enable(rehearse=False) did not prove that the loss can be computed from a part of the logits"


@dataclass(frozen=True)
class Way:
    """How a model attends: through us, with its masks described or as tensors; or on its own."""

    text: str
    masks: Callable[..., Any] | None


def _tensor_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask as transformers builds it for torch's attention, never left out; for models that compute with it."""
    mask: Tensor | None = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return mask


WAYS = (
    Way("with masks as descriptions", describe),
    Way("with masks as tensors", _tensor_mask),
    Way("with the model's own attention", None),
)


def install(
    model: PreTrainedModel, attention: UlyssesAttention, key: str, undo: ExitStack, rehearse: bool
) -> tuple[Findings, Region]:
    """Find, prove and hook the region of a model; whatever is put in place can be undone by `undo`.

    `key` is the name under which transformers gets to know `attention`. Raises UnsupportedError, on every rank.
    """
    peers = attention.peers
    size = max(5, 2 * peers.size + 1)
    narrow, wide = Extent(2, size), Extent(3, size + peers.size + 1)
    with undisturbed(model):
        model.eval()
        pairs = list(zip(specimens(model, narrow), specimens(model, wide), strict=True))
        if model.device.type == "meta":
            pairs = pairs[-1:]  # Whether a mask hides anything cannot be read.
        untrainable = _settled(lambda: _untrainable(model, pairs[-1][0]), peers)
        reasons: dict[str | None, None] = {}
        for way in WAYS:
            with ExitStack() as attempt:
                step = partial(_place, model, attention, key, way, pairs, attempt, rehearse)
                reason, done = _attempted(step, peers)
                if done is not None:
                    undo.push(attempt.pop_all())
                    findings, hooks = done
                    break
            reasons[reason] = None
        else:
            raise UnsupportedError("\n".join(map(str, reasons)))
        if rehearse and untrainable is None:
            _shard_loss(model, hooks, findings, pairs[0][0], undo)
        hooks.region = replace(hooks.region, untrainable=untrainable)
    return findings, hooks.region


def _untrainable(model: PreTrainedModel, specimen: Specimen) -> str | None:
    """Leaves the model in training mode unless it draws random numbers there, which is why it cannot be trained."""
    if model.device.type == "meta":
        return None
    model.train()
    before = random_state(model.device)
    model(**specimen.inputs)
    if all(one.equal(other) for one, other in zip(random_state(model.device), before, strict=True)):
        return None
    model.eval()
    return DROPOUT


def _place(
    model: PreTrainedModel,
    attention: UlyssesAttention,
    key: str,
    way: Way,
    pairs: list[tuple[Specimen, Specimen]],
    undo: ExitStack,
    rehearse: bool,
) -> tuple[Findings, Hooks]:
    peers, narrow = attention.peers, [pair[0] for pair in pairs]
    expected = model(**narrow[-1].inputs) if rehearse else None
    attended: list[Attended] = []

    def recorded(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        attended.append(Attended(module, (query.shape[0], query.shape[2]), (key.shape[0], key.shape[2])))
        return attention(module, query, key, *args, **kwargs)

    if way.masks is not None:
        _attend_by(model, key, recorded, way.masks, undo)
    findings, runs = explore(model, pairs, attended, proves=rehearse, attends=way.masks is not None)
    if way.masks is not None:
        AttentionInterface.register(key, replace(attention, over_memory=findings.over_memory))
    if rehearse:
        # The specimen without padding: what kernels return for queries that see nothing is no one's business.
        _require_same(model(**narrow[-1].inputs), expected, f"kernel {attention.backend.kernel!r}")
    region = Region(
        findings.planned(),
        findings.models,
        findings.arguments,
        key if way.masks is not None else None,
        _UNPROVEN if not rehearse else "the model has no causal loss",
    )
    hooks = Hooks(region, peers, attention.current)
    undo.callback(hooks.remove)
    if rehearse:
        whole = [model(**specimen.inputs) for specimen in narrow]
        findings = _prove(model, hooks, findings, [pair[0] for pair in runs], whole)
    else:
        hooks.install()
    return findings, hooks


def _prove(model: PreTrainedModel, hooks: Hooks, findings: Findings, runs: list[Run], whole: list[Any]) -> Findings:
    """The findings with as much gathered as the sharded model needs to give what the whole one gives."""

    def tried(plan: Findings) -> str | None:
        hooks.remove()
        hooks.region = replace(hooks.region, stacks=plan.planned())
        hooks.install()

        def compare() -> None:
            for run, expected in zip(runs, whole, strict=True):
                _require_same(model(**run.specimen.inputs), expected, f"{type(model).__name__} sharded")

        return _attempted(compare, hooks.peers)[0]

    reason = tried(findings)
    if reason is None:
        return findings
    findings = replace(
        findings,
        stacks={
            name: tuple(_gathering_enough(found, hooks, runs) for found in layers)
            for name, layers in findings.stacks.items()
        },
    )
    everything = {
        name: tuple(replace(found, gathers=EVERYTHING) for found in layers) for name, layers in findings.stacks.items()
    }
    for plan in (
        findings,
        replace(findings, separate=frozenset(findings.stacks)),
        replace(findings, separate=frozenset(findings.stacks), stacks=everything),
    ):
        again = tried(plan)
        if again is None:
            return plan
    raise UnsupportedError(f"{reason}; with everything gathered: {again}")


def _gathering_enough(found: Found, hooks: Hooks, runs: list[Run]) -> Found:
    """The layer with as much gathered as it needs to give alone, sharded, what it gave in the rehearsal."""
    for gathers in range(found.gathers, EVERYTHING + 1):
        found = replace(found, gathers=gathers)
        layer = found.planned()
        stacks = tuple(
            replace(stack, layers=tuple(layer if one.module is layer.module else one for one in stack.layers))
            for stack in hooks.region.stacks
        )
        hooks.remove()
        hooks.region = replace(hooks.region, stacks=stacks)
        hooks.install()

        def compare(layer: Any = layer) -> None:
            for run in runs:
                for called in run.calls[layer.module]:
                    hooks.forward = Forward(hooks.region.models[0], None, unseen=True, randomness=None)
                    args, kwargs = called.inputs
                    _require_same(layer.module(*args, **kwargs), called.output, layer.name)

        reason, _ = _attempted(compare, hooks.peers)
        hooks.forward, hooks.current.call = None, None
        if reason is None:
            break
    return found


def _shard_loss(model: PreTrainedModel, hooks: Hooks, findings: Findings, specimen: Specimen, undo: ExitStack) -> None:
    """Let logits stay sharded in training if all that follows the last stack works with a part of the sequence."""
    before = [name for name, extent in findings.extents.items() if extent == specimen.extent]
    if model.loss_function is not ForCausalLMLoss or "labels" not in signature(model.forward).parameters or not before:
        return
    ids = specimen.inputs["input_ids"]
    labels = ids.masked_fill(specimen.inputs.get("attention_mask", ids) == 0, -100)
    batch = {**specimen.inputs, "labels": labels}
    whole = _settled(lambda: model(**batch), hooks.peers)
    loss = sharded_causal_loss(ForCausalLMLoss, hooks.peers)
    own = vars(model).get("_loss_function")
    model.loss_function = loss
    undo.callback(lambda: delattr(model, "_loss_function") if own is None else setattr(model, "loss_function", own))
    hooks.region = replace(hooks.region, sharded_loss=loss, before_loss=before[-1])
    reason = first_reason(_needs_whole_logits(model, batch, whole, hooks.peers), hooks.peers)
    hooks.region = replace(hooks.region, sharded_loss=reason or loss)


def _needs_whole_logits(model: PreTrainedModel, batch: dict[str, Any], whole: Any, peers: Peers) -> str | None:
    """None when all that follows the stack of layers works with one span of it, or why it does not."""
    try:
        output = model(**batch)
    except (RuntimeError, ValueError) as error:  # of shapes that do not fit, on every rank alike
        return f"on a part of the sequence the model raises {type(error).__name__}"
    span = peers.span(batch["labels"].shape[1])
    mine = {"loss": whole["loss"], "logits": whole["logits"][:, span.start : span.stop]}
    if same({"loss": output["loss"], "logits": output["logits"]}, mine):
        return None
    return "from a part of the sequence the model computes another loss"


def _require_same(output: Any, expected: Any, what: str) -> None:
    if not same(output, expected):
        raise UnsupportedError(f"{what} gives other numbers than the model on its own")


def _attend_by(
    model: PreTrainedModel, key: str, attention: Callable[..., Any], masks: Callable[..., Any], undo: ExitStack
) -> None:
    """Let the model attend by `attention`, known to transformers as `key`, with masks made by `masks`."""
    before = [(config, config._attn_implementation) for config in configs(model)]

    # A callback and no context manager: a generator that is collected would undo it, and handles need not be kept.
    def restore() -> None:
        # Setting a configuration sets those inside it too, so they come after it.
        for config, implementation in before:
            config._attn_implementation = implementation
        # transformers has a function to register and none to take back.
        AttentionInterface._global_mapping.pop(key, None)
        AttentionMaskInterface._global_mapping.pop(key, None)

    AttentionInterface.register(key, attention)
    AttentionMaskInterface.register(key, masks)
    undo.callback(restore)
    model.set_attn_implementation(key)


def configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
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


Result = TypeVar("Result")


def _attempted(step: Callable[[], Result], peers: Peers) -> tuple[str | None, Result | None]:
    """Why a step of the rehearsal failed on any rank, None if it did on none, and what it returned.

    Whatever the model raises is a reason; what a kernel refuses is raised, since another one can do it.
    """
    reason, refusal, result = None, None, None
    try:
        result = step()
    except BackendError as error:
        refusal = error
    except Exception as error:
        reason = str(error) if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {error}"
    share_problem(refusal, peers)
    reason = first_reason(reason, peers)
    return reason, None if reason is not None else result


def _settled(step: Callable[[], Result], peers: Peers) -> Result:
    """The result of a step that must succeed; when it fails on any rank, an UnsupportedError on every rank."""
    reason, result = _attempted(step, peers)
    if reason is not None:
        raise UnsupportedError(f"the rehearsal in enable() failed: {reason}")
    return result  # type: ignore[return-value]  # there is one when there is no reason
