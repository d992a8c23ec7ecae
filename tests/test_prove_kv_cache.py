"""What enable() proves of key/value caches of models inside of others."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generating import GREEDY, MODELS, distance, generated, prompt
from helpers import Selected, run_once
from models import LLAMA
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import sp_attention
from sp_attention.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore")


class Captions(PreTrainedModel):
    """A model that takes no cache, with one inside that generates with one, as for images."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__(copy.deepcopy(language_model.config))
        self.language_model = language_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        return self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask, **options)

    def generate(self, input_ids: Tensor, **options: Any) -> Any:
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        return self.language_model.generate(inputs_embeds=embeddings, **options)


class Forgetful(LlamaForCausalLM):
    """It does not return its cache."""

    def forward(self, *args: Any, use_cache: bool = True, **kwargs: Any) -> Any:
        output = super().forward(*args, use_cache=use_cache, **kwargs)
        return CausalLMOutputWithPast(loss=output.loss, logits=output.logits)


class Bypassing(Captions):
    """It calls a part of the model that generates."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        hidden = self.language_model.model(input_ids, attention_mask=attention_mask, **options).last_hidden_state
        return CausalLMOutputWithPast(logits=self.language_model.lm_head(hidden))


INSIDE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: Captions(LLAMA.build()),
    "bloom": lambda: Captions(MODELS["bloom"].build()),
    "llama, forgetful": lambda: Captions(Forgetful(LLAMA.build().config).double()),
    "llama, bypassed": lambda: Bypassing(LLAMA.build()),
}
# What the report says of caches.
TOLD = {
    "llama": "hold this rank's heads",
    "bloom": "are whole on every rank",
    "llama, forgetful": "are refused: Forgetful does not go on from a cache: it returns no cache of transformers' kind",
    "llama, bypassed": "are refused: LlamaForCausalLM does not go on from a cache: the rehearsal of enable() does not "
    "show what tokens it is given",
}


def caches_of_models_inside(name: str) -> tuple[str, float | str]:
    """What the report says of them, and how far generation is from that of one process, or why it is refused."""
    reference = INSIDE[name]().eval()
    model = copy.deepcopy(reference)
    handle = sp_attention.enable(model, "sdpa")
    told = next(line for line in handle.report().splitlines() if "key/value caches" in line)
    inputs = {"input_ids": prompt(model)}
    # Whatever becomes of caches, the model itself is shared.
    torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits)
    try:
        return told, distance(generated(model, inputs, **GREEDY), generated(reference, inputs, **GREEDY))
    except UnsupportedError as refusal:
        return told, str(refusal)


def caches_of_all(names: tuple[str, ...]) -> dict[str, tuple[str, float | str]]:
    return {name: caches_of_models_inside(name) for name in names}


@pytest.mark.parametrize("name", INSIDE)
def test_caches_of_a_model_inside_one_that_takes_none_are_proven(name: str, selected: Selected) -> None:
    for found in run_once(3, caches_of_all, selected("name"), timeout=120):
        told, came = found[name]
        assert told == f"  key/value caches {TOLD[name]}"
        if TOLD[name].startswith("are refused: "):
            assert TOLD[name].removeprefix("are refused: ") in str(came)
            assert "within handle.suspended()" in str(came)
        else:
            assert came == pytest.approx(0, abs=1e-5)
