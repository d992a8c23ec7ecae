"""One model alone and sequence-parallel, batch by batch: loss, outputs and every gradient, and where they part."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.cli.differences import Values, error_of, largest_error, matching_part
from sp_attention.cli.outcomes import (
    DIFFERS,
    EXACT,
    FAILED,
    NOT_COMPARABLE,
    REFUSED,
    WORST_FIRST,
    Comparison,
    Parting,
    Verdict,
)
from sp_attention.region.pytree import Path, tensors
from sp_attention.region.versions import checkpoint_activations, keep_activations
from sp_attention.rehearsal.findings import parts

# The largest relative error that is still the same number. Models in float64 compute some parts in float32.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
# Up to here an error may still be the model's own rounding, in the parts that it computes in float32.
ROUNDING = 1e-2

# The variants with gradient checkpointing, and whether it is re-entrant.
CHECKPOINTING = {"checkpointing": False, "reentrant-checkpointing": True}

Batch = dict[str, Any]


def tolerance(model: PreTrainedModel) -> float:
    """The largest relative error that counts as exact for a model of this dtype."""
    return TOLERANCES.get(model.dtype, 2e-2)


def compare(
    model: PreTrainedModel,
    batches: dict[str, Batch],
    backend: str,
    variants: tuple[str, ...] = (),
    told: Callable[[str], None] = lambda kind: None,
) -> Comparison:
    """Run every batch through a copy of the model and through the model on all ranks; the same result on every rank.

    model: whole on every rank, with equal weights. variants: of `VARIANTS`, each run beside the plain training step.
    told: is called with the kind of each batch before it runs.
    """
    reference = copy.deepcopy(model)
    told("enable")
    try:
        handle = sp_attention.enable(model, backend)
    except sp_attention.UnsupportedError as error:
        return Comparison((), refused=str(error))
    with handle:
        verdicts = []
        for variant in ("", *variants):
            for kind, batch in batches.items():
                name = f"{kind}, {variant}" if variant else kind
                told(name)
                verdict = merged(_compared(reference, model, batch, variant))
                if verdict.outcome == DIFFERS and (verdict.error or 0.0) <= ROUNDING:
                    # By more than the tolerance, and yet the same, where the model itself is no more precise.
                    rounding = _rounding(reference, batch, variant)
                    verdict = replace(verdict, outcome=EXACT) if (verdict.error or 0.0) <= 10 * rounding else verdict
                if verdict.outcome == DIFFERS and _is_random(reference, batch, variant):
                    verdict = Verdict("", NOT_COMPARABLE, reason="in one process it gives other numbers each time")
                if verdict.outcome == DIFFERS:
                    # Only now, since all ranks must run the forwards that it takes.
                    first = _parting(reference, model, batch, variant)
                    verdict = merged(replace(verdict, first=first))
                verdicts.append(replace(verdict, kind=name))
        return Comparison(tuple(verdicts), handle.backend.kernel, parts=parts_of(handle))


def parts_of(handle: sp_attention.Handle) -> dict[str, list[str]]:
    """The parts of the layers of a model, and of those beside it, by what they are."""
    every: dict[str, list[str]] = {}
    for one in (handle, *handle.others.values()):
        for kind, names in ({} if one.findings is None else parts(one.findings)).items():
            every[kind] = list(dict.fromkeys([*every.get(kind, []), *names]))
    return every


def _compared(reference: PreTrainedModel, model: PreTrainedModel, batch: Batch, variant: str) -> Verdict:
    """This rank's verdict."""
    try:
        expected = _values(reference, batch, variant)
    except Exception as error:  # the model itself does not take this batch
        return Verdict("", NOT_COMPARABLE, reason=f"in one process: {_told(error)}")
    if not expected["loss"].isfinite():
        return Verdict("", NOT_COMPARABLE, reason="in one process the loss is not finite")
    try:
        values = _values(model, batch, variant)
    except sp_attention.UnsupportedError as error:
        return Verdict("", REFUSED, reason=str(error))
    except Exception as error:
        return Verdict("", FAILED, reason=_told(error))
    largest, where = largest_error(values, expected)
    if largest <= tolerance(model):
        return Verdict("", EXACT, largest, where)
    return Verdict("", DIFFERS, largest, where)


def _rounding(reference: PreTrainedModel, batch: Batch, variant: str) -> float:
    """How far the model in one process is from itself when its weights change in what float32 barely holds."""
    expected = _values(reference, batch, variant)
    weights = [parameter.detach().clone() for parameter in reference.parameters()]
    shake(reference, 1e-8)
    try:
        return largest_error(_values(reference, batch, variant), expected)[0]
    finally:
        with torch.no_grad():
            for parameter, weight in zip(reference.parameters(), weights, strict=True):
                parameter.copy_(weight)


