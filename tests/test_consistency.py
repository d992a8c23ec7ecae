"""Ranks of a group that were given different batches all get the same error, in seconds."""

from time import monotonic

import pytest
import torch
import torch.distributed as dist
from helpers import world
from models import LLAMA, batch_of

import sp_attention
from sp_attention.distributed.consistency import share_problem
from sp_attention.errors import BatchError, UnsupportedError
from sp_attention.launch import run_ranks


def different_batches() -> dict[str, tuple[str, float]]:
    """The error, and the seconds it took, for every way in which the last of the ranks gets another batch."""
    model = LLAMA.build(torch.float32)
    sp_attention.enable(model, backend="sdpa")
    odd = dist.get_rank() == dist.get_world_size() - 1
    other_id = batch_of("plain", 33)
    other_id["input_ids"][0, 20] += 1
    other_label = batch_of("plain", 33)
    other_label["labels"][1, 3] = -100
    other_mask = batch_of("left-padded", 33)
    other_mask["attention_mask"][0, 12] = 0
    plain = batch_of("plain", 33)
    ways = {
        "id": (plain, other_id),
        "label": (plain, other_label),
        "mask bit": (batch_of("left-padded", 33), other_mask),
        "length": (plain, batch_of("plain", 32)),
        "rows": (plain, batch_of("plain", 33, rows=1)),
        "mask on one rank": (plain, plain | {"attention_mask": torch.ones(2, 33)}),
        "dtype": (plain, plain | {"input_ids": plain["input_ids"].int()}),
        "items": (plain | {"num_items_in_batch": 66}, plain | {"num_items_in_batch": 65}),
    }
    errors = {}
    for way, (ours, theirs) in ways.items():
        start = monotonic()
        with pytest.raises(BatchError) as error:
            model(**(theirs if odd else ours))
        errors[way] = (str(error.value), monotonic() - start)
    # And no rank is left behind: the next good batch works.
    model(**batch_of("plain", 33)).loss.backward()
    return errors


@pytest.mark.parametrize("ranks", [2, 3], ids="P{}".format)
def test_different_batches_are_an_error_on_every_rank(ranks: int) -> None:
    every = run_ranks(ranks, different_batches)
    for errors in every:
        assert {way: text for way, (text, _) in errors.items()} == {way: text for way, (text, _) in every[0].items()}
        assert all(seconds < 5 for _, seconds in errors.values())
    texts = {way: text for way, (text, _) in every[0].items()}
    last = ranks - 1
    for text in texts.values():
        assert text.startswith("the ranks of this sequence-parallel group were given different batches.")
        assert "must pass the same whole batch to the model, which cuts it itself. Give the sampler" in text
    assert f"input_ids differs on rank {last} from rank 0:\n    rank 0: int64 [2, 33], content " in texts["id"]
    assert "labels differs" not in texts["id"]
    assert f"labels differs on rank {last} from rank 0:" in texts["label"]
    assert f"attention_mask differs on rank {last} from rank 0:" in texts["mask bit"]
    assert f"    rank {last}: int64 [2, 32], content " in texts["length"]
    assert f"    rank {last}: int64 [1, 33], content " in texts["rows"]
    assert "    rank 0: absent\n" in texts["mask on one rank"]
    assert f"    rank {last}: int32 [2, 33], content " in texts["dtype"]
    assert f"num_items_in_batch differs on rank {last} from rank 0:\n    rank 0: 66\n" in texts["items"]
    assert f"    rank {last}: 65\n" in texts["items"]


def different_modes() -> str:
    model = LLAMA.build(torch.float32)
    sp_attention.enable(model, backend="sdpa")
    model.train(dist.get_rank() == 0)
    with pytest.raises(BatchError) as error:
        model(**batch_of("plain", 33))
    return str(error.value)


def test_training_on_one_rank_and_evaluating_on_another_is_an_error() -> None:
    assert all("(training) differs on rank 1 from rank 0:" in text for text in run_ranks(2, different_modes))


def a_problem_on_rank_1() -> str:
    peers = world()
    share_problem(None, peers)
    with pytest.raises(UnsupportedError) as error:
        share_problem(UnsupportedError("no moon") if peers.rank == 1 else None, peers)
    return str(error.value)


def test_a_problem_of_one_rank_is_raised_by_all() -> None:
    assert run_ranks(3, a_problem_on_rank_1) == ["no moon"] * 3
