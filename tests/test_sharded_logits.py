"""Logits that stay sharded: never taken for the whole, and whole on request."""

import copy
import dataclasses
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import largest_error, pair, relative_error
from models import LLAMA, batch_of
from torch import Tensor
from transformers import PreTrainedModel

import sp_attention
from sp_attention import ShardedLogits, ShardedLogitsError
from sp_attention.launch import run_ranks

USES: dict[str, Callable[[Any], Any]] = {
    "index": lambda logits: logits[:, -1],
    "assignment": lambda logits: operator.setitem(logits, 0, 1.0),
    "method": lambda logits: logits.argmax(-1),
    "attribute": lambda logits: logits.device,
    "function": lambda logits: torch.argmax(logits, -1),
    "function of several": lambda logits: torch.cat([logits, logits]),
    "loss": lambda logits: torch.nn.functional.cross_entropy(logits, torch.zeros(1)),
    "sum": lambda logits: logits + 1,
    "sum on the right": lambda logits: torch.ones(1) + logits,
    "difference": lambda logits: 1 - logits,
    "temperature": lambda logits: logits / 0.7,
    "inverse": lambda logits: 1 / logits,
    "power": lambda logits: logits**2,
    "product": lambda logits: logits @ torch.ones(97, 1),
    "negative": lambda logits: -logits,
    "absolute": abs,
    "comparison": lambda logits: logits > 0,
    "length": len,
    "iteration": list,
    "number": float,
    "array": lambda logits: __import__("numpy").asarray(logits),
}


def uses() -> dict[str, Any]:
    reference, model = pair(LLAMA)
    batch = batch_of("plain", 33)
    outputs = model(**batch)
    texts: dict[str, Any] = {}
    for name, use in USES.items():
        with pytest.raises(ShardedLogitsError) as error:
            use(outputs.logits)
        texts[name] = str(error.value)
    assert isinstance(outputs.logits, ShardedLogits)
    assert not hasattr(outputs.logits, "device")
    assert outputs.logits.shape == outputs.logits.part.shape == (2, len(outputs.logits.span), 97)
    assert repr(outputs.logits).startswith("ShardedLogits([2, ")
    assert copy.copy(outputs.logits).part is copy.deepcopy(outputs.logits).part is outputs.logits.part
    # Lightning and FSDP2 take dataclasses apart, to convert tensors in them.
    assert not dataclasses.is_dataclass(outputs.logits)
    with pytest.raises(ShardedLogitsError):
        pickle.dumps(outputs.logits)

    # Whole, with a gradient: the user's own loss beside the model's.
    def step(each: PreTrainedModel) -> list[Tensor]:
        output = each(**batch)
        logits = output.logits if each is reference else output.logits.whole()
        (output.loss + torch.nn.functional.cross_entropy(logits[:, 16], torch.arange(2))).backward()
        return [logits.detach()]

    texts["error"] = largest_error(reference, model, step)
    # Asked for whole, they are tensors.
    always = LLAMA.build()
    handle = sp_attention.enable(always, backend="sdpa", whole_logits=True)
    output = always(**batch)
    texts["whole"] = relative_error(output.logits, reference(**batch).logits)
    output.loss.backward()
    texts["report"] = handle.report().splitlines()[-2]
    return texts


def test_sharded_logits_are_used_in_part_or_whole_and_in_no_other_way() -> None:
    for rank, texts in enumerate(run_ranks(2, uses)):
        assert texts.pop("error") < 1e-5
        assert texts.pop("whole") < 1e-5
        assert texts.pop("report") == "  logits are whole: enable(whole_logits=True)"
        assert set(texts.values()) == {
            f"outputs.logits hold {(17, 16)[rank]} of 33 tokens: in training with labels a causal model's logits stay "
            "sharded. Use outputs.logits.part, or outputs.logits.whole() on every rank of the group, or "
            "enable(model, whole_logits=True)."
        }


def head_of_others() -> float:
    """The error with a forward of somebody else's in place of the model's, which has its own head."""

    def step(model: PreTrainedModel) -> list[Tensor]:
        own = model.forward

        def forward(*args: Any, fused: bool = False, **kwargs: Any) -> Any:
            if not fused:
                return own(*args, **kwargs)
            labels = kwargs.pop("labels")
            hidden = model.model(**kwargs).last_hidden_state[:, :-1]
            return {"loss": F.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels[:, 1:].flatten())}

        model.forward = forward
        loss = model(**batch_of("left-padded", 33), fused=True)["loss"]
        loss.backward()
        return [loss.detach()]

    reference, model = pair(LLAMA)
    error = largest_error(reference, model, step)
    # As long as that forward is there, whatever it is called for.
    assert not isinstance(model(**batch_of("left-padded", 33)).logits, ShardedLogits)
    return error


def test_a_forward_in_place_of_the_model_s_gets_whole_hidden_states() -> None:
    assert max(run_ranks(2, head_of_others)) < 1e-9


def evaluated() -> dict[str, Any]:
    reference, model = LLAMA.build().eval(), LLAMA.build().eval()
    handle = sp_attention.enable(model, backend="sdpa")
    batch = batch_of("left-padded", 33)
    with torch.no_grad():
        with handle.only_loss():
            outputs = model(**batch)
        expected, after = reference(**batch), model(**batch)
    return {
        "part": (type(outputs.logits), outputs.logits.shape[1]),
        "after": relative_error(after.logits, expected.logits),
        "losses": [relative_error(each.loss, expected.loss) for each in (outputs, after)],
    }


def test_logits_stay_sharded_in_evaluation_where_only_the_loss_is_asked_for() -> None:
    for rank, found in enumerate(run_ranks(2, evaluated)):
        assert found["part"] == (ShardedLogits, 17 - rank)
        assert found["after"] < 1e-9
        assert max(found["losses"]) < 1e-6
