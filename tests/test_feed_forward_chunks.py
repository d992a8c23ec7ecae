"""transformers' chunks of feed-forwards, of lengths that a rank's span need not have."""

from typing import Any

import pytest
import torch
import transformers
from helpers import errors_of, too_large
from models import Tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations

BERT = Tiny(
    "BertForMaskedLM",
    {"chunk_size_feed_forward": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
)


def step(model: nn.Module, length: int) -> list[Tensor]:
    ids = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach()]


def sizes(model: PreTrainedModel) -> list[Any]:
    return [layer.chunk_size_feed_forward for layer in model.bert.encoder.layer]


def chunked() -> tuple[str, list[Any], dict[str, float]]:
    """What enable() reports, the sizes of chunks after disable(), and errors of several lengths."""
    reference, model = BERT.build(), BERT.build()
    handle = sp_attention.enable(model, backend="sdpa")
    errors = {}
    for length, checkpoints in ((16, False), (36, False), (36, True)):  # 8 tokens a rank, 18, and again in backward
        for each in (reference, model):
            each.zero_grad()
        if checkpoints:
            checkpoint_activations(model, {"use_reentrant": False})
        found = errors_of(reference, model, lambda one, length=length: step(one, length))
        errors |= {f"{name}, {length}, {checkpoints}": error for name, error in found.items() if "key.bias" not in name}
    report = handle.report()
    handle.disable()
    return report, sizes(model), errors


def test_spans_need_not_be_of_whole_chunks() -> None:
    with pytest.raises(ValueError, match="multiple of the chunk size"):
        step(BERT.build(), 18)
    for report, after, errors in run_ranks(2, chunked):
        assert not too_large(errors)
        assert after == [4, 4]
        assert "feed-forwards take all of a rank's tokens, not 4 at a time" in report


def test_no_other_attribute_of_transformers_is_a_chunk() -> None:
    names = {name for name in vars(transformers.ReformerConfig()) if name.startswith("chunk_size")}
    assert names == {"chunk_size_feed_forward", "chunk_size_lm_head"}
