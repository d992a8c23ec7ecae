"""Steps that are watched: one that ends on one rank ends on all."""

import torch
from helpers import world

from sp_attention.distributed.collectives import gather, sum_over_ranks
from sp_attention.distributed.consistency import attempted
from sp_attention.errors import Refused
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


def a_step_that_fails_outside_of_one_within() -> list[str]:
    """What every rank is told of steps with a step inside that is tried, where rank 1 fails around it, or in it."""
    peers, device = world(), torch.device("cpu")
    part = torch.ones(1, len(peers.span(7)), 2)

    def fails_at(place: str, failing: str) -> None:
        if peers.rank == 1 and place == failing:
            raise ValueError(f"rank 1 is ill {place}")

    def inside(failing: str) -> None:
        gather(part, 7, peers)
        fails_at("inside", failing)

    def step(failing: str) -> str:
        fails_at("before", failing)
        tried = attempted(lambda: inside(failing), peers, device)
        fails_at("after", failing)
        gather(part, 7, peers)
        return tried.reason if isinstance(tried, Refused) else "well"

    told = []
    for failing in ("before", "inside", "after", "nowhere"):
        result = attempted(lambda failing=failing: step(failing), peers, device)
        told.append(result.reason if isinstance(result, Refused) else result)
    return [*told, str(float(gather(part, 7, peers).sum()))]


def test_a_step_within_a_step_ends_where_another_rank_has_ended_that_around_it() -> None:
    ill = "rank 1: ValueError: rank 1 is ill"
    for told in run_ranks(3, a_step_that_fails_outside_of_one_within, timeout=30):
        assert told == [f"{ill} before", f"{ill} inside", f"{ill} after", "well", "14.0"]


def test_a_watched_step_that_ends_on_one_rank_ends_on_all() -> None:
    first, second, third = run_ranks(3, a_step_that_fails_on_one_rank, timeout=30)
    assert second[:3] == ["ValueError: rank 1 is ill"] * 3
    for told in (first, third):
        assert told[:3] == ["PartedError: the ranks part here: rank 1 ended this step"] * 3
    for told in (first, second, third):
        assert told[3] == "PartedError: the ranks part here: they come to different collectives"
        assert told[4:] == ["14.0", "14.0"]
