"""Layers that are skipped at random: ranks decide alike, whatever the rehearsal drew; and draws that are harmless."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TWO_AND_THREE, be_quiet, errors_of, too_large
from models import LLAMA, Tiny, batch_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sp_attention
from sp_attention.launch import run_ranks
from sp_attention.region.harmless_draws import HarmlessDraws

# How likely a layer, or a sample in it, is skipped.
CHANCE = 0.5


class Skips(LlamaDecoderLayer):
    """Skips itself, or what it adds to some samples; `decisions` has what it drew, or will have drawn."""

    kind = "torch"
    decisions: list[Any]
    replays = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.training:
            return super().forward(hidden_states, *args, **kwargs)
        if self.replays:
            keeps = self.decisions.pop(0)
        else:
            keeps = self.drawn(*hidden_states.shape[:2])
            self.decisions.append(keeps)
        if isinstance(keeps, Tensor):
            return hidden_states + keeps * (super().forward(hidden_states, *args, **kwargs) - hidden_states)
        return super().forward(hidden_states, *args, **kwargs) if keeps else hidden_states

    def drawn(self, rows: int, length: int) -> Any:
        if self.kind == "torch":
            return torch.rand(()).item() >= CHANCE
        if self.kind == "python":
            return random.random() >= CHANCE
        if self.kind == "tokens":
            return torch.rand(rows, length).mean().item() >= CHANCE
        # Stochastic depth: of each sample.
        return torch.rand(rows, 1, 1, dtype=torch.float64).add(1 - CHANCE).floor()


def skipping(kind: str, drops: float) -> PreTrainedModel:
    model = LLAMA.build()
    for layer in model.model.layers:
        layer.__class__, layer.kind, layer.decisions = Skips, kind, []
        # So little that nothing is dropped, but drawn.
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(drops)) if drops else layer.mlp.act_fn
    return model


CASES = {
    "torch": ("torch", 0.0),
    "python": ("python", 0.0),
    "rows": ("rows", 0.0),
    # Of what each rank draws for its own tokens, so there is no saying that all decide alike.
    "tokens": ("tokens", 0.0),
    # Then they draw for tokens too.
    "torch with dropout": ("torch", 1e-12),
    "python with dropout": ("python", 1e-12),
}
FORWARDS = 6


# Errors of some forwards and their backward, what was decided in them, and what enable() reports.
Found = tuple[dict[str, float], list[Any], str]


def skipped() -> dict[str, Found]:
    be_quiet()
    return {name: skipped_in(*case) for name, case in CASES.items()}


def skipped_in(kind: str, drops: float) -> Found:
    model, reference = skipping(kind, drops), skipping(kind, drops)
    handle = sp_attention.enable(model, backend="sdpa")
    torch.manual_seed(3)

    def step(one: PreTrainedModel) -> list[Tensor]:
        losses = [one(**batch_of("left-padded", 21)).loss for _ in range(FORWARDS)]
        torch.stack(losses).sum().backward()
        return [loss.detach() for loss in losses]

    losses = step(model)
    decided = [list(layer.decisions) for layer in model.model.layers]
    for layer, decisions in zip(reference.model.layers, decided, strict=True):
        layer.replays, layer.decisions = True, list(decisions)
    errors = errors_of(reference, model, lambda one: step(one) if one is reference else losses)
    return errors, [torch.as_tensor(one).tolist() for one in decided[0] + decided[1]], handle.report()


@pytest.mark.parametrize("ranks", TWO_AND_THREE)
def test_a_layer_that_skips_itself_does_so_on_all_ranks(ranks: int) -> None:
    first, *others = run_ranks(ranks, skipped, timeout=250)
    for name, (errors, decided, report) in first.items():
        assert not too_large(errors), (name, report)
        assert all(other[name][1] == decided for other in others), name
        assert len({str(one) for one in decided}) > 1, "all forwards decided alike"
        is_whole = "all of it: gathered" in report
        assert is_whole == (name in ("tokens", "torch with dropout")), (name, report)


LAYERDROP = {"encoder_layerdrop": CHANCE, "decoder_layerdrop": CHANCE, "dropout": 0.0}
BART = Tiny(
    "BartForConditionalGeneration",
    {
        "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
        "decoder_attention_heads": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2,
        "forced_eos_token_id": None, **LAYERDROP,
    },
)  # fmt: skip


def layers_dropped() -> tuple[dict[str, float], int]:
    """Errors with layers that the model does not call at random, of each forward; and how many calls were left out."""
    be_quiet()
    torch.manual_seed(0)
    reference, model = BART.build(), BART.build()
    torch.manual_seed(2)  # With which the rehearsal's own draws would have dropped layers.
    sp_attention.enable(model, backend="sdpa")
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    calls: list[nn.Module] = []
    for layer in [*reference.model.encoder.layers, *reference.model.decoder.layers]:
        layer.register_forward_hook(lambda module, *_: calls.append(module))

    def step(one: PreTrainedModel) -> list[Tensor]:
        losses = []
        for seed in range(8):
            torch.manual_seed(seed)
            if one is reference:
                torch.randint(2**62, ())  # The seed that ranks agree on comes first.
            losses.append(one(input_ids=ids, labels=ids[:, :17].clone()).loss)
        torch.stack(losses).sum().backward()
        return [loss.detach() for loss in losses]

    errors = errors_of(reference, model, step)
    return {name: one for name, one in errors.items() if not name.endswith("k_proj.bias")}, 8 * 4 - len(calls)


def test_layers_that_a_model_drops_are_dropped_exactly() -> None:
    for errors, left_out in run_ranks(2, layers_dropped, timeout=200):
        assert not too_large(errors)
        assert left_out > 8


def test_draws_are_harmless_and_told() -> None:
    shapes: list[torch.Size] = []
    ones = torch.ones(2, 3)
    with HarmlessDraws(shapes.append):
        for almost_one in (torch.rand(2, 3), torch.rand_like(ones), torch.empty(2, 3).uniform_()):
            assert ((almost_one < 1) & (almost_one > 0.999)).all()
        assert torch.equal(torch.empty(2, 3).uniform_(0.5, 1.5), ones)
        assert torch.equal(torch.randn(2, 3) + torch.randn_like(ones) + torch.normal(ones, 2.0), ones)
        assert torch.equal(torch.bernoulli(torch.tensor([0.5, 0.0])), torch.tensor([1.0, 0.0]))
        assert torch.equal(torch.empty(2, 3).bernoulli_(0.1), ones)
        assert torch.equal(F.gumbel_softmax(ones, hard=False), ones / 3)
        assert len(shapes) == 10
        # No number is set to zero, and all are scaled alike.
        for dropped in (F.dropout(ones, 0.5), F.dropout1d(ones, 0.5), F.alpha_dropout(ones, 0.5, training=True)):
            assert len(dropped.unique()) == 1
            assert dropped.all()
        query = torch.ones(1, 2, 4, 8)
        assert len(F.scaled_dot_product_attention(query, query, query, dropout_p=0.5).unique()) == 1
        told = len(shapes)
        F.scaled_dot_product_attention(query, query, query)
        F.dropout(ones, 0.0)
        assert len(shapes) == told
        # What is neither is at least the same each time.
        assert torch.equal(torch.randint(9, (5,)), torch.randint(9, (5,)))
        assert torch.equal(torch.randperm(9), torch.randperm(9))
    assert shapes[0] == (2, 3)
    with HarmlessDraws(skips=True):
        assert not any(one.any() for one in (torch.rand(2, 3), torch.bernoulli(ones / 2), torch.empty(3).uniform_()))
