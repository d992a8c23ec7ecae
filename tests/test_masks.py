"""Descriptions of masks against the masks that transformers builds itself."""

from inspect import signature

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, Gemma3TextConfig, Llama4TextConfig, LlamaConfig, MistralConfig, ModernBertConfig
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from sp_attention.kernels.request import Mask
from sp_attention.region.masks import describe
from sp_attention.region.versions import remap_positions

LENGTH = 12
PADDINGS = {
    "unpadded": [[1] * 12, [1] * 12],
    "left": [[0] * 5 + [1] * 7, [1] * 12],
    "right": [[1] * 8 + [0] * 4, [1] * 12],
    "both": [[0] * 2 + [1] * 7 + [0] * 3, [0] + [1] * 11],
    "holes": [[1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], [1] * 12],
}
BUILDERS = {
    "causal": (create_causal_mask, LlamaConfig()),
    "window": (create_sliding_window_causal_mask, MistralConfig(sliding_window=4)),
    "bidirectional": (create_bidirectional_mask, LlamaConfig()),
    "bidirectional-window": (create_bidirectional_sliding_window_mask, ModernBertConfig(local_attention=6)),
    "chunks": (create_chunked_causal_mask, Llama4TextConfig(attention_chunk_size=5)),
}


def images(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Tokens 2 to 5 and 8 to 10 of the second row are images, which see themselves."""
    groups = torch.tensor([[0] * 12, [0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 0]])
    # Indexed one index after the other: this works for one index of each kind only.
    return (groups[batch][query] == groups[batch][key]) & (groups[batch][query] > 0)


def every_third(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query - key) % 3 == 0


def anything(*indices: Tensor) -> Tensor:
    return torch.tensor(True)


BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, 1, 1, -1, -1], [-1] * 12])
# What models and users add to those masks.
ADDITIONS = {
    "images": {"or_mask_function": images},
    "every-third": {"and_mask_function": every_third},
    "both": {"or_mask_function": images, "and_mask_function": every_third},
    "anything": {"or_mask_function": anything},
    "blocks": {"block_sequence_ids": BLOCKS},
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "described", describe)


def built(
    kind: str, implementation: str, padding: Tensor | None, positions: Tensor | None = None, **additions: object
) -> object:
    builder, config = BUILDERS[kind]
    config = type(config)(**config.to_dict(), attn_implementation=implementation)
    options = {} if kind.startswith("bidirectional") else {"past_key_values": None, "position_ids": positions}
    return builder(config, torch.zeros(2, LENGTH, 8), padding, **options | additions)


def dense(kind: str, padding: Tensor | None, positions: Tensor | None = None, **additions: object) -> Tensor:
    """What transformers' own eager builder makes, as True where a query attends."""
    mask = built(kind, "eager", padding, positions, **additions)
    return torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool) if mask is None else mask == 0


def assert_same(described: object, expected: Tensor) -> None:
    """In one piece, and in rows."""
    assert isinstance(described, Mask)
    assert torch.equal(described.dense().expand_as(expected), expected)
    rows = described.rows(range(4, 9))
    assert torch.equal(rows.dense().expand_as(expected[:, :, 4:9]), expected[:, :, 4:9])
    for part in (rows.dense(range(1, 3)), rows.rows(range(1, 3)).dense()):
        assert torch.equal(part.expand_as(expected[:, :, 5:7]), expected[:, :, 5:7])


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_padded_masks_are_those_of_transformers(kind: str, padding: str) -> None:
    given = torch.tensor(PADDINGS[padding])
    described = built(kind, "described", given)
    assert isinstance(described, Mask)
    assert described.function is None
    assert_same(described, dense(kind, given).expand(2, -1, -1, -1))


@pytest.mark.parametrize("kind", ["causal", "window", "chunks"])
def test_packed_masks_are_those_of_transformers(kind: str) -> None:
    positions = torch.tensor([[*range(3), *range(7), *range(2)], [*range(12)]])
    described = built(kind, "described", None, positions)
    assert isinstance(described, Mask)
    assert described.documents is not None
    assert described.function is None
    assert_same(described, dense(kind, None, positions))


WITH_FUNCTIONS = [
    (kind, addition, tokens)
    for kind in BUILDERS
    for addition in ADDITIONS
    for tokens in ("unpadded", "left", "packed")
    # transformers has no such builders; none knew blocks before 5.9.0, nor that of chunks in 5.17.0.
    if ADDITIONS[addition].keys() <= signature(BUILDERS[kind][0]).parameters.keys()
    and not (kind.startswith("bidirectional") and tokens == "packed")
]


