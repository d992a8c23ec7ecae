"""`enable`: one line that makes a model sequence-parallel, and the handle that undoes it."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import count
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from sp_attention.distributed.consistency import agreed, in_common, require_same_options
from sp_attention.distributed.other_meshes import met_by_other_parallelism
from sp_attention.distributed.peers import Peers, alone
from sp_attention.distributed.process_groups import Group, place, resolve, shared_by
from sp_attention.errors import BackendError, Refused, UnsupportedError
from sp_attention.kernels.registry import candidates
from sp_attention.kernels.request import Backend
from sp_attention.region.attention import AttentionFunction, names_in
from sp_attention.region.attn_implementation import Own, attend_as, configs, keep, leave, own_attention
from sp_attention.region.context import Context
from sp_attention.region.copies import CopiedHooks
from sp_attention.region.hooks import Hooks
from sp_attention.region.plan import outermost_models
from sp_attention.region.unpicklable import Unpicklable
from sp_attention.rehearsal.findings import Findings, described, report
from sp_attention.rehearsal.install import install
from sp_attention.rehearsal.options import LossTile, Options
from sp_attention.rehearsal.prove_loss import give_back_loss
from sp_attention.rehearsal.same_model import require_same_model
from sp_attention.ulysses.head_groups import HeadGroups

# Our keys in transformers' registries of attention functions. Every enabled model has its own, never used again, so
# that a copy of a model that was disabled since finds nothing instead of another model's attention.
_PREFIX = "sp_attention_"
_KEYS = (f"{_PREFIX}{number}" for number in count())
# The attribute of an enabled model that is its handle, and the handles of models that nothing was changed in.
_HANDLE = "_sp_attention_handle"
_UNCHANGED: WeakKeyDictionary[nn.Module, "Handle"] = WeakKeyDictionary()


@dataclass(eq=False)
class Handle(Unpicklable):
    """An enabled model. As a context manager it disables the model at the end.

    peers: the ranks that share its sequences, None when this rank is alone. hooks: None where nothing was changed.
    passed_over: the kernels of higher priority that "auto" did not take, and why.
    own: how the model attended before. others: the handles of other models in the same module, by their names there;
    they are disabled and suspended with this one. left_alone: those that cannot be enabled, and why.
    """

    backend: Backend
    passed_over: dict[str, str]
    peers: Peers | None
    findings: Findings | None
    hooks: Hooks | CopiedHooks | None
    own: Own
    _undo: ExitStack
    others: dict[str, "Handle"] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    @property
    def data_parallel_size(self) -> int:
        """How many groups all processes make, as many different batches at a time. Raises as `data_parallel_rank`."""
        return place(self.peers)[0]

    @property
    def data_parallel_rank(self) -> int:
        """Which of these groups this rank is in: the rank for whatever cuts the data.

        Raises ValueError when a group is not made of neighbouring ranks.
        """
        return place(self.peers)[1]

    @property
    def refuses_caches(self) -> str | None:
        """Why key/value caches are refused, so that only a suspended model generates; None where they are not."""
        caches = None if self.hooks is None else self.hooks.plan.caches
        return caches.reason if isinstance(caches, Refused) else None

    def disable(self) -> None:
        """Make the model what it was before `enable`: hooks, attributes, configuration and registries."""
        self._undo.close()
        for other in self.others.values():
            other.disable()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it the model computes as before `enable`: each rank does all of the work, alone."""
        with ExitStack() as others:
            for other in self.others.values():
                others.enter_context(other.suspended())
            with self._suspended_alone():
                yield

    @contextmanager
    def _suspended_alone(self) -> Iterator[None]:
        if self.hooks is None or not self.hooks.are_installed:
            yield
            return
        ours = [(config, config._attn_implementation) for config, _ in self.own]
        self.hooks.remove()
        attend_as(self.own)
        try:
            yield
        finally:
            # Unless it was disabled meanwhile.
            if vars(self.hooks.model).get(_HANDLE) is self:
                attend_as(ours)
                self.hooks.install()

    @contextmanager
    def only_loss(self) -> Iterator[None]:
        """Within it logits stay sharded in evaluation with labels too, as in training: for a loss, with less memory."""
        with ExitStack() as everyone:
            for one in (self, *self.others.values()):
                everyone.enter_context(nullcontext() if one.hooks is None else one.hooks.for_the_loss())
            yield

    def report(self) -> str:
        """What each part of each kind of layer does, and why, as text for people."""
        if self.findings is None or self.hooks is None:
            return "sp_attention: one rank, so nothing is changed"
        peers, kernel = self.peers or alone(), self.backend.kernel
        lines = [f"sp_attention: {shared_by(peers)}, kernel {kernel!r}"]
        lines += [f"  kernel {kernel!r} was passed over: {reason}" for kernel, reason in self.passed_over.items()]
        lines += report(self.findings)
        lines += described(self.hooks.plan, self.hooks.context.plans, peers.size)
        lines += [f"  of others, given whole tensors: {one}" for one in self.hooks.others_now().told]
        lines += [f"{name}, beside it: {other.report()}" for name, other in self.others.items()]
        lines += [
            f"{name}, beside it: left alone, each rank does all of it: {why}" for name, why in self.left_alone.items()
        ]
        return "\n".join(lines)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handle":
        """That of a copied model, which has the same hooks, and goes on with them when the other is disabled."""
        model = None if self.hooks is None else memo.get(id(self.hooks.model))
        if self.hooks is None or model is None:
            return self
        original = self.hooks.original if isinstance(self.hooks, CopiedHooks) else self.hooks
        hooks, undo = CopiedHooks(original, model), ExitStack()
        own = [(copy.deepcopy(config, memo), implementation) for config, implementation in self.own]
        handle = Handle(self.backend, self.passed_over, self.peers, self.findings, hooks, own, undo)
        undo.callback(delattr, model, _HANDLE)
        if hooks.plan.implementation is not None:
            keep(hooks.plan.implementation, handle)
            undo.callback(leave, hooks.plan.implementation, handle)
        undo.callback(attend_as, own)
        undo.callback(give_back_loss, model, hooks.plan)
        undo.callback(hooks.remove)
        return handle

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.disable()


