"""Key/value caches of which each rank keeps its heads: their size, what goes on from them, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from generating import GREEDY, MODES, PROMPT, generated, logits, pair, prompt
from helpers import Selected, largest_error, relative_error, run_once, slow_but, too_large
from models import LLAMA, Tiny
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import PreTrainedModel, QuantizedCache, StaticCache

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks
from sp_attention.region.kv_cache import layers_of

pytestmark = pytest.mark.filterwarnings("ignore")

# Of models that share all their caches.
SIZES = ("llama-6q3kv", "llama-5q1kv", "mistral-window5", "gemma3-window5", "gpt2", "t5", "bart")


def bytes_of(cache: Any) -> int:
    pairs = ((layer.keys, layer.values) for layer in layers_of(cache))
    return sum(tensor.nbytes for pair in pairs for tensor in pair if tensor is not None)


def cache_sizes(names: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """What this rank's caches, dynamic and static, are of one process', and what they may be: its share, and a head."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in names:
        for options in (GREEDY, MODES["static"]):
            reference, model = pair(name)
            inputs = {"input_ids": prompt(model)}
            mine, whole = (bytes_of(generated(each, inputs, **options).past_key_values) for each in (model, reference))
            heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
            found[name].append((mine / whole, 1 / dist.get_world_size() + 1 / heads))
    return found


@pytest.mark.parametrize("name", slow_but(SIZES, "llama-5q1kv", "gpt2"))
def test_a_rank_caches_its_share_and_no_more_than_a_head_beyond(name: str, selected: Selected) -> None:
    for found in run_once(3, cache_sizes, selected("name"), timeout=120):
        assert all(size <= allowed + 1e-9 for size, allowed in found[name])
        if name == "gpt2":
            assert found[name][0][0] == pytest.approx(1 / 3)


# Where prompts are cut: a token at a time, a few tokens, and many.
CUTS = {"one": (9, 10, 11), "few": (9, 11, 13), "many": (9, 17), "less than the ranks": (2, 4, 5, 17)}


CONTINUED = ("llama-5q1kv", "mistral-window5", "gpt2", "deepseek-v3")


@torch.no_grad()
def continued(name: str) -> dict[str, float]:
    """The largest error of the logits of calls of the model that go on from a cache, as the key says."""
    found: dict[str, float] = {}

    def note(way: str, ours: Tensor, theirs: Tensor) -> None:
        found[way] = max(found.get(way, 0.0), relative_error(ours, theirs))

    reference, model = pair(name)
    ids = prompt(model)
    for cuts, stops in CUTS.items():
        ours = theirs = None
        for start, stop in zip((0, *stops), stops, strict=False):
            mine, ours = logits(model, ids[:, start:stop], ours)
            whole, theirs = logits(reference, ids[:, start:stop], theirs)
            note(cuts, mine, whole)
    # Both models may go on from what the other has not seen, as long as it is whole.
    _, filled = logits(reference, ids[:, :9])
    expected = logits(reference, ids[:, 9:], copy.deepcopy(filled))[0]
    note("a cache of a model on its own", logits(model, ids[:, 9:], filled)[0], expected)
    if name != "deepseek-v3":  # It ends up in a layer of another kind in a static cache.
        static = StaticCache(config=model.config, max_cache_len=32)
        logits(reference, ids[:, :9], static)
        note("a static one", logits(model, ids[:, 9:], static)[0], expected)
    # A prompt that several conversations begin with.
    _, begun = logits(model, ids[:, :9])
    for _ in range(2):
        note("copied", logits(model, ids[:, 9:], copy.deepcopy(begun))[0], expected)
    # In evaluation a cache is filled without being asked for, as in one process.
    begun = model(input_ids=ids[:, :9]).past_key_values
    note("unasked", logits(model, ids[:, 9:], begun)[0], expected)
    if name == "mistral-window5":
        return found  # It cannot take back what has left its window.
    begun.crop(-8)
    note("cropped", logits(model, ids[:, 9:], begun)[0], expected)
    begun.crop(-8)
    begun.reorder_cache(torch.tensor([1, 0]))
    note("reordered", logits(model, ids[:, 9:].flip(0), begun)[0], expected.flip(0))
    begun.crop(-8)
    begun.batch_repeat_interleave(2)
    again = ids[:, 9:].flip(0).repeat_interleave(2, 0)
    note("repeated", logits(model, again, begun)[0], expected.flip(0).repeat_interleave(2, 0))
    begun.crop(-8)
    begun.batch_select_indices(torch.tensor([3]))
    note("selected", logits(model, ids[:1, 9:], begun)[0], expected[:1])
    assert begun.get_seq_length() == PROMPT
    return found