@pytest.mark.parametrize(("kind", "addition", "tokens"), WITH_FUNCTIONS)
def test_masks_with_functions_are_those_of_transformers(kind: str, addition: str, tokens: str) -> None:
    additions = ADDITIONS[addition]
    padding = None if tokens == "packed" else torch.tensor(PADDINGS[tokens])
    positions = torch.tensor([[*range(3), *range(7), *range(2)], [*range(12)]]) if tokens == "packed" else None
    described = built(kind, "described", padding, positions, **additions)
    assert isinstance(described, Mask)
    assert described.function is not None
    assert_same(described, dense(kind, padding, positions, **additions).expand(2, -1, -1, -1))


@pytest.mark.skipif(
    "block_sequence_ids" not in signature(create_causal_mask).parameters,
    reason="this transformers adds a function for it, which is among the tests before",
)
def test_images_of_gemma_are_seen_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for window, kind in ((None, "causal"), (4, "window")):
        monkeypatch.setitem(BUILDERS, kind, (BUILDERS[kind][0], Gemma3TextConfig(sliding_window=window or 4096)))
        described = built(kind, "described", None, block_sequence_ids=BLOCKS)
        expected = dense(kind, None, block_sequence_ids=BLOCKS)
        assert expected[0, 0, 1, 3]
        assert_same(described, expected)


DOCUMENTS = torch.tensor([[0] * 4 + [1] * 8, [0] * 12])
RETURNING = torch.tensor([[0] * 4 + [1] * 4 + [0] * 4, [0] * 12])
RISING = torch.tensor([[*range(4), *range(8)], [*range(12)]])
JUMPING = torch.tensor([[*range(4), *range(0, 16, 2)], [*range(12)]])
COMPOSED = {
    # What is described without a function, and what only looks like it.
    "two-windows": (and_masks(sliding_window_overlay(3), causal_mask_function, sliding_window_overlay(5)), True),
    "windows-of-both-kinds": (
        and_masks(sliding_window_bidirectional_overlay(2), sliding_window_overlay(5), causal_mask_function),
        True,
    ),
    "nested": (and_masks(bidirectional_mask_function, and_masks(causal_mask_function)), True),
    "chunks-in-documents": (
        and_masks(chunked_causal_mask_function(5, torch.tensor([2, 0])), packed_sequence_mask_function(DOCUMENTS)),
        True,
    ),
    "window-to-the-left-only": (sliding_window_overlay(3), False),
    "window-of-nothing": (and_masks(causal_mask_function, sliding_window_overlay(0)), False),
    "documents-that-return": (
        and_masks(causal_mask_function, packed_sequence_mask_function(RETURNING)),
        False,
    ),
    "or": (or_masks(causal_mask_function, every_third), False),
}
if remap_positions is not None:
    in_chunks, in_a_window = chunked_causal_mask_function(3, torch.tensor([1, 0])), sliding_window_overlay(3)
    in_documents = packed_sequence_mask_function(DOCUMENTS)
    COMPOSED |= {
        "remapped": (and_masks(in_documents, remap_positions(in_chunks, RISING)), True),
        "remapped-without-documents": (remap_positions(causal_mask_function, RISING), False),
        "remapped-with-jumps": (
            and_masks(in_documents, remap_positions(and_masks(causal_mask_function, in_a_window), JUMPING)),
            False,
        ),
        "remapped-function": (and_masks(in_documents, remap_positions(every_third, RISING)), False),
    }


@pytest.mark.parametrize("composed", COMPOSED)
def test_composed_functions_are_described_where_that_says_the_same(composed: str) -> None:
    function, described = COMPOSED[composed]
    mask = describe(2, LENGTH, LENGTH, mask_function=function)
    assert (mask.function is None) == described
    assert_same(mask, sdpa_mask(2, LENGTH, LENGTH, mask_function=function, allow_is_causal_skip=False))


def test_a_chunk_as_long_as_the_sequence_is_no_chunk() -> None:
    function = chunked_causal_mask_function(12, torch.tensor([0]))
    assert describe(1, 12, 12, mask_function=function).documents is None
    assert describe(1, 13, 13, mask_function=function).documents.tolist() == [[0] * 12 + [1]]


