"""No layer of an enabled model waits for the host: on tensors without data, whatever reads a value raises."""

from typing import Any

import torch
import torch.distributed as dist
from helpers import spy
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import MistralConfig, MistralModel, PreTrainedModel

import sp_attention
from sp_attention.launch import run_ranks
from sp_attention.region.pytree import map_leaves

LENGTH = 37


def enabled(ranks: int, **sizes: int) -> PreTrainedModel:
    """A model on rank 0 of a group that is not there. Its layers are without data; what comes before them has some."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    config = MistralConfig(vocab_size=32, hidden_size=48, intermediate_size=64, num_hidden_layers=2, **sizes)
    with torch.device("meta"):
        model = MistralModel(config).eval()
    sp_attention.enable(model, backend="sdpa", rehearse=False)
    model.embed_tokens = nn.Embedding(32, 48)
    model.rotary_emb = type(model.rotary_emb)(config)
    for layer in model.layers:
        layer.register_forward_pre_hook(spy(to_meta), prepend=True, with_kwargs=True)
    return model


def to_meta(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def moved(path: Any, leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_cpu):
            return leaf
        return leaf.detach().to("meta").requires_grad_(leaf.is_floating_point())

    return map_leaves(moved, (args, kwargs))


def step(ranks: int, sizes: dict[str, Any], reads: str | None = None) -> str | None:
    """Forward and backward; what a layer raises, which reads a value if it is told how."""
    model = enabled(ranks, **sizes)
    if reads is not None:
        model.layers[1].mlp.register_forward_pre_hook(
            spy(lambda module, args: getattr(args[0].sum(), reads)() and None)
        )
    try:
        out = model(input_ids=torch.arange(LENGTH)[None] % 32, use_cache=False).last_hidden_state
        out.sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    assert out.is_meta
    assert out.shape == (1, LENGTH, 48)
    return None


def steps() -> list[str | None]:
    """With even heads, with uneven heads and a window, and with more ranks than heads."""
    return [
        step(3, {"num_attention_heads": 6, "num_key_value_heads": 6, "sliding_window": None}),
        step(4, {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 8}),
        step(8, {"num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": None}),
    ]


def steps_that_read() -> dict[str, str | None]:
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 6, "sliding_window": None}
    return {how: step(3, sizes, how) for how in ("item", "tolist", "cpu")}


def test_no_layer_reads_a_value() -> None:
    assert run_ranks(1, steps) == [[None, None, None]]


def test_a_layer_that_reads_a_value_is_caught() -> None:
    (caught,) = run_ranks(1, steps_that_read)
    assert all("meta tensor" in str(raised) for raised in caught.values()), caught
