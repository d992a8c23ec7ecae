"""What ranks compare before a forward: what is inside of containers, caches, and how the model is called."""

import contextlib
import copy
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import TWO_AND_THREE, relative_error
from models import LLAMA, Tiny, batch_of
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import sp_attention
from sp_attention.errors import BatchError
from sp_attention.launch import run_ranks
from sp_attention.region.compared import contents
from sp_attention.region.versions import checkpoint_activations, keep_activations

BART = Tiny(
    "BartForConditionalGeneration",
    {
        "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 6,
        "decoder_attention_heads": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0, "init_std": 0.2,
        "decoder_start_token_id": 2,
    },
)  # fmt: skip
GEMMA = Tiny("Gemma3ForCausalLM", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]})
LENGTH = 21


def is_odd() -> bool:
    """Whether this is the rank that does otherwise than the others."""
    return dist.get_rank() == dist.get_world_size() - 1


def texts_of(attempts: dict[str, Callable[[], object]]) -> dict[str, str]:
    """The error of each attempt, within seconds."""
    texts = {}
    for name, attempt in attempts.items():
        start = monotonic()
        with pytest.raises(BatchError) as error:
            attempt()
        assert monotonic() - start < 5, name
        texts[name] = str(error.value)
    return texts


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(model: PreTrainedModel, seed: int) -> DynamicCache:
    """A cache with made-up contents, of no model."""
    cache = DynamicCache(config=model.config)
    for layer in range(2):
        cache.update(numbers(2, 3, 4, 8, seed=seed), numbers(2, 3, 4, 8, seed=seed + 1), layer)
    return cache


def containers() -> dict[str, str]:
    """What is in containers, and differs on one rank."""
    bart, gemma, llama = BART.build(), GEMMA.build(), LLAMA.build()
    expected = {model: copy.deepcopy(model) for model in (bart, gemma, llama)}
    for model in expected:
        sp_attention.enable(model, backend="sdpa")
    ids = batch_of("plain", LENGTH)["input_ids"]
    causal = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    other = causal.clone()
    other[:, :, 10:, 3] = False

    def states(seed: int) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=numbers(2, LENGTH, 48, seed=seed))

    # What to call, and the arguments of the other ranks and of the odd one.
    cases: dict[str, tuple[PreTrainedModel, dict[str, Any], dict[str, Any]]] = {
        "tuple": (bart, {"encoder_outputs": (states(0)[0],)}, {"encoder_outputs": (states(1)[0],)}),
        "model output": (bart, {"encoder_outputs": states(0)}, {"encoder_outputs": states(1)}),
        "masks": (
            gemma,
            {"attention_mask": {"full_attention": causal, "sliding_attention": causal}},
            {"attention_mask": {"full_attention": other, "sliding_attention": causal}},
        ),
        "cache": (
            llama, {"past_key_values": filled(llama, 0)}, {"past_key_values": filled(llama, 1)}
        ),
        "gradient": (
            llama,
            {"inputs_embeds": numbers(2, LENGTH, 48)},
            {"inputs_embeds": numbers(2, LENGTH, 48).requires_grad_()},
        ),
    }  # fmt: skip
    attempts: dict[str, Callable[[], object]] = {}
    for name, (model, ours, theirs) in cases.items():
        more = {} if name == "gradient" else {"input_ids": ids}
        call = {**more, "labels": ids, **(theirs if is_odd() else ours)}
        attempts[name] = lambda model=model, call=call: model(**call)
        # And alike, as one process.
        same = {**more, "labels": ids, **ours}
        with torch.no_grad():
            error = relative_error(model(**copy.deepcopy(same)).loss, expected[model](**copy.deepcopy(same)).loss)
        assert error < 1e-5, name
    return texts_of(attempts)


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
def test_what_is_in_containers_is_compared(ranks: int) -> None:
    first, *others = run_ranks(ranks, containers, timeout=120)
    assert others == [first] * (ranks - 1)
    last = ranks - 1
    for name, what in (
        ("tuple", "encoder_outputs, 0"),
        ("model output", "encoder_outputs, last_hidden_state"),
        ("masks", "attention_mask, full_attention"),
        ("cache", "past_key_values, 0.keys"),
        ("gradient", "inputs_embeds"),
    ):
        assert f"{what} differs on rank {last} from rank 0:" in first[name]
    assert "sliding_attention" not in first["masks"]
    assert "requires a gradient" in first["gradient"]


