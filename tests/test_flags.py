"""Flags that layers were not proven with: what they return then is whole, or refused."""

from typing import Any

import pytest
import torch
from helpers import TWO_AND_THREE, errors_of, run_once, spy
from models import LLAMA, batch_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks
from sp_attention.region.flags import flags_of, names_of_arguments


class Telling(LlamaDecoderLayer):
    """Returns more for each token, a sum over tokens and a number, if a flag asks for it, or an attribute."""

    asked = False

    def forward(self, hidden_states: Tensor, *args: Any, tells: Any = False, **kwargs: Any) -> Any:
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        if not (tells or self.asked):
            return hidden_states
        more = hidden_states.tanh(), hidden_states.square().sum(1), hidden_states.square().mean()
        return (hidden_states, *more)


def telling(asked: bool = False) -> PreTrainedModel:
    model = LLAMA.build()
    for layer in model.model.layers:
        layer.__class__ = Telling
        layer.asked = asked
    return model


def step(model: PreTrainedModel, **tells: Any) -> list[Tensor]:
    """The layers one after the other, within a forward of the model's own."""
    batch = batch_of("plain", 33)
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return None
        kept.extend(output[1:])
        return output[0]

    # Outside of the region, so that they see what the rest of the model would.
    keep.__module__ = "transformers.test"  # To the region, one that is known.
    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    try:
        loss = model(**batch, **tells).loss + sum(one.square().mean() for one in kept)
    finally:
        for hook in hooks:
            hook.remove()
    loss.backward()
    return [loss.detach(), *(one.detach() for one in kept)]


def asked(name: str) -> dict[str, float]:
    reference, model = telling(), telling()
    sp_attention.enable(model, backend="sdpa")
    values = {"a flag": True, "a word": "much", "a number": 3}
    return errors_of(reference, model, lambda model: step(model, tells=values[name]))


@pytest.mark.parametrize("name", ["a flag", "a word", "a number"])
@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
def test_what_a_flag_asks_for_is_whole(ranks: int, name: str) -> None:
    for errors in run_once(ranks, asked, name):
        assert max(errors.values()) < 1e-5, errors


def asked_by_an_attribute() -> str:
    model = telling()
    sp_attention.enable(model, backend="sdpa")
    for layer in model.model.layers:
        layer.asked = True
    with pytest.raises(UnsupportedError) as refusal:
        step(model, tells=False)
    return str(refusal.value)


def test_what_nothing_tells_of_is_refused() -> None:
    first, second = run_ranks(2, asked_by_an_attribute)
    assert first.startswith("model.layers.0: the result 0 [2, 17, 48] was not there in the rehearsal of enable()")
    assert second.startswith("model.layers.0: the result 0 [2, 16, 48] was not there in the rehearsal of enable()")


def test_flags_have_names() -> None:
    names = names_of_arguments(Telling(LLAMA.build().config, 0))
    assert names[0] == "hidden_states"
    args, kwargs = (torch.zeros(1), None, True), {"use_cache": True, "tells": {"this": "much"}, "length": 7}
    assert flags_of(("hidden", "mask", "all"), args, kwargs) == {
        ("all", True),
        ("tells.this", "much"),
        ("length", "a number"),
    }


def lengths_seen() -> list[int]:
    """How many tokens an MLP sees of packed documents that the batch tells of in each way."""
    model, seen = LLAMA.build(), []
    sp_attention.enable(model, backend="sdpa")
    model.model.layers[0].mlp.register_forward_hook(spy(lambda module, args, output: seen.append(output.shape[1])))
    begins, positions = torch.tensor([0, 9, 33]), torch.cat([torch.arange(9), torch.arange(24)])[None]
    batch = {name: batch_of("plain", 33)[name][:1] for name in ("input_ids", "labels")}
    told = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": 24, "max_length_k": 24}
    for more in ({}, told, {"seq_idx": torch.zeros(1, 33, dtype=torch.int32)}):
        model(**batch, position_ids=positions, **more).loss.backward()
    return seen


def test_what_tells_of_packed_documents_asks_a_layer_for_nothing_more() -> None:
    assert run_ranks(2, lengths_seen, timeout=30) == [[17] * 3, [16] * 3]