def enable(
    model: nn.Module,
    backend: str = "auto",
    *,
    group: Group | None = None,
    sp_size: int | None = None,
    rehearse: bool = True,
    whole_logits: bool = False,
    loss_tile: LossTile = "auto",
    mlp_tile: int | None = None,
    offload: bool = False,
    longest: int | None = None,
    head_groups: HeadGroups | None = None,
) -> Handle:
    """Make a transformers model sequence-parallel: every rank passes the same whole batch, and computes a part of it.

    model: a PreTrainedModel, or a module that holds one or several, on its device and in any float dtype, float64
        included. Of several the handle is that of the first, and disables all.
    backend: the kernel, such as "sdpa"; "auto" takes the one of highest priority on the model's device that does all
        that the model asks in the rehearsal. It is not changed afterwards: what a batch asks beyond that is refused.
    group: the ranks that share a sequence: a ProcessGroup, a DeviceMesh dimension, or an object with
        `get_sequence_parallel_group()`. By default all processes.
    rehearse: False skips the proof (below): in layers that attend through transformers' interface all else is taken to
        treat each token alone, and the loss is computed from whole logits. For models that are known, and for weights
        that are not materialised yet.
    whole_logits: also in training with labels `outputs.logits` are all logits, and not `ShardedLogits`.
    loss_tile: the loss makes the logits of this many tokens at a time, and again only for what is asked of
        `outputs.logits`; "auto" takes as many as have logits of 64 MiB, and at least 512. None makes all at once.
    mlp_tile: parts of layers that treat each token alone, MLPs and norms, are given this many tokens at a time in
        training, and compute them again in backward.
    offload: the inputs of checkpointed layers are in CPU memory between forward and backward. These three are for
        training.
    head_groups: attention takes this many groups of heads, or somewhat fewer, one after the other, and computes them
        again in backward; "auto" takes so many that one has 64 MiB on a rank. None takes all heads at once. One rank
        alone does nothing, unless one of these four is passed.
    longest: what is found holds for sequences of this many tokens. By default it holds up to a length beyond every
        threshold that the configuration may mean, and the first forward with a longer one tries the layers again, and
        raises UnsupportedError where they do to many tokens what they do not to few.
    sp_size: instead of `group`, cuts all processes into groups of this many neighbouring ranks; all must call.

    Every rank of the group must call, with the same arguments and the same model. A small batch of made-up tokens is
    run through the model, whole and sharded, to prove that sharding is exact; the model's weights, buffers, attributes
    and modes, and the random numbers, are left as they were. The loss that the model returns is that of the whole batch
    on every rank, and the mean over all ranks of each parameter's gradient, which DDP, FSDP and ZeRO take, is its
    gradient; without them call `average_gradients`.

    Raises on every rank of the group: BackendError for a backend that is unknown or cannot be used, UnsupportedError
    for a model that cannot be proven exact, BatchError for ranks whose models or modes differ, ValueError for arguments
    that do not fit and a model that is enabled.
    """
    peers = resolve(group, sp_size, next((parameter.device for parameter in model.parameters()), torch.device("cpu")))
    options = Options(rehearse, whole_logits, loss_tile, mlp_tile, offload, longest, head_groups)
    if peers is None and options.for_one_rank:
        peers = alone()
    towers = agreed(lambda: outermost_models(model), peers)
    return _all_enabled(model, towers, backend, peers, options)


