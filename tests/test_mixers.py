"""Mixers by heads and by halo on several ranks, against one process; and what is not as its function says."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import (
    TWO_AND_THREE,
    Selected,
    be_quiet,
    errors_of,
    largest_error,
    loss_step,
    relative_error,
    run_once,
    slow_but,
    too_large,
    two_forwards_step,
    world,
)
from mixing import KNOWN, convolution
from models import LLAMA, Tiny, batch_of
from torch import Tensor, nn
from torch.nn import functional as F

import sp_attention
from sp_attention.distributed.collectives import gather, mean_over_ranks
from sp_attention.launch import run_ranks
from sp_attention.mixers import Scan, functions
from sp_attention.mixers.call import Call
from sp_attention.mixers.exchange import run_shared
from sp_attention.mixers.rebinding import rebound
from sp_attention.mixers.testing import Shape, results_of

GDN = {"linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "experts_implementation": "eager"}
MAMBA2 = {"state_size": 8, "chunk_size": 16, "conv_kernel": 4, "expand": 2, "head_dim": 16}
# With the types whose functions compute in float32 at the tolerance of that.
MODELS = {
    # Of its key heads, two ranks share one.
    "qwen3_next": Tiny("Qwen3NextForCausalLM", GDN | MOE | HYBRID, 1e-3),
    # On three ranks, one has no heads.
    "qwen3_next-2v1k": Tiny(
        "Qwen3NextForCausalLM", GDN | MOE | HYBRID | {"linear_num_key_heads": 1, "linear_num_value_heads": 2}, 1e-3
    ),
    "mamba2": Tiny("Mamba2ForCausalLM", MAMBA2 | {"num_heads": 6, "n_groups": 2}, 1e-3),
    "lfm2": Tiny("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 4}),
}
HOW = {
    "qwen3_next": "linear_attn: head-parallel (gated delta rule, convolution by halo)",
    "qwen3_next-2v1k": "linear_attn: head-parallel (gated delta rule, convolution by halo)",
    "mamba2": "mixer: head-parallel (Mamba-2 scan, convolution by halo)",
    "lfm2": "conv: on this rank's tokens (convolution by halo)",
}
# Of 8 tokens, three ranks have spans that are shorter than the convolution.
STEPS: dict[str, Callable[[nn.Module], Any]] = {
    "left-padded": lambda model: loss_step(model, "left-padded", 33),
    "short": lambda model: loss_step(model, "plain", 8),
    "shortest": lambda model: loss_step(model, "plain", 3),
}
WIDER: dict[str, Callable[[nn.Module], Any]] = {
    "whole chunks": lambda model: loss_step(model, "right-padded", 64),
    "several chunks": lambda model: loss_step(model, "plain", 201),
    "packed": lambda model: loss_step(model, "packed", 33),
    "two forwards": two_forwards_step,
}


def compared(names: tuple[str, ...], steps: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    be_quiet()
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        tiny = MODELS[name]
        reference, model = tiny.build(), tiny.build()
        handle = sp_attention.enable(model, backend="sdpa")
        assert HOW[name] in handle.report(), handle.report()
        found[name] = {}
        for step in steps:
            reference.zero_grad()
            model.zero_grad()
            errors = errors_of(reference, model, (STEPS | WIDER)[step])
            found[name][step] = too_large(errors, tiny.tolerance)
    return found


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_one_process(name: str, ranks: int, selected: Selected) -> None:
    for found in run_once(ranks, compared, selected("name", ranks=ranks), tuple(STEPS), timeout=200):
        assert found[name] == {step: {} for step in STEPS}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4], ids="P{}".format)
@pytest.mark.parametrize("name", MODELS)
def test_so_they_are_of_longer_sequences(name: str, ranks: int, selected: Selected) -> None:
    for found in run_once(ranks, compared, selected("name", ranks=ranks), tuple(STEPS | WIDER), timeout=500):
        assert found[name] == {step: {} for step in STEPS | WIDER}


def in_documents(hidden_states: Tensor, weight: Tensor, seq_idx: Tensor | None = None, **_: Any) -> Tensor:
    """A convolution that is told of documents, of the whole sequence."""
    numbers = 0 if seq_idx is None else seq_idx.cumsum(1)[:, None]
    return causal_conv1d_fn(hidden_states, weight) + numbers * hidden_states


def documents(shape: Shape) -> dict[str, Any]:
    given = convolution(replace(shape, with_state=False))
    assert given is not None
    return given | {"seq_idx": torch.arange(shape.length).expand(shape.batch, -1) // 5}


def refuses_documents(value: Tensor, query: Tensor, cu_seqlens: Tensor | None = None, **_: Any) -> Tensor:
    if cu_seqlens is not None:
        raise ValueError(f"{len(cu_seqlens)} bounds")
    return value


def refusing() -> str:
    tensor = torch.ones(1, 4, 2, 3)
    call = Call(refuses_documents, (), (), {"value": tensor, "query": tensor, "cu_seqlens": torch.tensor([0, 5, 12])})
    with pytest.raises(ValueError, match="3 bounds") as error:
        run_shared(functions.GATED_DELTA_RULE, call, 12, world())
    return str(error.value)


def test_what_a_function_refuses_is_refused_by_a_rank_without_heads_too() -> None:
    assert run_ranks(3, refusing) == ["3 bounds"] * 3


CALLS = KNOWN | {"in documents": (functions.CONVOLUTION, in_documents, documents)}
SHAPES = {
    "uneven": Shape(),
    "few heads": Shape(heads=2, groups=1),
    "few tokens": Shape(length=6),
    "states": Shape(7, with_state=True),
}


def exchanged() -> dict[tuple[str, str], dict[str, float]]:
    found = {}
    for (name, (mixer, function, arguments)), (kind, shape) in product(CALLS.items(), SHAPES.items()):
        given = arguments(shape)
        if given is not None:
            whole = results_of(Call.run, function, given)
            ours = results_of(partial(from_spans, mixer, shape.length), function, given)
            ours |= {one: mean_over_ranks(ours[one], world()) for one in ours if one.startswith("the gradient")}
            found[name, kind] = too_large({one: relative_error(ours[one], whole[one]) for one in whole})
    return found


def from_spans(mixer: Any, length: int, call: Call) -> Any:
    """What a call returns of which each rank makes its span, whole."""
    peers, is_scan = world(), isinstance(mixer, Scan)
    span = peers.span(length)
    dims = {name: cut.tokens for name, cut in mixer.arguments.items()} if is_scan else {"hidden_states": 2}
    given = [(name, call.named.get(name), dim) for name, dim in dims.items() if dim is not None]
    mine = {name: one.narrow(dim, span.start, len(span)) for name, one, dim in given if one is not None}
    result = run_shared(mixer, call.with_others(mine), length, peers)
    out, *state = result if isinstance(result, tuple) else (result,)
    return gather(out, length, peers, mixer.result.tokens if is_scan else 2), *state


def test_what_ranks_exchange_gives_what_one_process_gives() -> None:
    for found in run_ranks(3, exchanged, timeout=120):
        assert len(found) > 2 * len(KNOWN)
        assert {key: errors for key, errors in found.items() if errors} == {}


# Tokens and heads of each call of the function below.
SEEN: list[tuple[int, int]] = []


# What follows is in float64 throughout: functions of our own, by the names that the library knows.
def chunk_gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Yang et al. 2024 (arXiv 2412.06464), section 3, token by token."""
    SEEN.append((value.shape[1], value.shape[2]))
    state = value.new_zeros(*value.shape[:1], *value.shape[2:], query.shape[-1])
    outs = []
    for i in range(value.shape[1]):
        state = state * g[:, i, :, None, None].exp()
        change = (value[:, i] - torch.einsum("bhvk,bhk->bhv", state, key[:, i])) * beta[:, i, :, None]
        state = state + change[..., None] * key[:, i, :, None]
        outs.append(torch.einsum("bhvk,bhk->bhv", state, query[:, i]))
    return torch.stack(outs, 1)


