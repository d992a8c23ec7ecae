"""Batches that hardly are any: without targets, and with labels of another shape than the tokens."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TWO_AND_THREE, averages_itself, fsdp, gradients_of, relative_error
from models import LLAMA, MODELS, Tiny, batch_of
from tiled import as_it_is, counted, frozen_head, loss_of, only_head, shifted
from torch import Tensor, nn

import sp_attention
from sp_attention.launch import run_ranks

LENGTH = 21


def none_counted(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch, num_items_in_batch=torch.tensor(0)).loss


def scaled(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """As a gradient scaler does that has grown beyond what there is."""
    return model(**batch).loss * math.inf


# The model, what is done to it, how its loss is computed, its dtype, and options of `enable`.
Case = tuple[Tiny, Callable[[nn.Module], nn.Module], Callable[..., Tensor], torch.dtype, dict[str, Any]]
IN_TILES = {"loss_tile": 4}
CASES: dict[str, Case] = {
    "in tiles": (LLAMA, as_it_is, loss_of, torch.float64, IN_TILES),
    "in tiles, float32": (LLAMA, as_it_is, loss_of, torch.float32, IN_TILES),
    "all at once": (LLAMA, as_it_is, loss_of, torch.float64, {"loss_tile": None}),
    "whole": (LLAMA, as_it_is, loss_of, torch.float64, {"whole_logits": True}),
    "counted": (LLAMA, as_it_is, counted, torch.float64, IN_TILES),
    "none counted": (LLAMA, as_it_is, none_counted, torch.float64, IN_TILES),
    "none counted, all at once": (LLAMA, as_it_is, none_counted, torch.float64, {"loss_tile": None}),
    "shifted": (LLAMA, as_it_is, shifted, torch.float64, IN_TILES),
    "frozen head": (LLAMA, frozen_head, loss_of, torch.float64, IN_TILES),
    "only the head": (LLAMA, only_head, loss_of, torch.float64, IN_TILES),
    "scaled": (LLAMA, as_it_is, scaled, torch.float64, IN_TILES),
    "cut at the head": (MODELS["gpt2"], as_it_is, loss_of, torch.float64, IN_TILES),
    "fsdp2": (LLAMA, partial(fsdp, apart="lm_head"), loss_of, torch.float64, IN_TILES),
    "tied": (MODELS["llama-tied"], as_it_is, loss_of, torch.float64, IN_TILES),
}


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether they are the same numbers, and finite where the others are."""
    finite = theirs.isfinite()
    if not torch.equal(ours.isfinite(), finite):
        return False
    return relative_error(ours.where(finite, 0), theirs.where(finite, 0)) < (
        1e-3 if ours.dtype == torch.float32 else 1e-5
    )


def apart_without_targets(part: slice) -> dict[str, list[str]]:
    """By case, what differs from one process, after a batch in which `part` of the tokens are no targets.

    Its gradients are added to those of a batch with targets.
    """
    found = {}
    for name, (tiny, wrapped, computed, dtype, options) in CASES.items():
        reference, model = tiny.build(dtype), wrapped(tiny.build(dtype))
        if wrapped in (frozen_head, only_head):
            wrapped(reference)
        sp_attention.enable(model, backend="sdpa", **options)
        batch = batch_of("plain", LENGTH)
        batch["labels"][:, part] = -100
        losses = []
        for each in (model, reference):
            each(**batch_of("plain", LENGTH)).loss.backward()
            loss = computed(each, batch)
            loss.backward()
            losses.append(loss.detach())
        if not averages_itself(model):
            sp_attention.average_gradients(model)
        expected, ours = gradients_of(reference), gradients_of(model)
        found[name] = [one for one in expected if not same(ours[one], expected[one])]
        found[name] += ["names"] * (ours.keys() != expected.keys()) + ["loss"] * (not same(*losses))
        if part == slice(None) and name not in ("counted", "scaled"):
            assert losses[1].isnan()
            assert not any(gradient.isnan().any() for gradient in expected.values())
    return found


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
@pytest.mark.parametrize("part", [slice(None), slice(0, 15)], ids=["no targets", "a rank without targets"])
def test_gradients_without_targets_are_those_of_one_process(part: slice, ranks: int) -> None:
    for found in run_ranks(ranks, apart_without_targets, part, timeout=200):
        assert found == {name: [] for name in CASES}


def other_lengths() -> dict[str, tuple[str, str]]:
    """What one process makes of labels of another shape, and what this rank of several does."""
    reference, model = LLAMA.build(), LLAMA.build()
    sp_attention.enable(model, backend="sdpa", **IN_TILES)
    ids = batch_of("plain", 20)["input_ids"]
    twice = torch.cat([ids, ids], 1)
    batches = {
        "longer": {"labels": twice},
        "by one": {"labels": twice[:, :21]},
        "shorter": {"labels": ids[:, :10]},
        "odd": {"labels": twice[:, :39]},
        "shift_labels": {"labels": ids, "shift_labels": twice},
        "shift_labels alone": {"shift_labels": ids},
        "rows": {"labels": ids[:1]},
        "flat": {"labels": ids.flatten()},
        "other rows": {"labels": twice.view(4, 20)},
        "as many": {"labels": ids.view(4, 10)},
        "one-hot": {"labels": F.one_hot(ids, 97).double()},
    }

    def outcome(model: nn.Module, batch: dict[str, Tensor]) -> str:
        try:
            output = model(input_ids=ids, **batch)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "None" if output.loss is None else f"{output.loss.item():.6f}"

    return {name: (outcome(model, batch), outcome(reference, batch)) for name, batch in batches.items()}


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
def test_labels_of_another_shape_are_what_they_are_to_one_process(ranks: int) -> None:
    for found in run_ranks(ranks, other_lengths, timeout=120):
        assert {name: ours for name, (ours, _) in found.items()} == {name: one for name, (_, one) in found.items()}
        assert "ValueError" in found["longer"][0]
