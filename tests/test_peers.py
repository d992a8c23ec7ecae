"""Steps that are watched: one that ends on one rank ends on all."""

import torch
from helpers import world

from sp_attention.distributed.collectives import gather, sum_over_ranks
from sp_attention.launch import run_ranks


def a_step_that_fails_on_one_rank() -> list[str]:
    """What every rank is told of steps that rank 1 ends, before, between and after their collectives, or not."""
    peers = world()
    part = torch.ones(1, len(peers.span(7)), 2)

    def step(failing: int, different: bool = False) -> float:
        for i in range(3):
            if peers.rank == 1 and i == failing:
                raise ValueError("rank 1 is ill")
            total = sum_over_ranks(part[:, :1], peers) if different and peers.rank == 1 else gather(part, 7, peers)
        return float(total.sum())

    told = []
    for failing, different in ((0, False), (1, False), (2, False), (3, True), (3, False)):
        try:
            told.append(str(peers.watched(lambda f=failing, d=different: step(f, d), torch.device("cpu"))))
        except (ValueError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
    # No rank is left behind, and what is not watched is as it was.
    return [*told, str(float(gather(part, 7, peers).sum()))]


def test_a_watched_step_that_ends_on_one_rank_ends_on_all() -> None:
    first, second, third = run_ranks(3, a_step_that_fails_on_one_rank, timeout=30)
    assert second[:3] == ["ValueError: rank 1 is ill"] * 3
    for told in (first, third):
        assert all(text.startswith("RuntimeError: ") and "rank" in text for text in told[:3]), told
    for told in (first, second, third):
        assert told[3].startswith("RuntimeError: "), told
        assert told[4:] == ["14.0", "14.0"]