def causal_conv1d_fn(hidden_states: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(hidden_states, (weight.shape[-1] - 1, 0))
    return F.conv1d(padded, weight[:, None], groups=weight.shape[0])


class DeltaNet(nn.Module):
    """A gated delta net of 5 heads, in place of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(48, 5 * (4 + 4 + 4 + 1 + 1), dtype=torch.float64)
        self.weight = nn.Parameter(torch.randn(60, 4, dtype=torch.float64))
        self.out = nn.Linear(20, 48, dtype=torch.float64)

    def forward(self, hidden: Tensor) -> Tensor:
        qkv, gates = self.project(self.seen(hidden)).split((60, 10), -1)
        mixed = causal_conv1d_fn(qkv.transpose(1, 2), self.weight).transpose(1, 2)
        query, key, value = mixed.unflatten(2, (3, 5, 4)).unbind(2)
        g, beta = gates.chunk(2, -1)
        mixed = chunk_gated_delta_rule(query, key / 4, value, g=self.decay(-F.softplus(g)), beta=beta.sigmoid())
        return self.out(mixed.flatten(2))

    def seen(self, hidden: Tensor) -> Tensor:
        return hidden

    def decay(self, g: Tensor) -> Tensor:
        return g


class LooksAhead(DeltaNet):
    def seen(self, hidden: Tensor) -> Tensor:
        return hidden + hidden.roll(-1, 1)


class DecaysByPosition(DeltaNet):
    def decay(self, g: Tensor) -> Tensor:
        return g * (1 + torch.arange(g.shape[1]).to(g)[:, None] / 10)


class DecaysLater(DeltaNet):
    """Unlike in the few tokens of the rehearsal of whole models."""

    def decay(self, g: Tensor) -> Tensor:
        return g * (1 + torch.arange(g.shape[1]).to(g)[:, None] // 20)


def with_function(**others: Callable[..., Any]) -> type[DeltaNet]:
    """A kind whose forward finds another function under a name that the library knows."""

    class Other(DeltaNet):
        forward = rebound(DeltaNet.forward, others)

    return Other


def looks_ahead(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return chunk_gated_delta_rule(query.roll(-1, 1), key, value, g, beta)


def decays_by_position(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return chunk_gated_delta_rule(query, key, value, g * torch.arange(g.shape[1]).to(g)[:, None] / 10, beta)


def heads_meet(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return chunk_gated_delta_rule(query, key, value + value.mean(2, keepdim=True), g, beta)


class MeetInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + grad.mean(2, keepdim=True)


def gradients_meet(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return chunk_gated_delta_rule(query, key, MeetInBackward.apply(value), g, beta)  # type: ignore[no-untyped-call]


def is_wider(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """A convolution that looks one column further back than its weight has columns."""
    return causal_conv1d_fn(hidden_states, F.pad(weight, (1, 0), value=0.5))


def is_not_causal(hidden_states: Tensor, weight: Tensor) -> Tensor:
    return causal_conv1d_fn(hidden_states.roll(-1, 2), weight)


SHARED = "mlp: head-parallel (gated delta rule, convolution by halo)"
WHOLE = "mlp: gathered: mixes tokens"
# What stands in the place of an MLP, and what is said of it: all of it is exact.
KINDS: dict[str, tuple[type[DeltaNet], str]] = {
    "as declared": (DeltaNet, SHARED),
    # What a function does along the sequence is its own affair, since it is given all of it.
    "a function that looks ahead": (with_function(chunk_gated_delta_rule=looks_ahead), SHARED),
    "a function that decays by position": (with_function(chunk_gated_delta_rule=decays_by_position), SHARED),
    "a forward that looks ahead": (LooksAhead, WHOLE),
    "a forward that decays by position": (DecaysByPosition, WHOLE),
    "a forward that decays by position later": (DecaysLater, WHOLE),
    "heads that meet": (with_function(chunk_gated_delta_rule=heads_meet), WHOLE),
    "gradients of heads that meet": (with_function(chunk_gated_delta_rule=gradients_meet), WHOLE),
    "a convolution that is wider than its weight": (with_function(causal_conv1d_fn=is_wider), WHOLE),
    "a convolution that is not causal": (with_function(causal_conv1d_fn=is_not_causal), WHOLE),
}


def pair_with(kind: type[DeltaNet]) -> tuple[Any, Any]:
    models = LLAMA.build(), LLAMA.build()
    for model in models:
        torch.manual_seed(1)
        model.model.layers[1].mlp = kind()
    return models


def in_place_of_mlps(names: tuple[str, ...]) -> dict[str, tuple[dict[str, float], list[str]]]:
    be_quiet()
    found = {}
    for name in names:
        reference, model = pair_with(KINDS[name][0])
        report = sp_attention.enable(model, backend="sdpa").report()
        SEEN.clear()
        errors = errors_of(reference, model, lambda each: loss_step(each, "left-padded", 70))
        mine = 3 - dist.get_rank() if KINDS[name][1] == SHARED else 5
        assert [(70, 5), (70, mine)] == SEEN, name
        found[name] = too_large(errors), [how for how in (SHARED, WHOLE) if how in report]
    return found


QUICK = ("as declared", "a forward that decays by position later", "heads that meet")


@pytest.mark.parametrize("name", slow_but(KINDS, *QUICK, "a convolution that is wider than its weight"))
def test_what_is_not_as_declared_is_exact_and_gathered(name: str, selected: Selected) -> None:
    for found in run_once(2, in_place_of_mlps, selected("name"), timeout=300):
        assert found[name] == ({}, [KINDS[name][1]])


def leaves_nothing() -> None:
    reference, model = pair_with(DeltaNet)
    mixer, own = model.model.layers[1].mlp, DeltaNet.forward
    handle = sp_attention.enable(model, backend="sdpa")
    assert DeltaNet.forward is own
    copied = copy.deepcopy(model)
    assert copied.model.layers[1].mlp.forward.__self__ is copied.model.layers[1].mlp
    assert largest_error(reference, copied, loss_step) < 1e-5
    reference.zero_grad()
    with handle.suspended():
        assert "forward" not in vars(mixer)
    assert largest_error(reference, model, loss_step) < 1e-5
    handle.disable()
    assert "forward" not in vars(mixer)
    assert DeltaNet.forward is own
    # What others put there is theirs: whole tensors.
    seen = []

    def others(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[1])
        return own(mixer, hidden)

    mixer.forward = others
    handle = sp_attention.enable(model, backend="sdpa")
    assert WHOLE in handle.report()
    reference.zero_grad()
    model.zero_grad()
    seen.clear()
    assert largest_error(reference, model, loss_step) < 1e-5
    assert seen == [33]
    handle.disable()
    assert mixer.forward is others


def test_nothing_is_left_of_it_and_copies_have_their_own() -> None:
    run_ranks(2, leaves_nothing)


def wrapped_later() -> None:
    reference, model = pair_with(DeltaNet)
    mixer = model.model.layers[1].mlp
    sp_attention.enable(model, backend="sdpa")
    inner, seen = mixer.forward, []

    def wrapper(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[1])
        return inner(hidden)

    mixer.forward = wrapper
    assert largest_error(reference, model, loss_step) < 1e-5
    assert seen == [33]


def test_with_a_forward_of_others_around_it_it_is_given_whole_tensors() -> None:
    run_ranks(2, wrapped_later)


def checkpointed(reentrant: bool) -> dict[str, dict[str, float]]:
    be_quiet()
    found = {}
    for name, tiny in MODELS.items():
        reference, model = tiny.build(), tiny.build()
        for each in (reference, model):
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        sp_attention.enable(model, backend="sdpa")
        found[name] = too_large(errors_of(reference, model, two_forwards_step), tiny.tolerance)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_again_by_heads(reentrant: bool) -> None:
    for found in run_ranks(3, checkpointed, reentrant, timeout=300):
        assert found == {name: {} for name in MODELS}


def generated() -> dict[str, float]:
    be_quiet()
    found = {}
    for name, tiny in MODELS.items():
        reference, model = tiny.build().eval(), tiny.build().eval()
        assert "mixers fill theirs by heads" in sp_attention.enable(model, backend="sdpa").report()
        batch = batch_of("left-padded", 17)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        options = {"max_new_tokens": 7, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        ours, theirs = (each.generate(**inputs, **options) for each in (model, reference))
        assert torch.equal(ours.sequences, theirs.sequences), name
        found[name] = relative_error(torch.stack(ours.scores), torch.stack(theirs.scores))
    return found


@pytest.mark.slow
def test_generated_tokens_are_those_of_one_process() -> None:
    for found in run_ranks(3, generated, timeout=300):
        assert all(error < MODELS[name].tolerance for name, error in found.items()), found


def compiled() -> float:
    be_quiet()
    reference, model = pair_with(DeltaNet)
    sp_attention.enable(model, backend="sdpa")
    return largest_error(reference, torch.compile(model, backend="eager"), loss_step)


@pytest.mark.slow
def test_a_compiled_model_runs_them_as_they_are() -> None:
    assert max(run_ranks(2, compiled, timeout=300)) < 1e-5
