"""A reduced model together with batches that it takes, as found by trying them."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from sp_attention.cli.reduced.batches import Batch, candidates, with_pixels
from sp_attention.cli.reduced.configuration import NotBuildableError
from sp_attention.cli.reduced.model import build


def prepare(
    model_type: str, task: str, length: int, thresholds: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, dict[str, Batch]]:
    """A small model and batches by kind, the same every time; in float64, or float32 where its code needs that.

    Some code masks with the lowest float64, which a softmax in float32 takes for minus infinity: no number comes of
    padding then. `thresholds` as for `build`. Raises NotBuildableError with the reason when there is no such model or
    it takes no batch.
    """
    found: list[tuple[PreTrainedModel, dict[str, Batch]]] = []
    reasons: list[str] = []
    for dtype in (torch.float64, torch.float32):
        model = build(model_type, task, dtype, thresholds)
        try:
            found.append((model, batches_for(model, task, length)))
        except NotBuildableError as error:
            reasons.append(str(error))
            continue
        if _finite(*found[-1]) == len(found[-1][1]):
            return found[-1]
    if not found:
        raise NotBuildableError(reasons[0])
    return max(found, key=lambda pair: _finite(*pair))


def _finite(model: PreTrainedModel, batches: dict[str, Batch]) -> int:
    """For how many kinds of batches the model gives a loss that is a number."""
    count = 0
    for batch in batches.values():
        with torch.no_grad(), suppress(Exception):  # it may not take this kind
            count += int(model(**batch)["loss"].isfinite())
    return count


def batches_for(model: PreTrainedModel, task: str, length: int) -> dict[str, Batch]:
    """Batches of every kind that the model may take; the first is one that it does take."""
    reasons: list[str] = []
    for batches in candidates(model, task, length):
        try:
            with torch.no_grad():
                output = model(**batches["plain"])
        except Exception as error:  # of any kind: the code of some model, given what it does not expect
            reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:300])
            continue
        if output.get("loss") is None:
            reasons.append("it gives no loss for labels")
            continue
        pixels = with_pixels(model, task, length) if task == "image-text-to-text" else None
        return batches | ({"pixels": pixels} if pixels is not None else {})
    pixels = with_pixels(model, task, length) if task == "image-text-to-text" else None
    if pixels is not None:  # it does not read without seeing
        return {"pixels": pixels}
    raise NotBuildableError(reasons[0] if reasons else "no batch can be made for it")
