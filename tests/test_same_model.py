"""Ranks that call `enable` with different models, or in different modes, all get one error before anything runs."""

import contextlib
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import TWO_AND_THREE, fsdp
from models import LLAMA, MODELS, Tiny
from torch import nn

import sp_attention
from sp_attention.distributed.digest import weights_digest
from sp_attention.errors import BatchError
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations


def is_odd() -> bool:
    """Whether this is the rank that does otherwise than the others."""
    return dist.get_rank() == dist.get_world_size() - 1


def with_one_bit_changed() -> nn.Module:
    model = LLAMA.build()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] *= 1 + 2**-52
    return model


def with_rows_swapped() -> nn.Module:
    """A matrix of which the sum is the same."""
    model = LLAMA.build()
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.copy_(weight.flip(0))
    return model


def changed(change: Callable[[Any], object], tiny: Tiny = LLAMA) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = tiny.build()
        change(model)
        return model

    return build


# What one rank builds where the others build LLAMA, and what the error says of it.
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "class": (MODELS["qwen2"].build, ("(class) differs", "rank 0: LlamaForCausalLM")),
    "layers": (Tiny("LlamaForCausalLM", {"num_hidden_layers": 3}).build, ("config.num_hidden_layers", "rank 0: 2\n")),
    "shapes": (Tiny("LlamaForCausalLM", {"intermediate_size": 80}).build, ("mlp.up_proj.weight", "[80, 48]")),
    "configuration": (Tiny("LlamaForCausalLM", {"rms_norm_eps": 1e-3}).build, ("config.rms_norm_eps", "0.001")),
    "one bit": (with_one_bit_changed, ("model.layers.1.mlp.down_proj.weight differs", "content")),
    "order": (with_rows_swapped, ("model.layers.1.mlp.down_proj.weight differs", "content")),
    "dtype": (changed(lambda model: model.float()), ("(float64) differs", ": absent")),
    "frozen": (changed(lambda model: model.lm_head.requires_grad_(False)), ("lm_head.weight differs", "frozen")),
    "evaluation": (changed(lambda model: model.eval()), ("(training) differs",)),
    "a part in evaluation": (changed(lambda model: model.model.layers[0].eval()), ("(in evaluation) differs",)),
    "checkpointing": (changed(lambda model: checkpoint_activations(model)), ("(checkpointed) differs",)),
}
CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "(autocast)": lambda: torch.autocast("cpu", torch.bfloat16),
    "(gradients)": torch.no_grad,
    "(default dtype)": lambda: default_dtype(torch.bfloat16),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def different() -> dict[str, str]:
    texts = {}
    attempts = [
        (name, other if is_odd() else LLAMA.build, contextlib.nullcontext) for name, (other, _) in OTHERS.items()
    ]
    attempts += [
        (name, LLAMA.build, within if is_odd() else contextlib.nullcontext) for name, within in CONTEXTS.items()
    ]
    for name, build, within in attempts:
        model = build()
        start = monotonic()
        with pytest.raises(BatchError) as error, within():
            sp_attention.enable(model, backend="sdpa")
        assert monotonic() - start < 5
        texts[name] = str(error.value)
    model = LLAMA.build()
    with pytest.raises(ValueError, match="Linear is not a transformers model") as no_model:
        sp_attention.enable(nn.Linear(1, 1) if is_odd() else model, backend="sdpa")
    texts["no model"] = str(no_model.value)
    sp_attention.enable(model, backend="sdpa")  # And nothing is left behind.
    return texts


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
def test_ranks_with_different_models_are_refused_on_every_rank(ranks: int) -> None:
    first, *others = run_ranks(ranks, different, timeout=120)
    assert others == [first] * (ranks - 1)
    for name, (_, said) in OTHERS.items():
        for text in (*said, f"differs on rank {ranks - 1} from rank 0", "Every rank must build the model alike"):
            assert text in first[name], name
    for name in CONTEXTS:
        assert f"{name} differs on rank {ranks - 1} from rank 0" in first[name]


def test_weights_are_told_apart_by_their_numbers_wherever_they_lie() -> None:
    numbers = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8):
        one = (100 * numbers).to(dtype)
        apart = torch.cat([one.new_zeros(1), one.flatten()])[1:].view(5, 7)
        places = {"as it is": one, "further on": apart, "by columns": one.t().contiguous().t()}
        assert len(set(weights_digest(places).values())) == 1
        others = {"as it is": one, "turned": one.flip(0), "one more": one + 1, "a part": one[1:]}
        assert len(set(weights_digest(others).values())) == 4
    assert weights_digest({"nowhere": numbers.to("meta")}) == {}


def sharded() -> bool:
    """Weights of which each rank has another part are no difference, nor is where a model was loaded from."""
    model = LLAMA.build()
    model.config._name_or_path = f"/local/{dist.get_rank()}"
    sp_attention.enable(fsdp(model), backend="sdpa")
    return True


def test_what_differs_between_ranks_by_right_is_no_error() -> None:
    assert all(run_ranks(2, sharded, timeout=120))
