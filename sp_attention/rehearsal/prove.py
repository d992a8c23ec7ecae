"""Put a model's region in place, and prove that the sharded model gives what the whole one gives.

What cannot be proven falls back step by step, slower each time: masks as tensors instead of descriptions; mixers, what
attends, whole layers on whole tensors; a region around every layer instead of one around the stack; and in the end a
refusal.
"""

from collections.abc import Mapping
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
from sp_attention.distributed.sharded_params import is_partitioned
from sp_attention.errors import BackendError, UnsupportedError
from sp_attention.kernels.registry import usable
from sp_attention.region.attention import UlyssesAttention
from sp_attention.region.attn_implementation import Masks, attend_by, own_attention, register, release
from sp_attention.region.forward import Forward
from sp_attention.region.hooks import Hooks
from sp_attention.region.masks import describe_for_layers
from sp_attention.region.plan import RegionPlan
from sp_attention.region.pytree import Path, tensors
from sp_attention.region.sequence_dims import Extent
from sp_attention.rehearsal.classify import EVERYTHING, Findings, LayerFindings, explore
from sp_attention.rehearsal.dummy_inputs import DummyBatch, dummy_batches
from sp_attention.rehearsal.prove_kv_cache import prove_caches
from sp_attention.rehearsal.prove_loss import LossTile, cut_parts, shard_loss
from sp_attention.rehearsal.trace import (
    AttentionCall,
    Trace,
    require_same,
    same,
    same_buffers,
    undisturbed,
    with_gradients,
)

_UNPROVEN = "enable(rehearse=False) did not prove that the loss can be computed from a part of the logits"


