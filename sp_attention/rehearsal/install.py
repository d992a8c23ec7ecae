"""Put a model's region in place: find its stacks, prove that sharding them is exact, and hook them.

A model is placed in the first of three ways in which it gives its own numbers through our attention function: with
masks as descriptions, with masks as it gets them on its own, and attending on its own.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from sp_attention.distributed.consistency import attempted
from sp_attention.distributed.peers import Peers
from sp_attention.distributed.sharded_params import is_partitioned
from sp_attention.errors import BackendError, Refused, UnsupportedError
from sp_attention.kernels.registry import usable
from sp_attention.region.attention import AttentionFunction
from sp_attention.region.attn_implementation import Masks, attend_by, own_attention, register, release
from sp_attention.region.hooks import Hooks
from sp_attention.region.length_check import LengthCheck
from sp_attention.region.masks import describe_for_layers
from sp_attention.region.plan import RegionPlan
from sp_attention.region.pytree import Path, tensors
from sp_attention.region.sequence_dims import Extent
from sp_attention.rehearsal.classify import explore
from sp_attention.rehearsal.draws import Draws, TrainingRun, trained
from sp_attention.rehearsal.dummy_inputs import DummyBatch, dummy_batches
from sp_attention.rehearsal.dummy_labels import with_labels
from sp_attention.rehearsal.feed_forward_chunks import without_chunks
from sp_attention.rehearsal.findings import Findings
from sp_attention.rehearsal.options import Options
from sp_attention.rehearsal.prove import prove_stacks
from sp_attention.rehearsal.prove_kv_cache import prove_caches
from sp_attention.rehearsal.prove_loss import shard_loss
from sp_attention.rehearsal.prove_tiled_mlp import tile_mlps
from sp_attention.rehearsal.trace import (
    AttentionCall,
    Traces,
    same,
    undisturbed,
)

_UNPROVEN = Refused("enable(rehearse=False) did not prove that the loss can be computed from a part of the logits")
# Tokens that layers are tried with in enable() where that cannot be done in a forward.
_AT_ONCE = 32_768
_NO_LOSS = Refused("the model has no causal loss, or draws random numbers before it")


def install(
    model: PreTrainedModel, attention: AttentionFunction, key: str, undo: ExitStack, options: Options
) -> tuple[Findings, Hooks]:
    """Find, prove and hook the region of a model; whatever is put in place can be undone by `undo`.

    `key` is the name under which transformers gets to know `attention`. Raises UnsupportedError, on every rank.
    """
    chunk = without_chunks(model, undo)
    attention.context.rehearses = True
    with undisturbed(model):
        model.eval()
        pairs = _dummy_batches(model, attention.peers)
        placed = _placed(model, attention, key, pairs, undo, options)
        hooks, findings, plan, draws = placed.hooks, placed.findings, placed.plan, placed.draws
        undo.callback(hooks.remove)
        model.train()
        if options.whole_logits:
            plan = replace(plan, sharded_loss=Refused("enable(whole_logits=True)"))
        elif options.rehearse and not draws.after:
            with draws.harmless():
                plan = shard_loss(model, hooks, plan, findings, pairs[0][0], undo, options.loss_tile)
        if isinstance(options.loss_tile, int) and isinstance(plan.lm_head, Refused):
            reasons = [one.reason for one in (plan.lm_head, plan.sharded_loss) if isinstance(one, Refused)]
            raise UnsupportedError(f"loss_tile={options.loss_tile}: {': '.join(reasons)}; leave it out")
        if options.mlp_tile is not None:
            with draws.harmless():
                findings, plan = tile_mlps(model, hooks, plan, findings, pairs[0][0], options.mlp_tile)
        _require_head_groups(model, findings, options)
        hooks.plan = replace(plan, offloads=options.offload, chunk=chunk, head_groups=options.head_groups)
        attention.context.rehearses = False
        hooks.length_check = LengthCheck.of(findings.samples, hooks.plan, findings.proven_length)
    hooks.install()
    return findings, hooks


def _require_head_groups(model: PreTrainedModel, findings: Findings, options: Options) -> None:
    """Raise UnsupportedError if groups of heads are asked for, and nothing has heads that we know of."""
    if isinstance(options.head_groups, int) and not findings.attends_by_heads:
        raise UnsupportedError(
            f"head_groups={options.head_groups}: nothing of {type(model).__name__} attends by heads, through "
            "transformers' attention interface, so there are none to take in groups: leave it out"
        )


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
    """What was found in a model that attends by our function now, a plan that is proven, and hooks, not installed."""

    findings: Findings
    plan: RegionPlan
    hooks: Hooks
    draws: Draws


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
    # The second is for models that compute with their masks, the third for those that cannot attend through us.
    for masks in (describe_for_layers, own, None):
        with ExitStack() as attempt:
            step = partial(_place, model, attention, key, masks, pairs, attempt, options)
            placed = attempted(step, attention.peers, None if model.device.type == "meta" else model.device)
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


def _place(
    model: PreTrainedModel,
    attention: AttentionFunction,
    key: str,
    masks: Masks | None,
    pairs: list[tuple[DummyBatch, DummyBatch]],
    undo: ExitStack,
    options: Options,
) -> _Placed:
    """Let the model attend by our function, with these masks, and find a plan; `undo` takes back what was put there."""
    own, rehearse = own_attention(model), options.rehearse
    model.eval()
    findings, traces = _explored(model, attention, key, masks, pairs, undo, options)
    if masks is not None:
        register(key, replace(attention, cross_attention=findings.cross_attention))
        release(own, findings.models)
    if rehearse and masks is not None and not all(_is_right(trace.output, trace.dummy) for trace, _ in traces):
        _require_right_kernel(model, attention, key, [pair[0] for pair in pairs])
        raise UnsupportedError("through transformers' attention interface the model gives other numbers")
    run = _trained(model, findings, pairs[-1][0], traces, attention.peers, rehearse)
    findings = run.draws.applied(findings)
    plan = RegionPlan(
        findings.planned(),
        findings.models,
        findings.arguments,
        key if masks is not None else None,
        _NO_LOSS if rehearse else _UNPROVEN,
        random=run.draws.anywhere,
    )
    hooks = Hooks(plan, attention.peers, attention.context)
    if rehearse:
        plan = replace(plan, caches=Refused("not proven yet"))
        findings = prove_stacks(model, hooks, plan, findings, [pair[0] for pair in traces], run)
        plan = replace(plan, stacks=findings.planned())
        model.eval()
        plan = prove_caches(model, hooks, plan, own, traces[0])
    return _Placed(findings, plan, hooks, run.draws)


def _trained(
    model: PreTrainedModel, findings: Findings, dummy: DummyBatch, traces: Traces, peers: Peers, rehearse: bool
) -> TrainingRun:
    """What the whole model gives in training: with labels, if it has a loss for those that fit what it returns."""
    attending = frozenset(call.module for pair in traces for trace in pair for call in trace.attention_calls)
    labelled = with_labels(model, dummy) if rehearse else None

    def with_loss() -> TrainingRun:
        assert labelled is not None
        run = trained(model, findings, labelled, attending)
        if not run.output["loss"].isfinite():
            raise UnsupportedError("such labels give no loss")
        return run

    run = Refused("nothing tells its labels") if labelled is None else attempted(with_loss, peers)
    return trained(model, findings, dummy.inputs, attending) if isinstance(run, Refused) else run


def _explored(
    model: PreTrainedModel,
    attention: AttentionFunction,
    key: str,
    masks: Masks | None,
    pairs: list[tuple[DummyBatch, DummyBatch]],
    undo: ExitStack,
    options: Options,
) -> tuple[Findings, Traces]:
    """What is found in a model that attends by our function, if there are masks for it; its calls are recorded."""
    calls: list[AttentionCall] = []

    def recorded(module: nn.Module, queries: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> Any:
        heads = (queries.shape[1], keys.shape[1])
        calls.append(AttentionCall(module, (queries.shape[0], queries.shape[2]), (keys.shape[0], keys.shape[2]), heads))
        return attention(module, queries, keys, *args, **kwargs)

    if masks is not None:
        attend_by(model, key, recorded, masks, undo)
    # Where weights are gathered by ZeRO-3, no forward can try a layer for itself.
    longest = _AT_ONCE if any(map(is_partitioned, model.parameters())) else options.longest or 0
    attends = masks is not None
    return explore(
        model, pairs, calls, proves=options.rehearse, attends=attends, context=attention.context, longest=longest
    )


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