def _all_enabled(
    outer: nn.Module, towers: dict[str, PreTrainedModel], backend: str, peers: Peers | None, options: Options
) -> Handle:
    """Of several models side by side those that cannot be enabled are left alone, unless none can."""
    handles: dict[str, Handle] = {}
    refused: dict[str, UnsupportedError] = {}
    for name, tower in towers.items():
        try:
            handles[name] = _enabled(outer, tower, backend, peers, options)
        except UnsupportedError as error:
            refused[name] = error
        except BaseException:
            for handle in handles.values():
                handle.disable()
            raise
    if not handles:
        raise next(iter(refused.values()))
    first, *others = handles
    handles[first].others = {name: handles[name] for name in others}
    handles[first].left_alone = {name: str(error) for name, error in refused.items()}
    return handles[first]


def _enabled(outer: nn.Module, inner: PreTrainedModel, backend: str, peers: Peers | None, options: Options) -> Handle:
    """One model, enabled, with the best kernel that does all that it asks."""
    choice = agreed(lambda: _candidates(inner, backend, options, peers), peers)
    if peers is None:
        unchanged = _UNCHANGED[inner] = Handle(choice[0], {}, None, None, None, [], ExitStack())
        return unchanged
    require_same_options(asdict(options), peers)
    require_same_model(outer, inner, peers)
    passed_over: dict[str, str] = {}
    own = own_attention(inner)
    for chosen in _in_common(choice, peers):
        undo, key = ExitStack(), next(_KEYS)
        attention = AttentionFunction(chosen, peers, Context(), names_in(inner), head_groups=options.head_groups)
        try:
            findings, hooks = install(inner, attention, key, undo, options)
        except BackendError as error:
            undo.close()
            if backend != "auto":
                raise
            passed_over[chosen.kernel] = str(error)
        except BaseException:
            undo.close()
            raise
        else:
            handle = Handle(chosen, passed_over, None if peers.is_alone else peers, findings, hooks, own, undo)
            setattr(inner, _HANDLE, handle)
            undo.callback(delattr, inner, _HANDLE)
            keep(key, handle)
            undo.callback(leave, key, handle)
            return handle
    raise BackendError("no kernel does all that this model asks:\n" + "\n".join(passed_over.values()))


def handle_of(model: nn.Module) -> Handle | None:
    """The handle that `enable` returned for a model, or for one that it wraps; None for a model that is not enabled."""
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    handles = (vars(module).get(_HANDLE) or _UNCHANGED.get(module) for module in inner)
    return next(filter(None, handles), None)


def _candidates(model: PreTrainedModel, backend: str, options: Options, peers: Peers | None) -> tuple[Backend, ...]:
    """The backends to try. Raises BackendError, UnsupportedError or ValueError for what is refused on this rank."""
    problem = options.problem(model.device)
    if problem is not None:
        raise ValueError(problem)
    handle: Handle | None = vars(model).get(_HANDLE)  # It may be suspended.
    if handle is not None and isinstance(handle.hooks, CopiedHooks):
        handle.disable()  # What a copy has of another model is nobody's to keep.
        handle = None
    if handle is not None or any(str(config._attn_implementation).startswith(_PREFIX) for config in configs(model)):
        raise ValueError(
            f"this {type(model).__name__} is already enabled, or shares its configuration object with a model that is: "
            "call disable() on the handle first, or build the model from copy.deepcopy(config)"
        )
    if model.device.type == "meta" and options.rehearse:
        raise UnsupportedError(
            "the model's weights are not materialised (meta device), so nothing can be proven: load them onto its "
            "device, where accelerate's cpu_offload and device_map do not keep them, before enable(), or pass "
            "rehearse=False"
        )
    met = None if peers is None else met_by_other_parallelism(model, peers)
    if met is not None:
        raise UnsupportedError(met)
    return candidates(model.device.type, backend)


def _in_common(choice: tuple[Backend, ...], peers: Peers) -> list[Backend]:
    """Those that every rank of the group has, in the order of its first rank. Raises ValueError if there are none."""
    kernels = [backend.kernel for backend in choice]
    return [choice[kernels.index(kernel)] for kernel in in_common(kernels, "kernels", peers)]
