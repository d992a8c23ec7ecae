"""What layers do to many tokens and not to the few of the rehearsal: capacities, windows, scales by position."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TWO_AND_THREE, Selected, errors_of, loss_step, run_once, too_large
from models import MODELS, Tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks
from sp_attention.rehearsal.prove_length import length_beyond

LENGTH = 401


class Outside(nn.Module):
    """Put in the place of an MLP: does something of its own, and then what the MLP does."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.gate = mlp, nn.Linear(48, 1)


class OfFixedNumber(Outside):
    """Mixture of depths (Raposo et al. 2024): of each row the tokens of the highest gates, a fixed number of them."""

    def forward(self, hidden: Tensor) -> Tensor:
        gates = self.gate(hidden)[..., 0]
        taken = gates.topk(min(150, gates.shape[1])).indices
        chosen = torch.zeros_like(gates).scatter(1, taken, gates.sigmoid().gather(1, taken))
        return chosen[..., None] * self.mlp(hidden)


class WithinCapacity(Outside):
    """Two experts that take the first tokens of all rows, 250 each, as [B·S, E]."""

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        first = self.gate(rows) > 0
        within = torch.where(first, first.cumsum(0), (~first).cumsum(0)) <= 250
        return (torch.where(within, self.mlp(rows), 0 * rows)).view(hidden.shape)


class OfBlocks(Outside):
    """Adds the mean of each block of 128 tokens that is full."""

    def forward(self, hidden: Tensor) -> Tensor:
        whole = hidden.shape[1] // 128 * 128
        means = hidden[:, :whole].unflatten(1, (-1, 128)).mean(2, keepdim=True).expand(-1, -1, 128, -1).flatten(1, 2)
        return self.mlp(hidden + torch.cat((means, 0 * hidden[:, whole:]), 1))


class ByPosition(Outside):
    """Scales queries of later tokens, as Llama 4 does, by where they are in what the projection is given."""

    def forward(self, hidden: Tensor) -> Tensor:
        places = torch.arange(hidden.shape[1]).to(hidden)
        return (1 + (places // 130).log1p()[:, None]) * self.mlp(hidden)


def in_mlp(kind: type[Outside]) -> Callable[[PreTrainedModel], None]:
    def put(model: PreTrainedModel) -> None:
        torch.manual_seed(5)
        layer = model.model.layers[1]
        layer.mlp = kind(layer.mlp).double()

    return put


def in_attention(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    attention.q_proj = ByPosition(attention.q_proj).double()


class Attention(nn.Module):
    """Attends after it has scaled hidden states by position, with no module of its own for it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = torch.arange(hidden_states.shape[1]).to(hidden_states)
        return self.attention(hidden_states * (1 + places // 130)[:, None], *args, **kwargs)


def around_attention(model: PreTrainedModel) -> None:
    layer = model.model.layers[0]
    layer.self_attn = Attention(layer.self_attn)


def as_it_is(model: PreTrainedModel) -> None:
    pass


LLAMA4 = Tiny(
    "Llama4ForCausalLM",
    {
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "moe_layers": [],
        "no_rope_layers": [1, 0],
        "floor_scale": 64,
        "attn_scale": 1.0,
    },
    1e-3,
)
SWITCH = Tiny(
    "SwitchTransformersForConditionalGeneration",
    {
        "d_model": 48,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "num_experts": 2,
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.0,
        "decoder_start_token_id": 0,
        "initializer_factor": 2.0,
    },
    1e-3,
)
LLAMA = MODELS["llama-6q3kv"]
CASES = {
    "llama, a fixed number of tokens": (LLAMA, in_mlp(OfFixedNumber), "mlp: gathered"),
    "llama, experts with a capacity": (LLAMA, in_mlp(WithinCapacity), "mlp: gathered"),
    "llama, means of blocks": (LLAMA, in_mlp(OfBlocks), "mlp: gathered"),
    "llama, scaled queries": (LLAMA, in_attention, "q_proj: gathered"),
    "llama, scaled before attention": (LLAMA, around_attention, "self_attn: gathered"),
    "llama4, temperature of 64 tokens": (LLAMA4, as_it_is, "self_attn: gathered"),
    "switch, capacity of 64 tokens": (SWITCH, as_it_is, "gathered: mixes tokens"),
}


def long_step(model: nn.Module) -> list[Tensor]:
    return loss_step(model, "plain", LENGTH)


def many_tokens(names: tuple[str, ...]) -> dict[str, tuple[dict[str, float], str]]:
    found = {}
    for name in names:
        tiny, change, _ = CASES[name]
        reference = tiny.build()
        change(reference)
        model = copy.deepcopy(reference)
        report = sp_attention.enable(model, "sdpa").report()
        found[name] = too_large(errors_of(reference, model, long_step), tiny.tolerance), report
    return found


@pytest.mark.parametrize("ranks", TWO_AND_THREE)
@pytest.mark.parametrize("name", CASES)
def test_what_begins_beyond_a_length_is_gathered(ranks: int, name: str, selected: Selected) -> None:
    for found in run_once(ranks, many_tokens, selected("name", ranks=ranks), timeout=300):
        errors, report = found[name]
        assert not errors
        assert CASES[name][2] in report
        assert "all else: position-wise" in report


class Late(Outside):
    """Does something else to what comes after 700 tokens, which no configuration says."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden * (1 + torch.arange(hidden.shape[1]).to(hidden) // 700)[:, None])


def later_than_proven() -> tuple[list[str], dict[str, float], dict[str, float]]:
    reference = LLAMA.build()
    in_mlp(Late)(reference)
    model, gathering, plain = copy.deepcopy(reference), copy.deepcopy(reference), LLAMA.build()
    refusals = []
    with sp_attention.enable(model, "sdpa"):
        short = errors_of(reference, model, lambda model: loss_step(model, "plain", 33))
        for _ in range(2):
            with pytest.raises(UnsupportedError) as refused:
                model(input_ids=torch.ones(1, 750, dtype=torch.int64))
            refusals.append(str(refused.value))
        model.zero_grad()
        reference.zero_grad()
        again = errors_of(reference, model, lambda model: loss_step(model, "plain", 65))
    sp_attention.enable(gathering, "sdpa", longest=1024)
    reference.zero_grad()
    long = errors_of(reference, gathering, lambda model: loss_step(model, "plain", 750))
    handle = sp_attention.enable(plain, "sdpa")
    fine = errors_of(LLAMA.build(), plain, lambda model: loss_step(model, "plain", 750))
    assert handle.hooks is not None
    assert handle.hooks.length_check is not None
    assert handle.hooks.length_check.proven == 1024
    return refusals, too_large(short | again), too_large(long | fine)


def test_longer_sequences_than_proven_are_tried_first() -> None:
    for refusals, short, long in run_ranks(2, later_than_proven, timeout=300):
        assert len(refusals) == 2
        for refusal in refusals:
            assert "model.layers.1 does something else" in refusal
            assert "enable(longest=1024)" in refusal
        assert not short
        assert not long


def test_lengths_in_a_configuration() -> None:
    assert length_beyond({}) == 516
    assert length_beyond({"hidden_size": 4096, "pad_token_id": 5000, "window": 700}) == 940
    assert length_beyond({"layers": {"capacity": [8192, None, True]}, "max_position_embeddings": 131072}) == 10308
