"""What models take whose forward names nothing: forward(*args, **kwargs)."""

from typing import Any

import torch
from helpers import errors_of, too_large
from models import COMMON, LLAMA, batch_of
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedModel

import sp_attention
from sp_attention.launch import run_ranks
from sp_attention.region.plan import names_taken


class Derived(LlamaForCausalLM):
    """As ColQwen2, whose forward projects what that of its class returns: of real tokens only."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.projection = nn.Linear(config.hidden_size, 7)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("output_hidden_states", None)
        states = self.model(*args, **kwargs).last_hidden_state
        return self.projection(states) * kwargs["attention_mask"].unsqueeze(-1)


class Wraps(PreTrainedModel):
    """As GLiClass, which passes on what it is given to a model inside."""

    config_class = BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = BertModel(config)
        self.head = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.head(self.inner(*args, **kwargs).last_hidden_state)


def build(kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = LLAMA.build().config if kind is Derived else BertConfig(**COMMON, **off)
    return kind(config).double().train()


def step(model: nn.Module, by_place: bool) -> list[Tensor]:
    batch = batch_of("right-padded", 33)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model.zero_grad()
    output = model(ids, attention_mask=mask) if by_place else model(input_ids=ids, attention_mask=mask)
    real = output * mask.unsqueeze(-1)
    real.square().mean().backward()
    return [real.detach()]


def errors() -> dict[str, float]:
    """Of both models, given their tokens by name and by place."""
    found = {}
    for kind in (Derived, Wraps):
        reference, model = build(kind), build(kind)
        sp_attention.enable(model, backend="sdpa")
        for by_place in (False, True):
            some = errors_of(reference, model, lambda each, by_place=by_place: step(each, by_place))
            # Which does not matter to attention.
            found |= {f"{kind.__name__}, {name}": error for name, error in some.items() if "key.bias" not in name}
    return found


def test_models_that_pass_on_what_they_are_given_are_exact() -> None:
    for found in run_ranks(2, errors):
        assert not too_large(found)


def test_the_names_are_those_of_the_class_it_derives_from_or_the_usual_ones() -> None:
    assert names_taken(build(Derived)) == names_taken(LLAMA.build())
    assert names_taken(build(Wraps)) == {"input_ids", "attention_mask", "position_ids", "token_type_ids", "use_cache"}
