"""generate() that cannot go on: it ends with an error on every rank that says why."""

import os
import signal
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from generating import GREEDY, PROMPT, distance, generated, logits, prompt
from models import LLAMA
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

import sp_attention
from sp_attention.cli.reduced import prepare
from sp_attention.errors import BatchError, UnsupportedError
from sp_attention.launch import RanksError, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def encoder_by_itself() -> str:
    # Its encoder is no model of transformers.
    model, batches = prepare("fsmt", "seq2seq-lm", PROMPT)
    inputs = {"input_ids": batches["plain"]["input_ids"]}
    expected = generated(model.eval(), inputs, **GREEDY)
    handle = sp_attention.enable(model, "sdpa")
    with pytest.raises(UnsupportedError) as refusal:
        generated(model, inputs, **GREEDY)
    with handle.suspended():
        assert distance(generated(model, inputs, **GREEDY), expected) < 1e-5
    return str(refusal.value)


def test_an_encoder_that_is_called_by_itself_is_refused_and_says_what_to_do() -> None:
    for text in run_ranks(2, encoder_by_itself):
        assert text == (
            "model.encoder.layers.0 is called outside of a forward of its model, as generate() calls an encoder, and "
            "nothing tells what sequence it is of: do this within handle.suspended(), by the whole model on every rank"
        )


def unlike_each_other() -> dict[str, str]:
    model, rank = LLAMA.build().eval(), dist.get_rank()
    torch.manual_seed(rank)
    handle = sp_attention.enable(model, "sdpa")
    # What is sampled comes later.
    assert handle.refuses_caches is None
    torch.manual_seed(0)
    ids, texts = prompt(model), {}

    def sampled() -> None:
        torch.manual_seed(rank)
        try:
            model.generate(ids, do_sample=True, max_new_tokens=1)
        finally:
            torch.manual_seed(0)

    def chosen() -> None:
        # No token that ends the text.
        other = LogitsProcessorList([lambda ids, scores: scores.index_fill(1, torch.tensor([3 + rank]), 1e9)])
        model.generate(ids, do_sample=False, max_new_tokens=4, logits_processor=other)

    def ended() -> None:
        early = StoppingCriteriaList([lambda ids, _: torch.full((len(ids),), rank == 1 and ids.shape[1] > PROMPT + 1)])
        model.generate(ids, do_sample=False, max_new_tokens=4, stopping_criteria=early, synced_gpus=True)

    def cached() -> None:
        past = DynamicCache(config=model.config)
        logits(model, ids, past)
        if rank == 1:
            past.crop(-1)
        logits(model, ids[:, :1], past)

    def masked() -> None:
        mask = torch.ones_like(ids)
        mask[0, : rank + 1] = 0
        positions = torch.arange(PROMPT).expand(2, -1)
        static = {"cache_implementation": "static", "position_ids": positions}
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, **static)

    attempts: dict[str, Callable[[], object]] = {
        "seeds": sampled,
        "tokens": chosen,
        "ends": ended,
        "prompts": lambda: model.generate(ids + rank, max_new_tokens=2, do_sample=False),
        "lengths": lambda: model.generate(ids[:, rank:], max_new_tokens=2, do_sample=False),
        "caches": cached,
        "masks": masked,
    }
    for name, attempt in attempts.items():
        with pytest.raises(BatchError) as error:
            attempt()
        texts[name] = str(error.value)
    return texts


def test_ranks_that_sample_or_are_given_something_else_all_end_with_an_error() -> None:
    first, *others = run_ranks(3, unlike_each_other, timeout=120)
    assert others == [first] * 2
    assert "(random state) differs on rank 1, rank 2 from rank 0" in first["seeds"]
    assert "seed them alike before generate()" in first["seeds"]
    assert "input_ids differs on rank 1, rank 2 from rank 0" in first["tokens"]
    assert "input_ids differs on rank 1 from rank 0" in first["ends"]
    for name in ("prompts", "lengths"):
        assert "input_ids differs" in first[name]
    assert "(tokens in the cache) differs on rank 1 from rank 0" in first["caches"]
    assert "attention_mask, padding differs" in first["masks"]


def generate_until_dead() -> None:
    model = LLAMA.build().eval()
    sp_attention.enable(model, "sdpa")

    def die(ids: Tensor, scores: Tensor) -> Tensor:
        if dist.get_rank() == 1 and ids.shape[1] == PROMPT + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores

    model.generate(prompt(model), max_new_tokens=6, do_sample=False, logits_processor=LogitsProcessorList([die]))


def test_when_a_rank_dies_while_it_generates_the_others_end_with_an_error() -> None:
    with pytest.raises(RanksError) as error:
        run_ranks(3, generate_until_dead, timeout=100)
    sections = str(error.value).split("--- rank ")[1:]
    assert "exited with code -9" in sections[1]
    for rank in (0, 2):
        assert "RuntimeError" in sections[rank] or "DistBackendError" in sections[rank]