def histories() -> dict[str, str]:
    """Caches of which each rank has other heads, filled by batches that were the same, and not in the same order."""
    model = LLAMA.build().eval()
    sp_attention.enable(model, backend="sdpa")
    prompts = [batch_of("plain", LENGTH)["input_ids"], batch_of("plain", LENGTH)["input_ids"].flip(1)]
    with torch.no_grad():
        caches = [model(prompt, use_cache=True).past_key_values for prompt in prompts]
        given = [DynamicCache(config=model.config) for _ in prompts]
        for prompt, cache in zip(prompts, given, strict=True):
            model(prompt, past_key_values=cache)
        token = prompts[0][:, :1]
        texts = texts_of(
            {
                "made": lambda: model(token, past_key_values=caches[is_odd()]),
                "given": lambda: model(token, past_key_values=given[is_odd()]),
                "copied": lambda: model(token, past_key_values=copy.deepcopy(given[is_odd()])),
            }
        )
        rows = copy.deepcopy(given[0])
        if is_odd():
            rows.batch_select_indices(torch.tensor([0]))
        texts |= texts_of({"rows": lambda: model(token, past_key_values=rows)})
        # Those that are alike go on: nothing was noted of the attempts.
        assert model(token, past_key_values=caches[0]).logits.isfinite().all()
    return texts


def test_caches_are_compared_by_what_has_filled_them() -> None:
    first, second = run_ranks(2, histories, timeout=120)
    assert first == second
    for name in ("made", "given", "copied"):
        assert "past_key_values (without tensors) differs on rank 1" in first[name]
        assert "filled by=" in first[name]
    assert "rows=1" in first["rows"]


def modes() -> dict[str, str]:
    """How the model is called, on one rank alone."""
    model = LLAMA.build(torch.float32)
    sp_attention.enable(model, backend="sdpa")
    batch = batch_of("plain", LENGTH)

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_odd()):
            model(**batch)

    def other_autocast() -> None:
        with torch.autocast("cpu", torch.float16 if is_odd() else torch.bfloat16):
            model(**batch)

    def without_gradients() -> None:
        with torch.no_grad() if is_odd() else contextlib.nullcontext():
            model(**batch)

    def checkpointing() -> None:
        if is_odd():
            checkpoint_activations(model)
        try:
            model(**batch)
        finally:
            keep_activations(model)

    def frozen() -> None:
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(not is_odd())
        try:
            model(**batch)
        finally:
            model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)

    def evaluating() -> None:
        model.model.layers[1].train(not is_odd())
        try:
            model(**batch)
        finally:
            model.train()

    def dtype() -> None:
        model.to(torch.bfloat16 if is_odd() else torch.float32)
        try:
            model(**batch)
        finally:
            model.float()

    texts = texts_of(
        {
            "autocast": autocast,
            "other autocast": other_autocast,
            "without gradients": without_gradients,
            "checkpointing": checkpointing,
            "frozen": frozen,
            "evaluating": evaluating,
            "dtype": dtype,
        }
    )
    model(**batch).loss.backward()  # No rank is left behind.
    return texts


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
def test_a_mode_of_one_rank_alone_is_an_error_on_all(ranks: int) -> None:
    first, *others = run_ranks(ranks, modes, timeout=120)
    assert others == [first] * (ranks - 1)
    for name, lines in {
        "autocast": ("(autocast) differs", ": 'off'\n", "cpu: torch.bfloat16"),
        "other autocast": ("(autocast) differs", "cpu: torch.float16"),
        "without gradients": ("(gradients) differs",),
        "checkpointing": ("(parts) differs", "checkpointed: none", "checkpointed: model, model.layers.0"),
        "frozen": ("(parts) differs", "frozen: none", "frozen: model.layers.0.mlp.up_proj.weight;"),
        "evaluating": ("(parts) differs", "in evaluation: none", "in evaluation: model.layers.1"),
        "dtype": ("(parts) differs", "float32: ", "bfloat16: "),
    }.items():
        for line in (*lines, f"on rank {ranks - 1} from rank 0", "must be alike on every rank too"):
            assert line in first[name], name


def test_containers_of_any_kind_are_looked_into() -> None:
    def paths(value: object) -> list[str]:
        return [name for name, leaf in contents("it", value) if isinstance(leaf, Tensor)]

    one = torch.ones(2)
    assert paths({"a": [one, (one, {"b": one})]}) == ["it, a, 0", "it, a, 1, 0", "it, a, 1, 1, b"]
    assert paths(np.ones(2)) == ["it, values"]
    words = [dict(contents("it", value))["it (without tensors)"] for value in ([1, "x"], [1, "y"], (1, "x"))]
    assert len(set(words)) == 3
    assert dict(contents("it", 5)) == {"it": 5}