def install(
    model: PreTrainedModel,
    attention: UlyssesAttention,
    key: str,
    undo: ExitStack,
    rehearse: bool,
    whole_logits: bool,
    loss_tile: LossTile,
    mlp_tile: int | None,
) -> tuple[Findings, Hooks]:
    """Find, prove and hook the region of a model; whatever is put in place can be undone by `undo`.

    `key` is the name under which transformers gets to know `attention`. With `whole_logits` they never stay sharded.
    Raises UnsupportedError, on every rank.
    """
    peers = attention.peers
    size = max(5, 2 * peers.size + 1)
    narrow, wide = Extent(2, size), Extent(3, size + peers.size + 1)
    with undisturbed(model):
        model.eval()
        problem, pairs = attempted(partial(dummy_batches, model, narrow, wide), peers)
        if pairs is None:
            raise UnsupportedError(_partitioned(model) or problem)
        if model.device.type == "meta":
            pairs = pairs[-1:]  # Whether a mask hides anything cannot be read.
        reasons: dict[str | None, None] = {}
        own = ALL_MASK_ATTENTION_FUNCTIONS.get(str(model.config._attn_implementation), sdpa_mask)
        # Masks as descriptions; for models that compute with their masks, what they get on their own; and for models
        # that cannot attend through us, their own attention.
        for masks in (describe_for_layers, own, None):
            with ExitStack() as attempt:
                step = partial(_place, model, attention, key, masks, pairs, attempt, rehearse)
                reason, done = attempted(step, peers)
                if done is not None:
                    undo.push(attempt.pop_all())
                    findings, hooks, draws = done
                    break
            reasons[reason] = None
        else:
            raise UnsupportedError("\n".join(map(str, reasons)))
        if whole_logits:
            hooks.region = replace(hooks.region, sharded_loss="enable(whole_logits=True)")
        elif rehearse and not draws.after:
            shard_loss(model, hooks, findings, pairs[0][0], undo, loss_tile)
        if isinstance(loss_tile, int) and isinstance(why := hooks.region.head, str):
            loss = hooks.region.sharded_loss
            raise UnsupportedError(
                f"loss_tile={loss_tile}: {f'{why}: {loss}' if isinstance(loss, str) else why}; leave it out"
            )
        if mlp_tile is not None:
            findings = cut_parts(model, hooks, findings, pairs[0][0], mlp_tile)
    return findings, hooks


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
    attention: UlyssesAttention,
    key: str,
    masks: Masks | None,
    pairs: list[tuple[DummyBatch, DummyBatch]],
    undo: ExitStack,
    rehearse: bool,
) -> tuple[Findings, Hooks, Draws]:
    peers, narrow = attention.peers, [pair[0] for pair in pairs]
    own = own_attention(model)
    model.eval()
    attention_calls: list[AttentionCall] = []

    def recorded(module: nn.Module, queries: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> Any:
        heads = (queries.shape[1], keys.shape[1])
        attention_calls.append(
            AttentionCall(module, (queries.shape[0], queries.shape[2]), (keys.shape[0], keys.shape[2]), heads)
        )
        return attention(module, queries, keys, *args, **kwargs)

    if masks is not None:
        attend_by(model, key, recorded, masks, undo)
    findings, runs = explore(model, pairs, attention_calls, proves=rehearse, attends=masks is not None)
    if masks is not None:
        register(key, replace(attention, cross_attention=findings.cross_attention))
        release(own, findings.models)
    if rehearse and masks is not None and not all(_is_right(run.output, run.dummy) for run, _ in runs):
        _require_right_kernel(model, attention, key, narrow)
        raise UnsupportedError("through transformers' attention interface the model gives other numbers")
    draws, last = _draws(model, findings, narrow[-1].inputs)
    findings = replace(findings, separate=findings.separate | draws.between)
    if draws.anywhere:
        findings = replace(findings, embeddings={})  # Dropout may come between them and the first layer.
    region = RegionPlan(
        findings.planned(),
        findings.models,
        findings.arguments,
        key if masks is not None else None,
        _UNPROVEN if not rehearse else "the model has no causal loss, or draws random numbers before it",
        random=draws.anywhere,
    )
    hooks = Hooks(region, peers, attention.current)
    undo.callback(hooks.remove)
    if rehearse:
        hooks.region = replace(hooks.region, no_caches="not proven yet")
        findings = _prove(model, hooks, findings, [pair[0] for pair in runs], last)
        trains = model.training
        model.eval()
        prove_caches(model, hooks, own, runs[0])
        model.train(trains)
    else:
        hooks.install()
    return findings, hooks, draws


def _prove(
    model: PreTrainedModel, hooks: Hooks, findings: Findings, runs: list[Trace], last: tuple[Any, Tensor]
) -> Findings:
    """The findings with as much gathered as the sharded model needs to give what the whole one gives.

    `last` is what the whole model gives for the last run, in the mode that it is in, with its gradients; the runs were
    in evaluation.
    """
    trains = model.training

    def tried(plan: Findings) -> str | None:
        hooks.hook_instead(plan.planned())

        def compare() -> None:
            model.eval()
            for run in runs[:-1]:
                require_same(model(**run.dummy.inputs), run.output, f"{type(model).__name__} sharded")
            model.train(trains)
            output, gradients = with_gradients(model, runs[-1].dummy.inputs)
            require_same(output, last[0], f"{type(model).__name__} sharded")
            gradients = mean_over_ranks(gradients, hooks.peers)
            require_same(gradients, last[1], f"the backward of {type(model).__name__} sharded")

        return attempted(compare, hooks.peers, model.device)[0]

    reason = tried(findings)
    if reason is not None and findings.embeddings:
        findings = replace(findings, embeddings={})
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
    apart = frozenset({*findings.stacks, *findings.idle})
    for plan in (
        findings,
        replace(findings, separate=apart),
        replace(findings, stacks=everything),
        replace(findings, stacks=findings.idle, separate=apart),
    ):
        if not plan.shares_nothing and tried(plan) is None:
            return plan
    raise UnsupportedError(f"{reason}; nothing of it can be shared out exactly")


def _gathering_enough(found: LayerFindings, hooks: Hooks, runs: list[Trace]) -> LayerFindings:
    """The layer with as much gathered as it needs to give alone, sharded, what it gave in the rehearsal."""
    for gathers in range(found.gathers, EVERYTHING + 1):
        found = replace(found, gathers=gathers)
        layer = found.planned()
        stacks = tuple(
            replace(stack, layers=tuple(layer if one.module is layer.module else one for one in stack.layers))
            for stack in hooks.region.stacks
        )
        hooks.hook_instead(stacks)

        def compare(layer: Any = layer) -> None:
            for run in runs:
                for called in run.calls[layer.module]:
                    hooks.forward = Forward(hooks.region.models[0], None, unseen=True)
                    hooks.current.is_known = True
                    args, kwargs = called.inputs
                    require_same(layer.module(*args, **kwargs), called.output, layer.name)

        reason, _ = attempted(compare, hooks.peers, hooks.region.models[0].device)
        hooks.forward, hooks.current.call, hooks.current.is_known = None, None, False
        if reason is None:
            break
    return found


def _is_right(output: Any, dummy: DummyBatch) -> bool:
    return same(_of_real_tokens(output, dummy), _of_real_tokens(dummy.output, dummy))


def _require_right_kernel(
    model: PreTrainedModel, attention: UlyssesAttention, key: str, narrow: list[DummyBatch]
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
