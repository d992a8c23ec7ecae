"""What masks are described as, beside the comparison with transformers' own masks in tests/test_masks.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from thread_ranks import OnADevice
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from sp_attention.region.masks import Described, describe, describe_for_layers, element_by_element

LENGTH = 8
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 5, [0] * 8])
RISING = torch.tensor([[*range(3), *range(5)], [*range(8)]])


def assert_same(function: Callable[..., Any], queries: int = LENGTH, keys: int = LENGTH, **asked: Any) -> Any:
    """The description, which must be dense what transformers makes of the same."""
    with OnADevice():
        mask = describe(2, queries, keys, mask_function=function, **asked)
    expected = sdpa_mask(2, queries, keys, mask_function=function, allow_is_causal_skip=False, **asked)
    assert torch.equal(mask.dense().expand_as(expected), expected)
    assert mask.documents is None or bool((mask.documents.diff() >= 0).all())
    return mask


def test_layers_are_given_what_is_no_dataclass() -> None:
    padding = torch.tensor([[True] * 7 + [False], [True] * 8])
    described = describe_for_layers(2, 5, LENGTH, 3, attention_mask=padding, device="meta", unknown=1)
    assert isinstance(described, Described)
    assert isinstance(described, BlockMask)
    mask = described.mask
    assert (mask.batch, mask.query_length, mask.key_length, mask.offset) == (2, 5, LENGTH, 3)
    assert mask.device == torch.device("meta")
    assert (described.shape, described.ndim) == ((2, 1, 5, LENGTH), 4)
    assert described.contiguous() is described
    told = described.told
    assert told.pop("padding") is mask.padding
    assert told == {"shape": "(2, 1, 5, 8)", "causal": True, "window": None, "offset": 3, "documents": None}


def test_by_default_it_is_causal_and_all_are_real() -> None:
    mask = describe(2, LENGTH, LENGTH)
    assert mask.is_plainly_causal
    assert mask.device == torch.device("cpu")
    assert describe(2, LENGTH, LENGTH, attention_mask=torch.ones(2, LENGTH)).is_plainly_causal
    assert (
        describe(2, LENGTH, LENGTH, attention_mask=torch.ones(2, LENGTH - 1)).padding.tolist()
        == [[True] * 7 + [False]] * 2
    )
    assert describe(2, 2, 4, 6, 4, attention_mask=torch.eye(2, LENGTH)).padding.tolist() == [[False] * 4] * 2


def seen_by(numbers: list[Any], batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    numbers.append([tuple(index.flatten().tolist()) for index in (batch, head, query, key)])
    return key <= query


def test_a_function_is_asked_about_places_in_the_sequence() -> None:
    numbers: list[Any] = []
    mask = describe(2, 2, 3, 6, 5, mask_function=partial(seen_by, numbers))
    assert mask.dense().int().tolist() == [[[[1, 1, 0], [1, 1, 1]]]] * 2
    assert numbers == [[(0, 1), (0, 0), (6, 7), (5, 6, 7)]]
    assert (mask.causal, mask.offset) == (False, 1)


def test_functions_are_joined() -> None:
    numbers: list[Any] = []
    one, other = partial(seen_by, numbers), partial(seen_by, numbers)
    mask = assert_same(and_masks(one, causal_mask_function, other))
    assert mask.causal
    assert describe(2, LENGTH, LENGTH, mask_function=and_masks(causal_mask_function, one)).function is one
    assert describe(2, LENGTH, LENGTH, mask_function=one, use_vmap=False).function is one


# What comes out as fields, and which.
FIELDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "causal": (causal_mask_function, {"causal": True}),
    "bidirectional": (bidirectional_mask_function, {"causal": False}),
    "window": (and_masks(sliding_window_overlay(3), causal_mask_function), {"window": 3}),
    "window of one": (and_masks(sliding_window_overlay(1), causal_mask_function), {"window": 1}),
    "least window": (
        and_masks(sliding_window_overlay(5), sliding_window_overlay(2), causal_mask_function),
        {"window": 2},
    ),
    "window on both sides": (sliding_window_bidirectional_overlay(2), {"causal": False, "window": 3}),
    "no window": (and_masks(sliding_window_overlay(LENGTH), causal_mask_function), {"window": None}),
    "chunks": (
        chunked_causal_mask_function(3, torch.tensor([1, 0])),
        {"documents": [[-1, 0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1, 2, 2]]},
    ),
    "documents": (
        and_masks(causal_mask_function, packed_sequence_mask_function(DOCUMENTS)),
        {"documents": DOCUMENTS.tolist()},
    ),
    "documents and chunks": (
        and_masks(chunked_causal_mask_function(4, torch.tensor([0, 0])), packed_sequence_mask_function(DOCUMENTS)),
        {"documents": [[0, 0, 0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]]},
    ),
    "documents remapped": (
        and_masks(
            packed_sequence_mask_function(DOCUMENTS),
            remap_positions_for_packed_sequence(
                and_masks(sliding_window_overlay(2), chunked_causal_mask_function(3, torch.tensor([0, 0]))), RISING
            ),
        ),
        {"documents": [[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2]], "window": 2},
    ),
    "remapped, nothing": (
        and_masks(
            packed_sequence_mask_function(DOCUMENTS),
            remap_positions_for_packed_sequence(bidirectional_mask_function, RISING),
        ),
        {"causal": False, "documents": DOCUMENTS.tolist()},
    ),
    "one document": (
        and_masks(causal_mask_function, packed_sequence_mask_function(torch.full((2, LENGTH), 5))),
        {"documents": None},
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_conditions_come_out_as_fields(name: str) -> None:
    function, fields = FIELDS[name]
    mask = assert_same(function)
    expected = {"causal": True, "window": None, "documents": None} | fields
    found = {field: getattr(mask, field) for field in expected}
    if found["documents"] is not None:
        found["documents"] = found["documents"].tolist()
    assert found == expected
    assert mask.function is None


# What must stay a function, since no field says it.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "window without an order": sliding_window_overlay(3),
    "empty window": and_masks(sliding_window_overlay(0), causal_mask_function),
    "documents of other keys": and_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(2, 9))),
    "documents of one row": and_masks(
        causal_mask_function, packed_sequence_mask_function(torch.zeros(1, LENGTH).expand(3, -1))
    ),
    "documents that fall": and_masks(causal_mask_function, packed_sequence_mask_function(1 - DOCUMENTS)),
    "chunks remapped without documents": remap_positions_for_packed_sequence(
        chunked_causal_mask_function(3, torch.tensor([0, 0])), torch.tensor([[0, 1, 2, 3] * 2, [*range(8)]])
    ),
    "remapped without documents": remap_positions_for_packed_sequence(causal_mask_function, RISING),
    "remapped twice": and_masks(
        packed_sequence_mask_function(DOCUMENTS),
        remap_positions_for_packed_sequence(
            remap_positions_for_packed_sequence(causal_mask_function, RISING.flip(1)), RISING
        ),
    ),
    "documents in remapped places": and_masks(
        packed_sequence_mask_function(DOCUMENTS),
        remap_positions_for_packed_sequence(packed_sequence_mask_function(DOCUMENTS), RISING),
    ),
    "remapped across documents": and_masks(
        packed_sequence_mask_function(DOCUMENTS),
        remap_positions_for_packed_sequence(causal_mask_function, torch.tensor([[0, 1, 1, *range(5)], [*range(8)]])),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_conditions_stay_functions(name: str) -> None:
    mask = assert_same(FUNCTIONS[name])
    assert mask.function is not None


def test_chunks_are_counted_from_the_first_key() -> None:
    for padding in ([0, 0], [1, 2]):
        mask = assert_same(
            chunked_causal_mask_function(3, torch.tensor(padding)), queries=2, keys=4, q_offset=6, kv_offset=4
        )
        assert mask.documents.tolist() == [[(key - first) // 3 for key in range(4, 8)] for first in padding]
        assert mask.documents.shape == (2, 4)


def elementwise(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Made for one index of each kind."""
    assert all(index.dim() == 0 for index in (batch, head, query, key))
    return DOCUMENTS[batch][query] == DOCUMENTS[batch][key] + head


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 1, 1, 1), (1, 3, 1, 1), (1, 1, 5, 1), (1, 1, 1, 4)),
        ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 5, 1), (1, 1, 1, 4)),
        ((2, 1, 1, 1), (), (5, 1), (4,)),
        ((), (), (), ()),
        ((2, 3, 5, 4),) * 4,
    ],
)
def test_a_function_of_one_element_is_called_with_each(shapes: tuple[tuple[int, ...], ...]) -> None:
    indices = [torch.arange(torch.Size(shape).numel()).view(shape) % 2 for shape in shapes]
    result = element_by_element(elementwise)(*indices)
    whole = torch.broadcast_tensors(*indices)
    assert result.shape == whole[0].shape
    expected = [bool(elementwise(*one)) for one in zip(*(index.flatten() for index in whole), strict=True)]
    assert result.flatten().tolist() == expected


def test_a_user_s_function_is_described_as_one_of_elements() -> None:
    def by_rows(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return DOCUMENTS[batch][query] == DOCUMENTS[batch][key]

    mask = assert_same(and_masks(causal_mask_function, by_rows), use_vmap=True)
    assert mask.causal
    # Those of the later tokens too.
    assert_same(by_rows, use_vmap=True, queries=2, keys=4, q_offset=6, kv_offset=4)
