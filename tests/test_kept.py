"""What forwards write into modules: enable() and disable() give it back, and no forward of the rehearsal sees it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from helpers import be_quiet, errors_of, largest_error, loss_step, too_large
from models import LLAMA, Tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks
from sp_attention.region.kept import Attributes, Buffers


class Writes(nn.Module):
    """An MLP that forgets nothing: attributes, containers, modules, modes and buffers are others after each forward."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.last, self.length, self.seen, self.by_name = mlp, nn.Identity(), None, [], {"first": None}
        self.register_buffer("count", torch.zeros(2, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        # Exact for a part of the tokens alone, as long as nothing is left of earlier forwards.
        scale = 1.0 if self.length is None else 0.5
        self.length, self.latest = hidden.shape[1], hidden
        self.seen.append(hidden)
        self.by_name["first"] = hidden
        self.last, self.count = nn.Identity(), self.count + 1
        return self.last(self.mlp(hidden)) * scale


def writing() -> PreTrainedModel:
    model = LLAMA.build()
    model.model.layers[1].mlp = Writes(model.model.layers[1].mlp)
    return model


def held(model: PreTrainedModel) -> dict[str, Any]:
    """All that the modules and configurations of a model hold, but for hooks; containers by what is in them."""
    found: dict[str, Any] = {}
    for name, module in [*model.named_modules(), ("config", model.config)]:
        for key, value in vars(module).items():
            if "hooks" not in key:
                contents = [*value.items()] if isinstance(value, dict) else [*value] if type(value) is list else value
                found[f"{name}.{key}"] = contents
    return found


def is_same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    def alike(one: Any, other: Any) -> bool:
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            return len(one) == len(other) and all(map(alike, one, other))
        return one is other or (not isinstance(one, (Tensor, nn.Module)) and one == other)

    return now.keys() == before.keys() and all(alike(now[key], before[key]) for key in before)


def nllb() -> PreTrainedModel:
    tiny = Tiny(
        "NllbMoeForConditionalGeneration",
        {
            "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
            "decoder_attention_heads": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_experts": 4,
            "encoder_sparse_step": 2, "decoder_sparse_step": 2, "decoder_start_token_id": 2, "moe_token_dropout": 0.0,
            "dropout": 0.0, "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
        },
    )  # fmt: skip
    return tiny.build(torch.float32)


def big_bird() -> PreTrainedModel:
    settings = {
        "block_size": 4,
        "num_random_blocks": 1,
        "attention_type": "block_sparse",
        "max_position_embeddings": 128,
    }
    return Tiny("BigBirdForMaskedLM", settings).build()


def big_bird_pegasus() -> PreTrainedModel:
    settings = {
        "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2,
        "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 128,
    }  # fmt: skip
    return Tiny("BigBirdPegasusForConditionalGeneration", settings).build()


def classifier() -> PreTrainedModel:
    """The first loss writes what kind of problem it is for into the configuration."""
    return Tiny("LlamaForSequenceClassification", {"num_labels": 3}).build()


BUILT: dict[str, Callable[[], PreTrainedModel]] = {
    "writes": writing, "nllb-moe": nllb, "bigbird": big_bird, "classifier": classifier,
}  # fmt: skip


def kept() -> dict[str, list[bool]]:
    """Whether models hold what they held: after enable(), after disable(), and after a refusal."""
    be_quiet()
    found = {}
    for name, build in BUILT.items():
        model = build()
        before = held(model)
        handle = sp_attention.enable(model, backend="sdpa")
        now = {key: value for key, value in held(model).items() if "_handle" not in key}
        # Ours: the attention that the configuration names, the loss function, and forwards of models.
        ours = {key for key in now if key.endswith(("_attn_implementation_internal", "_loss_function", ".forward"))}
        found[name] = [is_same({key: now[key] for key in now if key not in ours},
                               {key: before[key] for key in before if key not in ours})]  # fmt: skip
        handle.disable()
        found[name].append(is_same(held(model), before))
    model = writing()
    model.model.layers = nn.ModuleList(Recorded(layer) for layer in model.model.layers)
    before = held(model)
    with pytest.raises(UnsupportedError):
        sp_attention.enable(model, backend="sdpa", mlp_tile=8)
    found["refused"] = [is_same(held(model), before)]
    return found


class Recorded(nn.Module):
    """A layer of which nothing can be given tiles: it is one part."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.latest = self.layer(hidden + hidden.mean(1, keepdim=True), *args, **kwargs)
        return self.latest


def test_modules_hold_what_they_held() -> None:
    for found in run_ranks(2, kept, timeout=200):
        assert all(map(all, found.values())), found


def written() -> tuple[float, str]:
    reference, model = writing(), writing()
    report = sp_attention.enable(model, backend="sdpa").report()
    return largest_error(reference, model, loss_step), report


def test_a_forward_of_the_rehearsal_begins_as_the_first() -> None:
    # Else the sharded forwards give half of what the first one gave, and all is gathered, or refused.
    for error, report in run_ranks(3, written):
        assert error < 1e-5
        assert "layers.1:" not in report
        assert "gathered" not in report


def nllb_errors() -> dict[str, float]:
    be_quiet()
    found = {}
    for trains in (True, False):
        reference, model = nllb().double().train(trains), nllb().double().train(trains)
        sp_attention.enable(model, backend="sdpa")
        ids = torch.randint(3, 97, (2, 45), generator=torch.Generator().manual_seed(0))

        def step(model: PreTrainedModel, ids: Tensor = ids) -> list[Tensor]:
            loss = model(input_ids=ids, labels=ids[:, :33].clone()).loss
            loss.backward()
            return [loss.detach()]

        errors = errors_of(reference, model, step)
        # A bias of keys has no gradient but rounding errors.
        found |= {f"{name}, {trains}": error for name, error in errors.items() if not name.endswith("k_proj.bias")}
    return found


def test_nllb_moe_has_the_capacity_of_one_process() -> None:
    for errors in run_ranks(2, nllb_errors, timeout=200):
        assert not too_large(errors, 1e-4)


def big_bird_errors() -> dict[str, float]:
    """Of texts that are long enough for its block-sparse attention, and of one that is not."""
    be_quiet()
    errors = {}
    for name, build in {"bigbird": big_bird, "pegasus": big_bird_pegasus}.items():
        reference, model = build().eval(), build().eval()
        for parameter_name, parameter in (*reference.named_parameters(), *model.named_parameters()):
            # Softmax takes no notice of the bias of keys: its gradient is nothing but rounding.
            parameter.requires_grad_(not parameter_name.endswith("key.bias"))
        sp_attention.enable(model, backend="sdpa")
        for length in (96, 64, 16):
            errors[f"{name} {length}"] = largest_error(reference, model, partial(masked_lm_step, length=length))
    return errors


def masked_lm_step(model: nn.Module, length: int) -> list[Tensor]:
    model.zero_grad()
    ids = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach()]


def test_big_bird_is_exact_with_block_sparse_attention() -> None:
    for errors in run_ranks(2, big_bird_errors, timeout=200):
        assert not too_large(errors), errors


def test_attributes_and_buffers_are_given_back() -> None:
    module = Writes(nn.Linear(2, 2, dtype=torch.float64))
    before, attributes, buffers = held_by(module), Attributes.of(module), Buffers.of(module)
    with torch.no_grad():
        module.count += 1
    module(torch.ones(1, 3, 2, dtype=torch.float64))
    del module.mlp
    assert not is_same(held_by(module), before)
    attributes.restore()
    buffers.restore()
    assert is_same(held_by(module), before)
    assert not module.count.any()
    assert [*module._modules] == ["mlp", "last"]


def held_by(module: nn.Module) -> dict[str, Any]:
    return {
        key: [*value.items()] if isinstance(value, dict) else [*value] if type(value) is list else value
        for key, value in vars(module).items()
    }
