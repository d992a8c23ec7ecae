"""Put a model's region in place, and prove that the sharded model gives what the whole one gives.

What cannot be proven falls back step by step, slower each time: masks as tensors instead of descriptions; mixers, what
attends, whole layers on whole tensors; a region around every layer instead of one around the stack; and in the end a
refusal.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from sp_attention import randomness
from sp_attention.agreement import attempted
from sp_attention.attending import Masks, attend_by, own_attention, register, release
from sp_attention.continuing import prove_caches
from sp_attention.dims import Extent
from sp_attention.errors import BackendError, UnsupportedError
from sp_attention.exchange import mean_over_ranks
from sp_attention.logits import ShardedLogits
from sp_attention.loss import sharded_causal_loss
from sp_attention.masks import describe_for_layers
from sp_attention.plan import Region
from sp_attention.recording import Attended, Run, same, same_buffers, undisturbed
from sp_attention.region import TOKENS, Forward, Hooks
from sp_attention.registry import usable
from sp_attention.rehearsal import EVERYTHING, Findings, Found, explore
from sp_attention.specimens import Specimen, specimens
from sp_attention.tiling import Head, liger_does, tile_for
from sp_attention.trees import Path, tensors
from sp_attention.ulysses import UlyssesAttention

# Tokens whose logits the loss makes at a time: None for all.
LossTile = int | Literal["auto"] | None

# Numbers in the gradients that are compared.
_SLOPES = 2**18

_UNPROVEN = "enable(rehearse=False) did not prove that the loss can be computed from a part of the logits"


def install(
    model: PreTrainedModel,
    attention: UlyssesAttention,
    key: str,
    undo: ExitStack,
    rehearse: bool,
    whole_logits: bool,
    loss_tile: LossTile,
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
        problem, pairs = attempted(partial(specimens, model, narrow, wide), peers)
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
            _shard_loss(model, hooks, findings, pairs[0][0], undo, loss_tile)
        if isinstance(loss_tile, int) and isinstance(why := hooks.region.head, str):
            raise UnsupportedError(f"loss_tile={loss_tile}: {why}; leave it out")
    return findings, hooks


def _partitioned(model: PreTrainedModel) -> str | None:
    """What to do if the model cannot run since DeepSpeed has cut up its weights, and no engine gathers them."""
    # Where DeepSpeed keeps the size of a parameter that it left empty.
    if not any(parameter.numel() < getattr(parameter, "ds_numel", 0) for parameter in model.parameters()):
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
    """Where random numbers are drawn, and the model's output with slopes; in training unless there are any."""
    seen: list[tuple[str | None, list[Tensor]]] = []
    handles = []
    for name, layers in findings.stacks.items():
        for found in layers:
            module = found.layer.module

            def note(*_: Any, name: str = name) -> None:
                seen.append((name, randomness.states(model.device)))

            handles += [module.register_forward_pre_hook(note), module.register_forward_hook(note)]
    model.train()
    before = randomness.states(model.device)
    try:
        with same_buffers(model):
            result = _with_slopes(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    after = randomness.states(model.device)
    if randomness.are_equal(before, after):
        return Draws(), result
    model.eval()
    # Two notes a layer: what lies between the second of one and the first of the next is the model's own.
    gaps = [(one, other) for one, other in zip(seen[1::2], seen[2::2], strict=False) if one[0] == other[0]]
    between = frozenset(str(one[0]) for one, other in gaps if not randomness.are_equal(one[1], other[1]))
    draws = Draws(True, between, not seen or not randomness.are_equal(seen[-1][1], after))
    return draws, _with_slopes(model, inputs)


def _place(
    model: PreTrainedModel,
    attention: UlyssesAttention,
    key: str,
    masks: Masks | None,
    pairs: list[tuple[Specimen, Specimen]],
    undo: ExitStack,
    rehearse: bool,
) -> tuple[Findings, Hooks, Draws]:
    peers, narrow = attention.peers, [pair[0] for pair in pairs]
    own = own_attention(model)
    model.eval()
    attended: list[Attended] = []

    def recorded(module: nn.Module, queries: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> Any:
        heads = (queries.shape[1], keys.shape[1])
        attended.append(Attended(module, (queries.shape[0], queries.shape[2]), (keys.shape[0], keys.shape[2]), heads))
        return attention(module, queries, keys, *args, **kwargs)

    if masks is not None:
        attend_by(model, key, recorded, masks, undo)
    findings, runs = explore(model, pairs, attended, proves=rehearse, attends=masks is not None)
    if masks is not None:
        register(key, replace(attention, over_memory=findings.over_memory))
        release(own, findings.models)
    if rehearse and masks is not None and not all(_is_right(run.output, run.specimen) for run, _ in runs):
        _require_right_kernel(model, attention, key, narrow)
        raise UnsupportedError("through transformers' attention interface the model gives other numbers")
    draws, last = _draws(model, findings, narrow[-1].inputs)
    findings = replace(findings, separate=findings.separate | draws.between)
    region = Region(
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
        prove_caches(model, hooks, own, narrow[0])
        model.train(trains)
    else:
        hooks.install()
    return findings, hooks, draws


def _prove(
    model: PreTrainedModel, hooks: Hooks, findings: Findings, runs: list[Run], last: tuple[Any, Tensor]
) -> Findings:
    """The findings with as much gathered as the sharded model needs to give what the whole one gives.

    `last` is what the whole model gives for the last run, in the mode that it is in, with its slopes; the runs were in
    evaluation.
    """
    trains = model.training

    def tried(plan: Findings) -> str | None:
        hooks.hook_instead(plan.planned())

        def compare() -> None:
            model.eval()
            for run in runs[:-1]:
                _require_same(model(**run.specimen.inputs), run.output, f"{type(model).__name__} sharded")
            model.train(trains)
            output, slopes = _with_slopes(model, runs[-1].specimen.inputs)
            _require_same(output, last[0], f"{type(model).__name__} sharded")
            slopes = mean_over_ranks(slopes, hooks.peers)
            _require_same(slopes, last[1], f"the backward of {type(model).__name__} sharded")

        return attempted(compare, hooks.peers, model.device)[0]

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


def _with_slopes(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """A model's output, and the gradients of some number made of it with respect to its small parameters, in a row.

    Small, so that they take no memory, while the path to them leads through all of the model. There are none where an
    engine shards the parameters, since backward would set the engine to work.
    """
    parameters = [one for one in model.parameters() if one.requires_grad and one.is_floating_point()]
    ordered = sorted(parameters, key=Tensor.numel)
    totals = accumulate(map(Tensor.numel, ordered))
    small = [parameter for parameter, total in zip(ordered, totals, strict=True) if total <= _SLOPES]
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    if not small or sharded or model.device.type == "meta":
        return model(**inputs), torch.zeros(0, device=model.device)
    with torch.enable_grad():
        output = model(**inputs)
        number = torch.zeros((), dtype=torch.float64, device=model.device)
        for _, tensor in tensors(output):
            if tensor.requires_grad:
                weights = torch.arange(tensor.numel(), device=tensor.device).cos().view(tensor.shape)
                number = number + torch.where(tensor.isfinite(), tensor, 0).mul(weights).double().sum()
        slopes = torch.autograd.grad(number, small, allow_unused=True)
    found = [torch.zeros_like(one) if slope is None else slope for one, slope in zip(small, slopes, strict=True)]
    return output, torch.cat([one.detach().to(model.dtype).flatten() for one in found])


def _gathering_enough(found: Found, hooks: Hooks, runs: list[Run]) -> Found:
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
                    _require_same(layer.module(*args, **kwargs), called.output, layer.name)

        reason, _ = attempted(compare, hooks.peers, hooks.region.models[0].device)
        hooks.forward, hooks.current.call, hooks.current.is_known = None, None, False
        if reason is None:
            break
    return found


def _shard_loss(
    model: PreTrainedModel,
    hooks: Hooks,
    findings: Findings,
    specimen: Specimen,
    undo: ExitStack,
    loss_tile: LossTile,
) -> None:
    """Let logits stay sharded in training if all that follows the last stack works with a part of the sequence."""
    before = [name for name, extent in findings.extents.items() if extent == specimen.extent]
    if model.loss_function is not ForCausalLMLoss or "labels" not in signature(model.forward).parameters or not before:
        return
    name = next((name for name in TOKENS if name in specimen.inputs), None)
    if name is None:
        return
    ids = specimen.inputs[name]
    padding = specimen.inputs.get(name.replace("input_ids", "attention_mask"))
    labels = ids if padding is None or padding.shape != ids.shape else ids.masked_fill(padding == 0, -100)
    batch = {**specimen.inputs, "labels": labels}
    _, whole = attempted(lambda: model(**batch), hooks.peers)
    if whole is None:
        return  # Such a model wants other labels.
    loss = sharded_causal_loss(ForCausalLMLoss, hooks.peers, lambda: hooks.forward.held if hooks.forward else None)
    own = vars(model).get("_loss_function")
    model.loss_function = loss
    undo.callback(lambda: delattr(model, "_loss_function") if own is None else setattr(model, "loss_function", own))
    hooks.region = replace(hooks.region, sharded_loss=loss, before_loss=before[-1])
    span = hooks.peers.span(specimen.extent.length)

    def compare() -> None:
        output = model(**batch)
        mine = {"loss": whole["loss"], "logits": whole["logits"][:, span.start : span.stop]}
        if not isinstance(output["logits"], ShardedLogits):
            raise UnsupportedError("each layer gathers what it returns")
        if not same({"loss": output["loss"], "logits": output["logits"].part}, mine):
            raise UnsupportedError("the model computes another loss from a part of the sequence")

    with hooks.only_loss():  # The model may be in evaluation, so that it draws no random numbers.
        reason, _ = attempted(compare, hooks.peers, model.device)
        whole_because = reason and f"computed from a part of the sequence: {reason}"
        hooks.region = replace(hooks.region, sharded_loss=whole_because or loss)
        if reason is None:
            _tile_loss(model, hooks, batch, loss_tile)


def _tile_loss(model: PreTrainedModel, hooks: Hooks, batch: Mapping[str, Any], tile: LossTile) -> None:
    """Let the loss make logits in tiles, if nothing comes between the head and it, and the numbers are the same."""
    if tile is None:
        hooks.region = replace(hooks.region, head="enable(loss_tile=None)")
        return
    reason, found = attempted(partial(_head_of, model, batch), hooks.peers, model.device)
    if found is not None:
        module, vocabulary = found
        output, slopes = _with_slopes(model, batch)
        expected = {"loss": output["loss"], "logits": output["logits"].part, "slopes": slopes}
        tiled = Head(module, vocabulary, tile_for(vocabulary) if tile == "auto" else tile)

        def compare() -> None:
            output, slopes = _with_slopes(model, batch)
            ours = {"loss": output["loss"], "logits": output["logits"].part, "slopes": slopes}
            _require_same(ours, expected, f"{type(model).__name__} with its loss in tiles")

        for liger in (True, False) if liger_does(module) else (False,):
            hooks.region = replace(hooks.region, head=replace(tiled, liger=liger, tile=2))
            hooks.hook_instead(hooks.region.stacks)
            reason, _ = attempted(compare, hooks.peers, model.device)
            hooks.region = replace(hooks.region, head=replace(tiled, liger=liger))
            if reason is None:
                break
    if reason is not None:
        hooks.region = replace(hooks.region, head=reason)
    hooks.hook_instead(hooks.region.stacks)


def _head_of(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """The outermost module whose result is what the loss is given, but for its dtype, and V."""
    loss, given = model.loss_function, list[Tensor]()
    calls: list[tuple[nn.Module, Any, Any]] = []

    def noted(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(logits)
        return loss(logits, *args, **kwargs)

    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, result: calls.append((module, (args, kwargs), result)), with_kwargs=True
        )
        for module in model.modules()
    ]
    model.loss_function = noted
    try:
        model(**batch)
    finally:
        model.loss_function = loss
        for handle in handles:
            handle.remove()
    if len(given) != 1:
        raise UnsupportedError("the loss is not computed once")
    heads = [(module, inputs) for module, inputs, result in calls if _is_but_for_dtype(result, given[0])]
    if not heads:
        raise UnsupportedError("the model computes with what its head returns, before the loss")
    head, inputs = heads[-1]
    before = dict(tensors(inputs))
    if [one for one, *_ in calls].count(head) != 1 or before.keys() != {(0, 0)} or before[0, 0].dim() != 3:
        raise UnsupportedError(f"{type(head).__name__} is not called once, with hidden states and nothing else")
    return head, given[0].shape[-1]


def _is_but_for_dtype(result: Any, logits: Tensor) -> bool:
    """Whether logits are the result of a module: not only equal, since a softcap may change small numbers hardly."""
    if not isinstance(result, Tensor) or result.shape != logits.shape or logits.dim() != 3:
        return False
    return result is logits or (result.dtype != logits.dtype and torch.equal(result.to(logits.dtype), logits))


def _is_right(output: Any, specimen: Specimen) -> bool:
    return same(_of_real_tokens(output, specimen), _of_real_tokens(specimen.output, specimen))


def _require_right_kernel(
    model: PreTrainedModel, attention: UlyssesAttention, key: str, narrow: list[Specimen]
) -> None:
    """Raise BackendError if it is for the kernel alone that the model gives other numbers: with another it does not."""
    for other in usable(model.device.type):
        register(key, replace(attention, backend=other))
        try:
            right = all(_is_right(model(**specimen.inputs), specimen) for specimen in narrow)
        except Exception:  # of a kernel that nobody asked for
            continue
        if right:
            raise BackendError(
                f"with kernel {attention.backend.kernel!r} the model gives other numbers than on its own, and not with "
                f'{other.kernel!r}: use enable(model, backend="{other.kernel}")'
            )


def _of_real_tokens(output: Any, specimen: Specimen) -> dict[Path, Tensor]:
    """A model's output without what it gives for padding, where kernels may do as they like."""
    found = dict(tensors(output))
    for name, padding in specimen.inputs.items():
        if name.endswith("attention_mask"):
            for path, tensor in found.items():
                if tensor.shape[:2] == padding.shape:
                    found[path] = tensor * padding.view(*padding.shape, *[1] * (tensor.dim() - 2)).to(tensor.dtype)
    return found


def _require_same(output: Any, expected: Any, what: str) -> None:
    if not same(output, expected):
        raise UnsupportedError(f"{what} gives other numbers than the model on its own")
