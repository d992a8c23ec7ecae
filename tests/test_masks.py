"""Descriptions of masks against the masks that transformers builds itself."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig
from transformers.masking_utils import (
    AttentionMaskInterface,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from sp_attention.attention import Mask, Segment
from sp_attention.errors import UnsupportedError
from sp_attention.masks import describe

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
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "described", describe)


def built(kind: str, implementation: str, padding: Tensor | None, positions: Tensor | None = None) -> object:
    builder, config = BUILDERS[kind]
    config = type(config)(**config.to_dict(), attn_implementation=implementation)
    options = {} if kind == "bidirectional" else {"past_key_values": None, "position_ids": positions}
    return builder(config=config, inputs_embeds=torch.zeros(2, LENGTH, 8), attention_mask=padding, **options)


def dense(kind: str, padding: Tensor | None, positions: Tensor | None = None) -> Tensor:
    """What transformers' own eager builder makes, as True where a query attends."""
    mask = built(kind, "eager", padding, positions)
    return torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool) if mask is None else mask == 0


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_padded_masks_are_those_of_transformers(kind: str, padding: str) -> None:
    given = torch.tensor(PADDINGS[padding])
    described = built(kind, "described", given)
    assert isinstance(described, Mask)
    assert torch.equal(described.dense().expand(2, 1, -1, -1), dense(kind, given).expand(2, 1, -1, -1))


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_packed_masks_are_those_of_transformers(kind: str) -> None:
    positions = torch.tensor([[*range(3), *range(7), *range(2)], [*range(12)]])
    described = built(kind, "described", None, positions)
    assert described.documents is not None
    assert torch.equal(described.dense(), dense(kind, None, positions))


def test_a_window_as_long_as_the_sequence_is_no_window() -> None:
    assert BUILDERS["window"][1].sliding_window == 4
    described = describe(1, 4, 4, mask_function=_window_function(4))
    assert described.window is None
    assert describe(1, 5, 5, mask_function=_window_function(4)).window == 4


def _window_function(window: int) -> object:
    from transformers.masking_utils import sliding_window_causal_mask_function

    return sliding_window_causal_mask_function(window)


def test_masks_of_a_filled_cache_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"attention of 1 queries over 9 keys: a filled cache.*handle\.disable"):
        describe(1, 1, 9, q_offset=8)


def test_mask_functions_that_nothing_is_known_of_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"the mask function .*every_third.* is not covered yet"):
        describe(1, 9, 9, mask_function=every_third)


def every_third(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query - key) % 3 == 0


def test_prefix_language_models_are_refused() -> None:
    config = LlamaConfig(attn_implementation="described")
    with pytest.raises(UnsupportedError, match="or_masks"):
        create_causal_mask(
            config=config,
            inputs_embeds=torch.zeros(1, 6, 8),
            attention_mask=None,
            past_key_values=None,
            or_mask_function=every_third,
        )


def described_by(padding: list[list[int]] | None = None, documents: list[list[int]] | None = None) -> Mask:
    rows = padding or documents or [[1] * 6]
    return Mask(
        batch=len(rows),
        query_length=len(rows[0]),
        key_length=len(rows[0]),
        device=torch.device("cpu"),
        documents=torch.tensor(documents) if documents else None,
        padding=torch.tensor(padding, dtype=torch.bool) if padding else None,
    )


def test_segments_are_documents_with_their_real_keys() -> None:
    assert described_by().segments == ((Segment(0, 6, 0, 6),),)
    assert described_by([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).segments == (
        (Segment(0, 6, 2, 5),),
        (Segment(0, 6, 0, 6),),
    )
    assert described_by(documents=[[0, 0, 1, 1, 1, 2]] * 2).segments == (
        (Segment(0, 2, 0, 2), Segment(2, 5, 2, 5), Segment(5, 6, 5, 6)),
    )
    assert described_by([[0] * 6]).segments == ((Segment(0, 6, 0, 0),),)


def test_padding_between_real_keys_has_no_segments() -> None:
    assert described_by([[1, 0, 1, 1, 1, 1]]).segments is None


def test_a_window_without_causality_is_an_error() -> None:
    with pytest.raises(ValueError, match="a window is defined for causal masks only"):
        Mask(1, 4, 4, torch.device("cpu"), causal=False, window=2)
