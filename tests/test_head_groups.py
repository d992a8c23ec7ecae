"""A group of heads at a time: the numbers of one process, with less of attention at a time."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from generating import MODELS as GENERATING
from helpers import Selected, ddp, errors_of, fsdp, loss_step, run_once, slopes, slow_but, too_large, two_forwards_step
from hypothesis import given
from hypothesis import strategies as st
from models import LLAMA, MODELS, Tiny
from test_mixers import MODELS as MIXERS
from tiled import as_it_is, checkpointed
from torch import Tensor, nn

import sp_attention
from sp_attention.launch import run_ranks
from sp_attention.ulysses import head_groups as groups
from sp_attention.ulysses.attention import attend_arrived

SIZES = st.tuples(st.integers(1, 8), st.integers(1, 5)).map(lambda pair: (pair[0] * pair[1], pair[1]))


@given(heads=SIZES, count=st.integers(1, 50))
def test_groups_have_every_head_once_and_kernels_can_group_them(heads: tuple[int, int], count: int) -> None:
    plan = groups.head_groups(*heads, count)
    assert list(itertools.chain(*plan.query)) == list(range(heads[0]))
    assert len(plan.query) <= count
    assert all(len(query) % len(kv) == 0 for query, kv in zip(plan.query, plan.kv, strict=True))
    assert all(plan.grouped)
    # As many groups as there are make the same ones.
    again = groups.head_groups(*heads, len(plan.query))
    assert (again.query, again.kv) == (plan.query, plan.kv)


def test_groups_of_some_sizes() -> None:
    def sizes(*of: int) -> list[tuple[int, int]]:
        plan = groups.head_groups(*of)
        return [(len(query), len(kv)) for query, kv in zip(plan.query, plan.kv, strict=True)]

    assert sizes(32, 8, 1) == [(32, 8)]
    assert sizes(32, 8, 4) == [(8, 2)] * 4
    assert sizes(6, 3, 2) == [(4, 2), (2, 1)]
    assert sizes(6, 3, 4) == [(2, 1)] * 3
    assert sizes(6, 3, 6) == [(1, 1)] * 6
    assert sizes(5, 1, 2) == [(3, 1), (2, 1)]


def left_padded(model: nn.Module) -> list[Tensor]:
    return loss_step(model, "left-padded")


def short(model: nn.Module) -> list[Tensor]:
    return loss_step(model, "plain", 7)


def packed(model: nn.Module) -> list[Tensor]:
    return loss_step(model, "packed")


def with_mask_tensor(model: nn.Module) -> list[Tensor]:
    """Another mask for each head."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 6, 33, 33, generator=generator) < 0.7
    mask |= torch.eye(33, dtype=torch.bool)
    return loss_step(model, "plain", attention_mask=mask)


def frozen(model: nn.Module) -> nn.Module:
    """What LoRA without it leaves: some projections that learn, in some layers."""
    model.requires_grad_(False)
    model.model.layers[1].self_attn.v_proj.requires_grad_(True)
    return model


@dataclass(frozen=True)
class Case:
    """A model, the groups that it is enabled with, what is done to it and to the reference, and to it alone."""

    tiny: Tiny = LLAMA
    head_groups: Any = 2
    step: Callable[[nn.Module], list[Tensor]] = left_padded
    backend: str = "sdpa"
    prepared: Callable[[nn.Module], nn.Module] = as_it_is
    wrapped: Callable[[nn.Module], nn.Module] = as_it_is
    early: bool = False
    options: dict[str, Any] = field(default_factory=dict)


GEMMA2 = Tiny("Gemma2ForCausalLM", {"sliding_window": 5}, 1e-3)
T5 = Tiny(GENERATING["t5"].cls, GENERATING["t5"].settings | {"dropout_rate": 0.0})
CASES = {
    "two groups": Case(),
    "two groups, short": Case(step=short),
    "two groups, packed": Case(step=packed),
    "two groups, early": Case(early=True),
    "a head at a time": Case(head_groups=6),
    "a head at a time, early": Case(head_groups=6, step=packed, early=True),
    "more than heads": Case(MODELS["llama-2q1kv"], 9),
    "auto": Case(head_groups="auto"),
    "one key head": Case(MODELS["llama-5q1kv"], 3),
    "window": Case(MODELS["mistral-window5"], 3),
    "gpt2": Case(MODELS["gpt2"]),
    "a mask tensor of heads": Case(head_groups=3, step=with_mask_tensor),
    # In float64 queries that see nothing are NaN in its own.
    "softcap, eager": Case(GEMMA2, 3, partial(loss_step, kind="plain"), backend="transformers:eager"),
    "sinks, eager": Case(GENERATING["gpt-oss"], 2, backend="transformers:eager"),
    "biases that learn": Case(T5, 2, partial(loss_step, kind="plain")),
    "a hybrid": Case(MIXERS["qwen3_next"], 2),
    "frozen": Case(prepared=frozen),
    "checkpointed": Case(step=two_forwards_step, wrapped=partial(checkpointed, reentrant=False)),
    "checkpointed, re-entrant": Case(step=two_forwards_step, wrapped=partial(checkpointed, reentrant=True)),
    "with tiles, checkpointed": Case(
        wrapped=partial(checkpointed, reentrant=False), options={"mlp_tile": 4, "loss_tile": 5}
    ),
    "ddp": Case(wrapped=ddp),
    "fsdp2": Case(wrapped=fsdp),
    "fsdp2, checkpointed": Case(head_groups=3, wrapped=lambda model: fsdp(checkpointed(model, reentrant=False))),
    "compiled": Case(MODELS["mistral-window5"], wrapped=partial(torch.compile, backend="aot_eager")),
}
QUICK = ("two groups, early", "a head at a time", "checkpointed", "biases that learn")


