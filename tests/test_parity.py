"""Loss and every gradient of tiny models, sharded over ranks, against one process in float64."""

import pytest
import torch.distributed as dist
from helpers import Selected, largest_error, pair, run_once, too_large
from models import KINDS, MODELS, batch_of
from torch import Tensor, nn

from sp_attention.distributed.partition import span_of

LENGTHS = (32, 33, 7)


def compare(name: str) -> dict[str, float]:
    """For each kind of batch and length, the largest relative error of the loss and of any parameter's gradient."""
    reference, model = pair(MODELS[name])

    def step(each: nn.Module, kind: str, length: int) -> list[Tensor]:
        each.zero_grad()
        output = each(**batch_of(kind, length))
        output.loss.backward()
        if each is model:
            # The loss came from logits of this rank's span.
            assert output.logits.span == span_of(dist.get_rank(), length, dist.get_world_size())
        return [output.loss.detach()]

    return {
        f"{kind}-S{length}": largest_error(reference, model, lambda each, of=(kind, length): step(each, *of))
        for kind in KINDS
        for length in LENGTHS
    }


def compare_all(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {name: compare(name) for name in names}


@pytest.mark.parametrize("ranks", [2, 3, 4], ids="P{}".format)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_one_process(name: str, ranks: int, selected: Selected) -> None:
    for comparison in run_once(ranks, compare_all, selected("name", ranks=ranks), timeout=300):
        assert not too_large(comparison[name], MODELS[name].tolerance)