def continue_all(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {name: continued(name) for name in names}


@pytest.mark.parametrize("name", CONTINUED)
def test_calls_of_the_model_go_on_from_caches(name: str, selected: Selected) -> None:
    for found in run_once(3, continue_all, selected("name"), timeout=120):
        static, taken_back = name != "deepseek-v3", name != "mistral-window5"
        assert len(found[name]) == len(CUTS) + 3 + static + 4 * taken_back
        assert not too_large(found[name])


def gradients_through_a_cache(name: str) -> float:
    """The largest relative error of the loss of what follows a cache, and of its gradients."""
    reference, model = pair(name)
    ids = prompt(model)

    def step(each: PreTrainedModel) -> list[Tensor]:
        _, filled = logits(each, ids[:, :9])
        loss = each(input_ids=ids[:, 9:], past_key_values=filled, labels=ids[:, 9:]).loss
        loss.backward()
        return [loss.detach()]

    return largest_error(reference, model, step)


# Of the second, a rank has no heads.
@pytest.mark.parametrize(("name", "ranks"), [("llama-5q1kv", 2), ("llama-2q1kv", 3)])
def test_gradients_go_through_a_cache(name: str, ranks: int) -> None:
    assert max(run_ranks(ranks, gradients_through_a_cache, name, timeout=120)) < 1e-5


def collectives() -> dict[str, dict[str, int]]:
    model = Tiny("LlamaForCausalLM", {"num_hidden_layers": 3}).build().eval()
    sp_attention.enable(model, "sdpa")
    ids, found, past = prompt(model), {}, None
    with torch.no_grad():
        for name, some in (("prompt", ids), ("token", ids[:, :1])):
            with CommDebugMode() as mode:
                _, past = logits(model, some, past)
            found[name] = {str(op): count for op, count in mode.get_comm_counts().items() if count}
    return found


def test_a_decoded_token_takes_one_collective_in_each_layer() -> None:
    for found in run_ranks(2, collectives):
        # Three layers; one more is the agreement on the batch, and one gathers the hidden states of a prompt.
        assert found["prompt"] == {"c10d.alltoall_base_": 9, "c10d.allgather_": 2}
        assert found["token"] == {"c10d.allgather_": 3 + 1}


@torch.no_grad()
def refusals() -> dict[str, str]:
    reference, model = LLAMA.build().eval(), LLAMA.build().eval()
    handle = sp_attention.enable(model, "sdpa")
    ids, texts = prompt(model), {}
    _, filled = logits(model, ids)
    quantised = QuantizedCache("fp8", model.config)
    logits(reference, ids, quantised)

    def suspended() -> None:
        with handle.suspended():
            logits(model, ids[:, :1], copy.deepcopy(filled))

    def of_another_group() -> None:
        other = LLAMA.build().eval()
        sp_attention.enable(other, "sdpa", sp_size=2)
        logits(other, ids[:, :1], copy.deepcopy(filled))

    attempts: dict[str, Callable[[], object]] = {
        "suspended": suspended,
        "by a model on its own": lambda: logits(reference, ids[:, :1], copy.deepcopy(filled)),
        "of another group": of_another_group,
        "disabled": lambda: (handle.disable(), logits(model, ids[:, :1], filled)),
    }
    for name, attempt in attempts.items():
        with pytest.raises(UnsupportedError) as refusal:
            attempt()
        texts[name] = str(refusal.value)
    # Quantised numbers are of all heads, so this one goes on anywhere.
    logits(reference, ids[:, :1], quantised)
    # What was begun on its own may go on with others.
    _, begun = logits(model, ids[:, :9])
    sp_attention.enable(model, "sdpa")
    torch.testing.assert_close(logits(model, ids[:, 9:], begun)[0], logits(reference, ids)[0][:, 9:])
    return texts


def test_caches_of_other_heads_are_refused_and_say_what_to_do() -> None:
    for texts in run_ranks(4, refusals, timeout=120):
        for name in ("suspended", "by a model on its own", "disabled"):
            assert texts[name].startswith(
                "this cache was filled under sequence parallelism and holds this rank's heads"
            )
            assert "run the prompt again with a new cache, or keep the model enabled" in texts[name]
        assert "the cache holds the heads of rank" in texts["of another group"]


@torch.no_grad()
def not_causal_by_its_own_words() -> tuple[float, str]:
    tiny = Tiny("GemmaForCausalLM", {"use_bidirectional_attention": True})
    reference, model = tiny.build().eval(), tiny.build().eval()
    sp_attention.enable(model, "sdpa")
    ids, steps = prompt(model), []
    padding = torch.ones_like(ids)
    padding[0, :6] = 0
    for each in (model, reference):
        _, filled = logits(each, ids, attention_mask=padding)
        steps.append(logits(each, ids[:, :1], filled)[0])
    with pytest.raises(UnsupportedError) as refusal:
        logits(model, ids)
    return relative_error(*steps), str(refusal.value)


def test_attention_that_says_it_is_not_causal_takes_a_causal_mask_for_one_token_only() -> None:
    for error, text in run_ranks(2, not_causal_by_its_own_words):
        assert error < 1e-5
        assert "model.layers.0.self_attn says that it is not causal, and is given a causal mask" in text
        assert "Give an attention_mask [B, 1, S, S] of your own" in text