def compared(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {name: errors(CASES[name]) for name in names}


def errors(case: Case) -> dict[str, float]:
    asked: list[int] = []

    def counted(one: Any, *others: Any) -> Any:
        asked.append(one.query.shape[2])
        return attend_arrived(one, *others)

    groups.attend_arrived = counted
    groups.overlaps = lambda device: case.early
    reference, model = case.prepared(case.tiny.build()), case.prepared(case.tiny.build())
    handle = sp_attention.enable(model, backend=case.backend, head_groups=case.head_groups, **case.options)
    if case.head_groups == "auto":
        assert "as many as have 64 MiB on a rank, up to " in handle.report()
        assert asked
        return errors_of(reference, model, case.step)
    assert " groups, one after the other" in handle.report()
    asked.clear()
    found = errors_of(reference, case.wrapped(model), case.step)
    heads = getattr(model.config, "num_heads", None) or model.config.num_attention_heads
    assert 0 < max(asked) < heads, asked
    return found


@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))], ids="P{}".format
)
@pytest.mark.parametrize("name", slow_but(CASES, *QUICK))
def test_loss_and_gradients_are_those_of_one_process(name: str, ranks: int, selected: Selected) -> None:
    for found in run_once(ranks, compared, selected("name", ranks=ranks), timeout=400):
        assert not too_large(found[name], CASES[name].tiny.tolerance)


@pytest.mark.parametrize("name", ["two groups", "a head at a time", "softcap, eager"])
def test_one_rank_takes_groups_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for attribute in ("attend_arrived", "overlaps"):
        monkeypatch.setattr(groups, attribute, getattr(groups, attribute))
    assert not too_large(errors(CASES[name]), CASES[name].tiny.tolerance)


def gradients_with_dropout(checkpoints: bool) -> tuple[float, float]:
    """How the loss changes along a direction of the weights of attention that drops: by its gradient, by two losses."""
    model = Tiny("LlamaForCausalLM", {"attention_dropout": 0.3}).build()
    sp_attention.enable(model, backend="sdpa", head_groups=3)
    if checkpoints:
        checkpointed(model, reentrant=False)
    return slopes(model, [parameter for name, parameter in model.named_parameters() if ".self_attn." in name])


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True])
def test_dropout_draws_the_same_again_in_backward(checkpoints: bool) -> None:
    for by_gradient, by_losses in run_ranks(2, gradients_with_dropout, checkpoints):
        assert by_gradient == pytest.approx(by_losses, rel=1e-2)


def refused() -> list[str]:
    told = []
    for model, asked in ((LLAMA.build(), 0), (LLAMA.build(), "many"), (MIXERS["mamba2"].build(), 2)):
        with pytest.raises((ValueError, sp_attention.UnsupportedError)) as caught:
            sp_attention.enable(model, head_groups=asked)
        told.append(str(caught.value))
    return told


def test_what_cannot_be_is_refused() -> None:
    for none, many, nothing in run_ranks(2, refused):
        assert none == 'head_groups=0 is no number of groups, nor "auto"'
        assert many == "head_groups='many' is no number of groups, nor \"auto\""
        assert nothing.startswith("head_groups=2: nothing of Mamba2ForCausalLM attends by heads")


def test_auto_is_by_bytes() -> None:
    request = sp_attention.Request(
        *(torch.empty(1, 1, heads, 64, dtype=torch.bfloat16) for heads in (32, 8, 8)), mask=None, scale=1.0
    )
    # 80 heads of 128 bytes, 10 KiB for each token: 1 GiB of 102,400 on a rank alone, 250 MiB on one of four.
    assert groups.groups_for(request, 102_400, 1) == 16
    assert groups.groups_for(request, 102_400, 4) == 4
    assert groups.groups_for(request, 1024, 4) == 1
    # One head for each rank at least.
    assert groups.groups_for(request, 10**7, 4) == 8
    assert groups.groups_for(request, 10**7, 64) == 1
