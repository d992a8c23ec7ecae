"""Loss and every gradient of tiny models, sharded over ranks, against one process in float64."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from models import KINDS, MODELS, batch_of

import sp_attention
from sp_attention.distributed.partition import span_of
from sp_attention.launch import run_ranks

LENGTHS = (32, 33, 7)


def compare(name: str) -> dict[str, float]:
    """For each kind of batch and length, the largest relative error of the loss and of any parameter's gradient."""
    tiny = MODELS[name]
    reference, model = tiny.build(), tiny.build()
    sp_attention.enable(model, backend="sdpa")
    errors = {}
    for kind in KINDS:
        for length in LENGTHS:
            batch = batch_of(kind, length)
            losses = []
            for each in (reference, model):
                each.zero_grad()
                output = each(**batch)
                output.loss.backward()
                losses.append(output.loss.detach())
            # The loss came from logits of this rank's span.
            assert output.logits.span == span_of(dist.get_rank(), length, dist.get_world_size())
            sp_attention.average_gradients(model)
            pairs = [(losses[1], losses[0])]
            for (parameter_name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None), parameter_name
                if theirs.grad is not None:
                    pairs.append((ours.grad, theirs.grad))
            errors[f"{kind}-S{length}"] = max(relative_error(*pair) for pair in pairs)
    return errors


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    scale = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / (scale if scale > 0 else 1.0)


def compare_all() -> dict[str, dict[str, float]]:
    return {name: compare(name) for name in MODELS}


@cache
def comparisons(ranks: int) -> list[dict[str, dict[str, float]]]:
    return run_ranks(ranks, compare_all, timeout=300)


@pytest.mark.parametrize("ranks", [2, 3, 4], ids="P{}".format)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_one_process(name: str, ranks: int) -> None:
    for comparison in comparisons(ranks):
        errors = comparison[name]
        wrong = {case: error for case, error in errors.items() if not error < MODELS[name].tolerance}
        assert not wrong
