"""What batches of trainers have beside what the model takes: no need to refuse it, or to gather anything for it."""

import warnings
from typing import Any

import pytest
import torch
from helpers import errors_of, loss_step, too_large
from models import LLAMA
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks
from sp_attention.region.extra_arguments import Unread, unread

EXTRAS: dict[str, Any] = {
    "token_type_ids": torch.zeros(2, 33, dtype=torch.int64),
    "loss_mask": torch.ones(2, 33),
    "flat_mask": torch.ones(66),
    "example": torch.tensor([5, 9]),
    "cu_seqlens": torch.tensor([0, 33], dtype=torch.int32),
    "num_samples": 3,
    "weight": 0.5,
    "task": "sft",
    "sources": ["a", "b"],
    "lengths": [33, 33],
    "masks": [torch.ones(2, 33)],
    "meta": {"mask": torch.ones(2, 33)},
}


class Weighted(LlamaForCausalLM):
    """Reads an argument that it has no parameter for."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        scale = kwargs.get("loss_mask")
        output = super().forward(*args, **kwargs)
        output.loss = output.loss if scale is None else output.loss + (output.logits.mean(2) * scale).mean()
        return output


def weighted() -> PreTrainedModel:
    torch.manual_seed(0)
    return Weighted(LLAMA.build().config).double().train()


class Recording(nn.SiLU):
    """An activation, which notes of how many tokens it is given numbers."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths = lengths

    def forward(self, hidden: Tensor) -> Tensor:
        self.lengths.append(hidden.shape[-2])
        return super().forward(hidden)


def read_by_name(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """A hook, which nothing shows to read what it reads."""
    kwargs["loss_mask"].sum()


def with_extras() -> dict[str, Any]:
    """By extra argument, the errors of a step, and how many tokens a layer was given; warnings; a refusal."""
    found: dict[str, Any] = {}
    reference, model = LLAMA.build(), LLAMA.build()
    lengths: list[int] = []
    kinds: list[str] = []
    model.model.layers[1].mlp.act_fn = Recording(lengths)
    sp_attention.enable(model, backend="sdpa")
    lengths.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, value in EXTRAS.items():

            def step(each: nn.Module, name: str = name, value: Any = value) -> list[Tensor]:
                each.zero_grad()
                return loss_step(each, **{name: value})

            found[name] = errors_of(reference, model, step)
        kinds.append(type(model(**batch(), loss_mask=EXTRAS["loss_mask"]).logits).__name__)
    model.model.layers[1].self_attn.register_forward_pre_hook(read_by_name, with_kwargs=True)
    with pytest.raises(UnsupportedError) as refusal:
        model(**batch(), loss_mask=EXTRAS["loss_mask"])
    reference, model = weighted(), weighted()
    sp_attention.enable(model, backend="sdpa")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found["read"] = errors_of(
            reference, model, lambda each: loss_step(each, "plain", loss_mask=EXTRAS["loss_mask"])
        )
    texts = [str(one.message) for one in told if "sp_attention" in str(one.message)]
    return {"errors": found, "lengths": set(lengths), "kinds": kinds, "refusal": str(refusal.value), "told": texts}


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (2, 33), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_what_nothing_reads_changes_nothing() -> None:
    for rank, found in enumerate(run_ranks(2, with_extras)):
        for errors in found["errors"].values():
            assert not too_large(errors)
        assert found["lengths"] == {(17, 16)[rank]}
        assert found["kinds"] == ["ShardedLogits"]
        assert "the argument loss_mask is of no parameter of the model, and yet a layer reads it" in found["refusal"]
        assert len(found["told"]) == (rank == 0)
        assert all("loss_mask: enable() did not see such arguments" in text for text in found["told"])


def test_what_is_read_is_found_in_parameters_texts_and_what_is_inherited() -> None:
    model = weighted()
    assert unread(["loss_mask", "labels", "position_ids", "task", "output_foo"], model.modules()) == {"task"}
    assert unread(["loss_mask"], LLAMA.build().modules()) == {"loss_mask"}
    model.lm_head.forward = model.lm_head.forward
    assert unread(["task"], model.modules()) == frozenset()


def test_what_stands_for_it_is_no_tensor() -> None:
    stands = Unread("loss_mask")
    assert not hasattr(stands, "to")
    for use in (lambda: stands * 2, lambda: torch.ones(2) * stands, lambda: stands[0], lambda: bool(stands)):
        with pytest.raises(UnsupportedError, match="loss_mask is of no parameter"):
            use()
