"""Where the tokens are, from two tensors of different batch and length, and what is cut there."""

import pytest
import torch

from sp_attention.region.sequence_dims import Along, Extent, along, dims, merged

HERE, THERE = Extent(2, 5), Extent(3, 8)


@pytest.mark.parametrize(
    ("shape", "other", "found"),
    [
        ((2, 5, 7), (3, 8, 7), Along(1)),
        ((5, 2, 7), (8, 3, 7), Along(0)),
        ((4, 2, 5, 7), (4, 3, 8, 7), Along(2)),
        ((2, 1, 5, 5), (3, 1, 8, 8), None),  # S by S, which has no single dim of tokens
        ((10, 7), (24, 7), Along(0, rows=True)),
        ((7, 10), (7, 24), None),
        ((2, 7), (3, 7), None),
        ((5,), (5,), None),
        ((5, 5), (5, 8), Along(1)),  # a size that is S by chance
        ((2, 5), (3, 8, 1), None),
        ((), (), None),
    ],
    ids=str,
)
def test_the_dim_that_follows_the_tokens(shape: tuple[int, ...], other: tuple[int, ...], found: Along | None) -> None:
    assert along(torch.empty(shape), torch.empty(other), HERE, THERE) == found
    assert along(torch.empty(shape), None, HERE, THERE) is None


def test_dims_of_a_tree_are_by_path() -> None:
    tree = ((torch.empty(2, 5, 7),), {"mask": None, "tables": (torch.empty(2, 5), torch.empty(7))})
    other = ((torch.empty(3, 8, 7),), {"mask": None, "tables": (torch.empty(3, 8), torch.empty(7))})
    assert dims(tree, other, HERE, THERE) == {(0, 0): Along(1), (1, "tables", 0): Along(1), (1, "tables", 1): None}


def test_calls_that_contradict_each_other_are_not_merged() -> None:
    assert merged([{(0,): Along(1)}, {(1,): None}]) == {(0,): Along(1), (1,): None}
    assert merged([{(0,): Along(1)}, {(0,): None}]) is None


def test_cuts_are_those_of_every_row() -> None:
    whole = torch.arange(30).view(2, 5, 3)
    cut = Along(1).cut(whole, 1, 3, HERE)
    assert torch.equal(cut, whole[:, 1:3])
    assert cut.is_contiguous()
    rows = Along(0, rows=True).cut(whole.flatten(0, 1), 1, 3, HERE)
    assert torch.equal(rows, whole[:, 1:3].flatten(0, 1))
    assert (Along(1).size(HERE), Along(0, rows=True).size(HERE)) == (5, 10)
