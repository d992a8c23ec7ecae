"""What tests of mixers use: functions of transformers that the library knows, and arguments of any shape for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from sp_attention.mixers import functions
from sp_attention.mixers.testing import Shape

Arguments = dict[str, Any]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def delta(shape: Shape) -> Arguments:
    tokens = (shape.batch, shape.length)
    given = {
        "query": random(*tokens, shape.groups, 4),
        "key": random(*tokens, shape.groups, 4) / 2,
        "value": random(*tokens, shape.heads, 6),
        "g": -random(*tokens, shape.heads).abs(),
        "beta": random(*tokens, shape.heads).sigmoid(),
        "use_qk_l2norm_in_kernel": True,
        "output_final_state": shape.with_state,
    }
    return given | ({"initial_state": random(shape.batch, shape.heads, 4, 6)} if shape.with_state else {})


def kimi_delta(shape: Shape) -> Arguments:
    tokens = (shape.batch, shape.length, shape.heads)
    given = delta(shape) | {name: random(*tokens, 4) / (1 + i) for i, name in enumerate(("query", "key"))}
    state = {"initial_state": random(shape.batch, shape.heads, 4, 6) if shape.with_state else None}
    return given | state | {"g": -random(*tokens, 4).abs()}


def chunk_scan(shape: Shape) -> Arguments:
    tokens = (shape.batch, shape.length)
    given = {
        "hidden_states": random(*tokens, shape.heads, 6),
        "dt": random(*tokens, shape.heads),
        "A": -random(shape.heads).abs(),
        "B": random(*tokens, shape.groups, 4),
        "C": random(*tokens, shape.groups, 4) / 2,
        "chunk_size": 16,
        "D": random(shape.heads),
        "dt_bias": random(shape.heads),
        "dt_softplus": True,
        "return_final_states": shape.with_state,
    }
    return given | ({"initial_states": random(shape.batch, shape.heads, 6, 4)} if shape.with_state else {})


def selective_scan(shape: Shape) -> Arguments:
    channels, states = (shape.batch, shape.heads, shape.length), (shape.batch, 4, shape.length)
    return {
        "hidden_states": random(*channels),
        "dt": random(*channels),
        "A": -random(shape.heads, 4).abs(),
        "B": random(*states),
        "C": random(*states) / 2,
        "D": random(shape.heads),
        "z": random(*channels) / 3,
        "delta_bias": random(shape.heads),
        "delta_softplus": True,
        "return_last_state": shape.with_state,
    }


def convolution(shape: Shape) -> Arguments | None:
    if shape.with_state:
        return None
    given = {"hidden_states": random(shape.batch, shape.heads, shape.length), "weight": random(shape.heads, 4)}
    return given | {"bias": random(shape.heads), "activation": "silu"}


KNOWN: dict[str, tuple[Any, Callable[..., Any], Callable[[Shape], Arguments | None]]] = {
    "gated delta rule": (functions.GATED_DELTA_RULE, qwen3_next.torch_chunk_gated_delta_rule, delta),
    "its recurrence": (functions.GATED_DELTA_RULE, qwen3_next.torch_recurrent_gated_delta_rule, delta),
    "Kimi delta attention": (functions.KIMI_DELTA_ATTENTION, kimi_linear.chunk_kimi_delta_attention, kimi_delta),
    "Mamba-2 scan": (functions.CHUNK_SCAN, mamba2.mamba2_chunk_scan, chunk_scan),
    "selective scan": (functions.SELECTIVE_SCAN, jamba.mamba_selective_scan, selective_scan),
    "convolution": (functions.CONVOLUTION, qwen3_next.causal_conv1d_fn, convolution),
}
