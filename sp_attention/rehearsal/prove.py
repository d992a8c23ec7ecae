"""Put a model's region in place, and prove that the sharded model gives what the whole one gives.

What cannot be proven falls back step by step, slower each time: masks as tensors instead of descriptions; mixers, what
attends, whole layers on whole tensors; a region around every layer instead of one around the stack; and in the end a
refusal.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from sp_attention.distributed import rng
from sp_attention.distributed.collectives import mean_over_ranks
from sp_attention.distributed.consistency import attempted
from sp_attention.distributed.peers import Peers
from sp_attention.distributed.sharded_params import is_partitioned
from sp_attention.errors import BackendError, Refused, UnsupportedError
from sp_attention.kernels.registry import usable
from sp_attention.region.attention import AttentionFunction
from sp_attention.region.attn_implementation import Masks, attend_by, own_attention, register, release
from sp_attention.region.hooks import Hooks
from sp_attention.region.masks import describe_for_layers
from sp_attention.region.plan import Layer, RegionPlan, Stack
from sp_attention.region.pytree import Path, tensors
from sp_attention.region.sequence_dims import Extent
from sp_attention.rehearsal.classify import explore
from sp_attention.rehearsal.dummy_inputs import DummyBatch, dummy_batches
from sp_attention.rehearsal.findings import EVERYTHING, Findings, LayerFindings
from sp_attention.rehearsal.options import Options
from sp_attention.rehearsal.prove_kv_cache import prove_caches
from sp_attention.rehearsal.prove_loss import shard_loss
from sp_attention.rehearsal.prove_tiled_mlp import tile_mlps
from sp_attention.rehearsal.trace import (
    AttentionCall,
    Trace,
    Traces,
    require_same,
    same,
    same_buffers,
    undisturbed,
    with_gradients,
)

_UNPROVEN = Refused("enable(rehearse=False) did not prove that the loss can be computed from a part of the logits")
_NO_LOSS = Refused("the model has no causal loss, or draws random numbers before it")


def install(
    model: PreTrainedModel, attention: AttentionFunction, key: str, undo: ExitStack, options: Options
) -> tuple[Findings, Hooks]:
    """Find, prove and hook the region of a model; whatever is put in place can be undone by `undo`.

    `key` is the name under which transformers gets to know `attention`. Raises UnsupportedError, on every rank.
    """
    with undisturbed(model):
        model.eval()
        pairs = _dummy_batches(model, attention.peers)
        placed = _placed(model, attention, key, pairs, undo, options)
        hooks, findings, plan = placed.hooks, placed.findings, placed.hooks.plan
        undo.callback(hooks.remove)
        if options.whole_logits:
            plan = replace(plan, sharded_loss=Refused("enable(whole_logits=True)"))
        elif options.rehearse and not placed.draws.after:
            plan = shard_loss(model, hooks, plan, findings, pairs[0][0], undo, options.loss_tile)
        if isinstance(options.loss_tile, int) and isinstance(plan.lm_head, Refused):
            reasons = [one.reason for one in (plan.lm_head, plan.sharded_loss) if isinstance(one, Refused)]
            raise UnsupportedError(f"loss_tile={options.loss_tile}: {': '.join(reasons)}; leave it out")
        if options.mlp_tile is not None:
            findings, plan = tile_mlps(model, hooks, plan, findings, pairs[0][0], options.mlp_tile)
        hooks.plan = replace(plan, offloads=options.offload)
        hooks.install()
    return findings, hooks


def _dummy_batches(model: PreTrainedModel, peers: Peers) -> list[tuple[DummyBatch, DummyBatch]]:
    """Pairs of a narrow and a wide batch that the model takes, of as few tokens as all ranks can share."""
    size = max(5, 2 * peers.size + 1)
    narrow, wide = Extent(2, size), Extent(3, size + peers.size + 1)
    pairs = attempted(partial(dummy_batches, model, narrow, wide), peers)
    if isinstance(pairs, Refused):
        raise UnsupportedError(_partitioned(model) or pairs.reason)
    # Whether a mask hides anything cannot be read where nothing is materialised.
    return pairs[-1:] if model.device.type == "meta" else pairs


@dataclass(frozen=True)
class _Placed:
    """What was found in a model that attends by our function now: hooks that are not installed, with a proven plan."""

    findings: Findings
    hooks: Hooks
    draws: "Draws"


def _placed(
    model: PreTrainedModel,
    attention: AttentionFunction,
    key: str,
    pairs: list[tuple[DummyBatch, DummyBatch]],
    undo: ExitStack,
    options: Options,
) -> _Placed:
    """The first way of three in which the model gives the same numbers; raises UnsupportedError if none is."""
    reasons: dict[str, None] = {}
    own = ALL_MASK_ATTENTION_FUNCTIONS.get(str(model.config._attn_implementation), sdpa_mask)
    # Masks as descriptions; for models that compute with their masks, what they get on their own; and for models
    # that cannot attend through us, their own attention.
    for masks in (describe_for_layers, own, None):
        with ExitStack() as attempt:
            step = partial(_place, model, attention, key, masks, pairs, attempt, options.rehearse)
            placed = attempted(step, attention.peers)
            if not isinstance(placed, Refused):
                undo.push(attempt.pop_all())
                return placed
        reasons[placed.reason] = None
    raise UnsupportedError("\n".join(reasons))


def _partitioned(model: PreTrainedModel) -> str | None:
    """What to do if the model cannot run since DeepSpeed has cut up its weights, and no engine gathers them."""
    if not any(map(is_partitioned, model.parameters())):
        return None
    return (
        f"the weights of this {type(model).__name__} are partitioned by DeepSpeed's ZeRO-3 and no engine gathers them "
        "yet, so nothing can be proven: call enable() within deepspeed.zero.GatheredParameters(model.parameters()), "
        "which holds them whole on every rank as long, or after deepspeed.initialize()"
    )


@dataclass(frozen=True)
class Draws:
    """Where a model draws random numbers in training: at all, between which stacks' layers, after the last layer."""

    anywhere: bool = False
    between: frozenset[str] = frozenset()
    after: bool = False