def _is_random(reference: PreTrainedModel, batch: Batch, variant: str) -> bool:
    """Whether the model in one process is not itself the second time: alike on all ranks."""
    first, second = (_values(reference, batch, variant) for _ in range(2))
    is_same = largest_error(second, first)[0] <= tolerance(reference)
    return merged(Verdict("", DIFFERS if is_same else NOT_COMPARABLE)).outcome == NOT_COMPARABLE


def shake(model: PreTrainedModel, by: float) -> None:
    """Change every weight by about so much of it, the same way every time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _values(model: PreTrainedModel, batch: Batch, variant: str) -> Values:
    """Everything that is compared of one training step, or of one evaluation, by name; logits may be this rank's."""
    with _varied(model, variant):
        output = _forward(model, batch, variant)
        logits = output.get("logits")
        values = {
            ".".join(map(str, path)): _of_real_tokens(tensor.detach(), batch)
            for path, tensor in tensors(dict(output) | {"logits": getattr(logits, "part", logits)})
            if path[0] in ("loss", "logits", "start_logits", "end_logits") or "hidden_state" in str(path[0])
        }
        if "loss" not in values:
            raise ValueError("the model gives no loss for this batch")
        if variant == "no-grad":
            return values
        loss = output["loss"]
        if variant == "two-forwards":
            loss = loss + _forward(model, _turned(batch), variant)["loss"]
        model.zero_grad(set_to_none=True)
        loss.backward()
        # The reference has its whole gradient on every rank already, which the mean leaves as it is.
        sp_attention.average_gradients(model)
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return values | gradients


def _of_real_tokens(value: Tensor, batch: Batch) -> Tensor:
    """Zero where a token is padding: what a query gives that sees nothing is not the same for all kernels, nor used."""
    real = [batch.get(name) for name in ("decoder_attention_mask", "attention_mask")]
    real += [batch["labels"] != -100] if "labels" in batch else []
    for mask in real:
        if isinstance(mask, Tensor) and mask.dim() == 2 and value.dim() >= 2:
            # Nor the first real token, for which a decoder that gets the encoder's tokens moved by one has padding.
            moved = mask.roll(1, dims=1)
            moved[:, 0] = 1
            matching = matching_part(mask * moved, value.shape[:2])
            if matching is not None:
                return value.masked_fill(matching.view(*matching.shape, *[1] * (value.dim() - 2)) == 0, 0)
    return value


def _forward(model: PreTrainedModel, batch: Batch, variant: str) -> Any:
    # The labels anew: some models write into what they are given.
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
    if variant == "hidden-states":
        inputs["output_hidden_states"] = True
    with torch.set_grad_enabled(variant != "no-grad"):
        return model(**inputs)


def _turned(batch: Batch) -> Batch:
    """Another batch of the same shapes: the rows in reverse order, and their tokens too where nothing is padded."""
    return {name: value.flip(0) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def _varied(model: PreTrainedModel, variant: str) -> Iterator[None]:
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    if variant in CHECKPOINTING:
        checkpoint_activations(model, {"use_reentrant": CHECKPOINTING[variant]})
    if variant == "frozen":
        for parameter in list(model.parameters())[::2]:
            parameter.requires_grad_(False)
    model.train(variant != "no-grad")
    try:
        yield
    finally:
        if variant in CHECKPOINTING:
            keep_activations(model)
        for parameter, was in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(was)
        model.train()


def _parting(reference: PreTrainedModel, model: PreTrainedModel, batch: Batch, variant: str) -> Parting | None:
    """Where this rank's forward first leaves that of one process; None when it does not and only gradients differ."""
    try:
        with _varied(reference, variant), _varied(model, variant):
            expected, got = _outputs(reference, batch, variant), _outputs(model, batch, variant)
    except Exception:  # what runs without hooks need not run with them
        return None
    for position, (call, outputs) in enumerate(expected.items()):
        for path, value in got.get(call, {}).items():
            if path not in outputs or matching_part(outputs[path], value.shape) is None:
                continue  # something inside attention, of other heads
            error = error_of(value, outputs[path])
            if error is not None and not error <= tolerance(model):
                return Parting(call[0] or type(model).__name__, error, position)
    return None


def _outputs(model: PreTrainedModel, batch: Batch, variant: str) -> dict[tuple[str, int], dict[Path, Tensor]]:
    """What every module gave at each of its calls, in the order in which they ended."""
    outputs: dict[tuple[str, int], dict[Path, Tensor]] = {}
    calls: dict[str, int] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] = calls.get(name, -1) + 1
            floats = {path: tensor.detach().clone() for path, tensor in tensors(output) if tensor.is_floating_point()}
            outputs[name, calls[name]] = floats

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        _forward(model, batch, variant)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def merged(mine: Verdict) -> Verdict:
    """One verdict of all ranks: the worst of them, with the largest error and the earliest parting of any."""
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    worst = min(everyone, key=lambda verdict: (WORST_FIRST.index(verdict.outcome), -(verdict.error or 0.0)))
    partings = [verdict.first for verdict in everyone if verdict.first is not None]
    return replace(worst, first=min(partings, key=lambda parting: parting.call, default=None))
