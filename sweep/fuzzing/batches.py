"""Whole batches of random tokens, with masks and labels of every kind; the same on every rank of a group."""

import random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sweep.fuzzing.case import Case
from sweep.fuzzing.models import CLASSES, SOUND_BINS, SOUNDS, VOCABULARY

Batch = dict[str, Any]
IGNORED = -100


def batch_of(case: Case, group: int, number: int) -> Batch:
    """The batch of this number for a group of ranks. The first one is as long as the case says, others as it comes."""
    die = random.Random(f"{case.seed}, {group}, {number}")
    generator = torch.Generator().manual_seed(die.randrange(2**32))
    first = number == 0 or die.random() < 0.5
    length = max(1, case.length - group) if first else die.randint((case.length + 1) // 2, case.length)
    if case.kind.family in ("seq2seq", "speech"):
        return _seq2seq(case, length, die, generator) | dict(case.kind.given)
    batch = _text(case, length, die, generator)
    if case.kind.family == "classes":
        labels = torch.randint(CLASSES, (case.rows,), generator=generator)
        return batch | ({"labels": labels} if case.labels == "all" else {})
    return batch | _labels(case, batch, generator) | dict(case.kind.given)


def real_tokens(batch: Batch) -> Tensor | None:
    """[rows, S] of bool, None where all are: what a padding token gives is nobody's concern."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def prompt_of(batch: Batch) -> Batch:
    """What of a batch is there to generate from."""
    mask = real_tokens(batch)
    return {"input_ids": batch["input_ids"]} | ({} if mask is None else {"attention_mask": batch["attention_mask"]})


def _ids(rows: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def _text(case: Case, length: int, die: random.Random, generator: torch.Generator) -> Batch:
    rows = case.rows
    batch: Batch = {"input_ids": _ids(rows, length, generator)}
    if case.mask in ("left", "right"):
        # Somewhere there is padding, where there is room for it.
        padding = torch.tensor([die.randint(int(row == 0 and length > 1), length - 1) for row in range(rows)])
        places = torch.arange(length)
        mask = places >= padding[:, None] if case.mask == "left" else places < length - padding[:, None]
        batch["attention_mask"] = mask.long()
    elif case.mask == "packed":
        starts = [sorted({0, *(die.randrange(length) for _ in range(2))}) for _ in range(rows)]
        batch["position_ids"] = torch.stack([_positions(row, length) for row in starts])
        batch["use_cache"] = False
    elif case.mask.startswith("4-D"):
        seen = torch.rand(rows, 1, length, length, generator=generator) < 0.7
        seen = (seen | torch.eye(length, dtype=torch.bool)).tril()
        dtype = getattr(torch, case.dtype)
        lowest = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        batch["attention_mask"] = seen if case.mask == "4-D bool" else lowest
    return batch


def _positions(starts: list[int], length: int) -> Tensor:
    ends = [*starts[1:], length]
    return torch.cat([torch.arange(end - start) for start, end in zip(starts, ends, strict=True)])


def _labels(case: Case, batch: Batch, generator: torch.Generator) -> Batch:
    """Of text, for the tokens themselves: a causal model moves them itself."""
    if case.labels == "none":
        return {}
    labels = batch["input_ids"].clone()
    real = real_tokens(batch)
    if real is not None:
        # Nor what padding would predict.
        before = pad(real, (1, 0), value=True)[:, :-1] if case.kind.family == "causal" else real
        labels[~(real & before)] = IGNORED
    if case.labels in ("some", "num_items_in_batch"):
        labels[torch.rand(labels.shape, generator=generator) < 0.6] = IGNORED
    elif case.labels == "all ignored":
        labels[:] = IGNORED
    if case.labels == "num_items_in_batch":
        return {"labels": labels, "num_items_in_batch": torch.tensor(2 * labels.numel() + 1)}
    if case.labels == "shift_labels":
        return {"labels": labels, "shift_labels": pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()}
    return {"labels": labels}


def _seq2seq(case: Case, length: int, die: random.Random, generator: torch.Generator) -> Batch:
    """An encoder's tokens or sounds, and labels for a decoder, or its tokens where there are to be no labels."""
    if case.kind.family == "speech":
        batch: Batch = {"input_features": torch.randn(case.rows, SOUND_BINS, 2 * SOUNDS, generator=generator)}
        batch["input_features"] = batch["input_features"].to(getattr(torch, case.dtype))
        decoded = length
    else:
        batch = _text(case, length, die, generator)
        decoded = die.randint(1, case.length)
    labels = _ids(case.rows, decoded, generator)
    if case.labels == "none":
        return batch | {"decoder_input_ids": labels}
    if case.labels == "some":
        labels[torch.rand(labels.shape, generator=generator) < 0.6] = IGNORED
    elif case.labels == "all ignored":
        labels[:] = IGNORED
    return batch | {"labels": labels}