def _draws(model: PreTrainedModel, findings: Findings, inputs: Mapping[str, Any]) -> tuple[Draws, tuple[Any, Tensor]]:
    """Where random numbers are drawn, and the model's output with gradients; in training unless there are any."""
    seen: list[tuple[str | None, list[Tensor]]] = []
    handles = []
    for name, layers in findings.stacks.items():
        for found in layers:
            module = found.layer.module

            def note(*_: Any, name: str = name) -> None:
                seen.append((name, rng.states(model.device)))

            handles += [module.register_forward_pre_hook(note), module.register_forward_hook(note)]
    model.train()
    before = rng.states(model.device)
    try:
        with same_buffers(model):
            result = with_gradients(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    after = rng.states(model.device)
    if rng.are_equal(before, after):
        return Draws(), result
    model.eval()
    # Two notes a layer: what lies between the second of one and the first of the next is the model's own.
    gaps = [(one, other) for one, other in zip(seen[1::2], seen[2::2], strict=False) if one[0] == other[0]]
    between = frozenset(str(one[0]) for one, other in gaps if not rng.are_equal(one[1], other[1]))
    draws = Draws(True, between, not seen or not rng.are_equal(seen[-1][1], after))
    return draws, with_gradients(model, inputs)


def _place(
    model: PreTrainedModel,
    attention: AttentionFunction,
    key: str,
    masks: Masks | None,
    pairs: list[tuple[DummyBatch, DummyBatch]],
    undo: ExitStack,
    rehearse: bool,
) -> _Placed:
    """Let the model attend by our function, with these masks, and find a plan; `undo` takes back what was put there."""
    own = own_attention(model)
    model.eval()
    findings, traces = _explored(model, attention, key, masks, pairs, undo, rehearse)
    if masks is not None:
        register(key, replace(attention, cross_attention=findings.cross_attention))
        release(own, findings.models)
    if rehearse and masks is not None and not all(_is_right(trace.output, trace.dummy) for trace, _ in traces):
        _require_right_kernel(model, attention, key, [pair[0] for pair in pairs])
        raise UnsupportedError("through transformers' attention interface the model gives other numbers")
    draws, last = _draws(model, findings, pairs[-1][0].inputs)
    findings = replace(findings, separate=findings.separate | draws.between)
    if draws.anywhere:
        findings = replace(findings, embeddings={})  # Dropout may come between them and the first layer.
    plan = RegionPlan(
        findings.planned(),
        findings.models,
        findings.arguments,
        key if masks is not None else None,
        _NO_LOSS if rehearse else _UNPROVEN,
        random=draws.anywhere,
    )
    hooks = Hooks(plan, attention.peers, attention.context)
    if rehearse:
        plan = replace(plan, caches=Refused("not proven yet"))
        findings = _prove(model, hooks, plan, findings, [pair[0] for pair in traces], last)
        plan = replace(plan, stacks=findings.planned())
        trains = model.training
        model.eval()
        hooks.plan = prove_caches(model, hooks, plan, own, traces[0])
        model.train(trains)
    return _Placed(findings, hooks, draws)


def _explored(
    model: PreTrainedModel,
    attention: AttentionFunction,
    key: str,
    masks: Masks | None,
    pairs: list[tuple[DummyBatch, DummyBatch]],
    undo: ExitStack,
    rehearse: bool,
) -> tuple[Findings, Traces]:
    """What is found in a model that attends by our function, if there are masks for it; its calls are recorded."""
    calls: list[AttentionCall] = []

    def recorded(module: nn.Module, queries: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> Any:
        heads = (queries.shape[1], keys.shape[1])
        calls.append(AttentionCall(module, (queries.shape[0], queries.shape[2]), (keys.shape[0], keys.shape[2]), heads))
        return attention(module, queries, keys, *args, **kwargs)

    if masks is not None:
        attend_by(model, key, recorded, masks, undo)
    return explore(model, pairs, calls, proves=rehearse, attends=masks is not None)


def _prove(
    model: PreTrainedModel,
    hooks: Hooks,
    plan: RegionPlan,
    findings: Findings,
    traces: list[Trace],
    last: tuple[Any, Tensor],
) -> Findings:
    """The findings with as much gathered as the sharded model needs to give what the whole one gives.

    `last` is what the whole model gives for the last trace's batch, in the mode that it is in, with its gradients; the
    traces were recorded in evaluation.
    """
    trains = model.training

    def compare() -> None:
        model.eval()
        for trace in traces[:-1]:
            require_same(model(**trace.dummy.inputs), trace.output, f"{type(model).__name__} sharded")
        model.train(trains)
        output, gradients = with_gradients(model, traces[-1].dummy.inputs)
        require_same(output, last[0], f"{type(model).__name__} sharded")
        gradients = mean_over_ranks(gradients, hooks.peers)
        require_same(gradients, last[1], f"the backward of {type(model).__name__} sharded")

    def tried(found: Findings) -> Refused | None:
        with hooks.trying(replace(plan, stacks=found.planned())):
            return attempted(compare, hooks.peers, model.device)

    refused = tried(findings)
    if refused is not None and findings.embeddings:
        findings = replace(findings, embeddings={})
        refused = tried(findings)
    if refused is None:
        return findings
    for found in _falling_back(hooks, plan, findings, traces):
        if not found.shares_nothing and tried(found) is None:
            return found
    raise UnsupportedError(f"{refused.reason}; nothing of it can be shared out exactly")


def _falling_back(hooks: Hooks, plan: RegionPlan, findings: Findings, traces: list[Trace]) -> Iterator[Findings]:
    """The findings with more and more on whole tensors: mixers and what attends, regions around layers, all of it."""
    enough = {
        name: tuple(_gathering_enough(found, hooks, plan, traces) for found in layers)
        for name, layers in findings.stacks.items()
    }
    findings = replace(findings, stacks=enough)
    everything = {
        name: tuple(replace(found, gathers=EVERYTHING) for found in layers) for name, layers in findings.stacks.items()
    }
    apart = frozenset({*findings.stacks, *findings.idle})
    yield findings
    yield replace(findings, separate=apart)
    yield replace(findings, stacks=everything)
    yield replace(findings, stacks=findings.idle, separate=apart)


def _gathering_enough(found: LayerFindings, hooks: Hooks, plan: RegionPlan, traces: list[Trace]) -> LayerFindings:
    """The layer with as much gathered as it needs to give alone, sharded, what it gave in the rehearsal."""
    for gathers in range(found.gathers, EVERYTHING + 1):
        found = replace(found, gathers=gathers)
        layer = found.planned()

        def compare(layer: Layer = layer) -> None:
            for trace in traces:
                for called in trace.calls[layer.module]:
                    with hooks.as_in_a_forward():
                        args, kwargs = called.inputs
                        require_same(layer.module(*args, **kwargs), called.output, layer.name)

        with hooks.trying(_with_layer(plan, layer)):
            refused = attempted(compare, hooks.peers, plan.models[0].device)
        if refused is None:
            break
    return found


def _with_layer(plan: RegionPlan, layer: Layer) -> RegionPlan:
    """The plan with a layer in place of the one of the same module."""

    def changed(stack: Stack) -> Stack:
        return replace(stack, layers=tuple(layer if one.module is layer.module else one for one in stack.layers))

    return replace(plan, stacks=tuple(map(changed, plan.stacks)))


def _is_right(output: Any, dummy: DummyBatch) -> bool:
    return same(_of_real_tokens(output, dummy), _of_real_tokens(dummy.output, dummy))


def _require_right_kernel(
    model: PreTrainedModel, attention: AttentionFunction, key: str, narrow: list[DummyBatch]
) -> None:
    """Raise BackendError if it is for the kernel alone that the model gives other numbers: with another it does not."""
    for other in usable(model.device.type):
        register(key, replace(attention, backend=other))
        try:
            right = all(_is_right(model(**dummy.inputs), dummy) for dummy in narrow)
        except Exception:  # of a kernel that nobody asked for
            continue
        if right:
            raise BackendError(
                f"with kernel {attention.backend.kernel!r} the model gives other numbers than on its own, and not with "
                f'{other.kernel!r}: use enable(model, backend="{other.kernel}")'
            )


def _of_real_tokens(output: Any, dummy: DummyBatch) -> dict[Path, Tensor]:
    """A model's output without what it gives for padding, where kernels may do as they like."""
    found = dict(tensors(output))
    for name, padding in dummy.inputs.items():
        if name.endswith("attention_mask"):
            for path, tensor in found.items():
                if tensor.shape[:2] == padding.shape:
                    found[path] = tensor * padding.view(*padding.shape, *[1] * (tensor.dim() - 2)).to(tensor.dtype)
    return found
