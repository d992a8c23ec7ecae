"""What a forward is given: batches that are wrong, and caches that nobody asked for."""

import pytest
import torch
from helpers import pair
from models import LLAMA, VOCABULARY, batch_of
from transformers.cache_utils import Cache

import sp_attention
from sp_attention.launch import run_ranks


def wrong_batches() -> dict[str, list[str]]:
    """What one process and the ranks raise for batches that are wrong in a place that one rank alone would see."""
    plain = batch_of("plain", 33)
    far = plain | {"labels": plain["labels"].clone()}
    far["labels"][0, 3] = VOCABULARY + 3
    batches = {
        "target out of range": far,
        "labels too short": plain | {"labels": plain["labels"][:, :-1]},
        "positions of one span": plain | {"position_ids": torch.arange(17)[None]},
        "positions of every span": batch_of("plain", 32) | {"position_ids": torch.arange(16)[None]},
        "no tokens": {"labels": plain["labels"]},
        "integer mask": plain | {"attention_mask": torch.ones(2, 1, 33, 33, dtype=torch.int64)},
    }
    models = pair(LLAMA)
    errors = {}
    for name, batch in batches.items():
        errors[name] = []
        for model in models:
            with pytest.raises((RuntimeError, ValueError, IndexError)) as error:
                model(**batch)
            errors[name].append(f"{error.type.__name__}: {error.value}")
    return errors


def test_a_wrong_batch_is_an_error_on_every_rank_as_in_one_process() -> None:
    first, second = run_ranks(2, wrong_batches, timeout=30)
    assert first == second
    assert first["target out of range"] == ["IndexError: Target 100 is out of bounds."] * 2
    assert [error.split(":")[0] for error in first["labels too short"]] == ["ValueError"] * 2
    assert first["no tokens"][0] == first["no tokens"][1]
    for name, length in (("positions of one span", 33), ("positions of every span", 32)):
        assert f"is not what enable() saw in its rehearsal; it is not of {length} tokens" in first[name][1]
    assert "the attention mask is a tensor torch.int64 [2, 1, 33, 33]" in first["integer mask"][1]


def caches() -> tuple[list[bool], list[str], int]:
    """Whether attention saw a cache in a forward that did not ask for one, and what the forward returned."""
    model, seen = LLAMA.build(), []
    sp_attention.enable(model, backend="sdpa")
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(any(isinstance(one, Cache) for one in kwargs.values())),
        with_kwargs=True,
    )
    output = model(batch_of("plain", 33)["input_ids"])
    return seen, list(output), len(model(batch_of("plain", 33)["input_ids"], return_dict=False))


def test_in_training_no_cache_is_filled_or_returned_that_nobody_asked_for() -> None:
    # The configuration says use_cache=True, as it does by default.
    assert LLAMA.build().config.use_cache
    assert run_ranks(2, caches) == [([False, False], ["logits"], 1)] * 2