@pytest.mark.parametrize("padding", [None, [[1] * 5 + [0] * 2, [1] * 7]])
@pytest.mark.parametrize("function", [None, every_third])
def test_masks_of_cross_attention_are_those_of_transformers(padding: object, function: object) -> None:
    def build(implementation: str) -> object:
        return create_bidirectional_mask(
            config=BartConfig(attn_implementation=implementation),
            inputs_embeds=torch.zeros(2, LENGTH, 8),
            attention_mask=None if padding is None else torch.tensor(padding),
            encoder_hidden_states=torch.zeros(2, 7, 8),
            or_mask_function=function,
        )

    expected, described = build("eager"), build("described")
    assert isinstance(described, Mask)
    assert (described.query_length, described.key_length) == (LENGTH, 7)
    assert_same(described, torch.ones(2, 1, LENGTH, 7) > 0 if expected is None else expected == 0)


def test_a_window_as_long_as_the_sequence_is_no_window() -> None:
    assert BUILDERS["window"][1].sliding_window == 4
    described = describe(1, 4, 4, mask_function=_window_function(4))
    assert described.window is None
    assert describe(1, 5, 5, mask_function=_window_function(4)).window == 4


def _window_function(window: int) -> object:
    from transformers.masking_utils import sliding_window_causal_mask_function

    return sliding_window_causal_mask_function(window)


# New tokens and cached ones: queries, keys, and where the first of each stands.
FILLED = {
    "one more": (1, 9, 8, 0),
    "several more": (3, 9, 6, 0),
    "behind a window": (2, 5, 10, 7),
    "static": (2, 12, torch.tensor(4), 0),
    "static, the first": (4, 12, 0, 0),
    "static, behind a window": (3, 6, torch.tensor(9), 6),
}


@pytest.mark.parametrize("filled", FILLED)
@pytest.mark.parametrize("padding", [None, "left", "holes"])
@pytest.mark.parametrize("kind", ["causal", "window", "chunks", "with a function", "bidirectional"])
def test_masks_with_a_filled_cache_are_those_of_transformers(kind: str, padding: str | None, filled: str) -> None:
    function = {
        "causal": causal_mask_function,
        "window": _window_function(4),
        "chunks": chunked_causal_mask_function(5, torch.tensor([2, 0])),
        "with a function": and_masks(causal_mask_function, every_third),
        "bidirectional": bidirectional_mask_function,
    }[kind]
    queries, keys, q_offset, kv_offset = FILLED[filled]
    asked = {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": function}
    if padding is not None:
        asked["attention_mask"] = torch.tensor(PADDINGS[padding], dtype=torch.bool)
    mask = describe(2, queries, keys, **asked)
    expected = sdpa_mask(2, queries, keys, **asked, allow_is_causal_skip=False)
    assert (mask.function is None) == (kind != "with a function")
    assert torch.equal(mask.dense().expand_as(expected), expected)


def test_rows_and_heads_are_views_and_kept() -> None:
    explicit = torch.rand(2, 3, 6, 6) < 0.5
    mask = Mask(2, 6, 6, torch.device("cpu"), explicit=explicit)
    rows = mask.rows(range(1, 4))
    assert rows is mask.rows(range(1, 4))
    assert rows.explicit.data_ptr() == explicit[:, :, 1:].data_ptr()
    assert torch.equal(rows.heads(range(1, 3)).dense(), mask.dense()[:, 1:3, 1:4])
    assert mask.rows(range(0, 6)) is mask
    assert mask.heads(range(0, 3)) is mask
    assert mask.heads(range(0, 2)) is mask.heads(range(0, 2))
    one = Mask(2, 6, 6, torch.device("cpu"), explicit=explicit[:, :1, :1])
    assert one.heads(range(1, 3)) is one
    assert torch.equal(one.rows(range(1, 4)).dense(), one.dense()[:, :, 1:4])


def test_a_window_counts_the_query_itself() -> None:
    with pytest.raises(ValueError, match="a window counts the query itself, so it is 1 at least, not 0"):
        Mask(1, 4, 4, torch.device("cpu"), window=0)
    both = Mask(1, 4, 4, torch.device("cpu"), causal=False, window=2)
    assert both.dense()[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_an_additive_tensor_has_no_bool_form() -> None:
    with pytest.raises(ValueError, match=r"an additive mask has no bool form; see Request\.bias"):
        Mask(1, 4, 4, torch.device("cpu"), explicit=torch.zeros(1, 1, 4, 4)).dense()
