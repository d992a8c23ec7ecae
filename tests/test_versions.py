"""What other versions of transformers do otherwise; all that is exact is so in every one."""

from typing import Any

import pytest
import torch
import transformers
from helpers import run_once
from models import LLAMA, batch_of
from packaging.version import Version
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import sp_attention
from sp_attention.region import versions
from sp_attention.region.versions import checkpoint_activations

CHECKPOINTS_CALLS = Version(transformers.__version__) < Version("5.23.0")
LENGTH = 13


def attributes_of(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(one)) for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]


def called(model: nn.Module, backward: bool = True) -> Any:
    loss = model(**batch_of("packed", LENGTH)).loss
    return loss.backward() if backward else loss


def left_behind() -> dict[str, bool]:
    """After what a checkpointed layer is as it was before; and whether it is another meanwhile."""
    model = LLAMA.build()
    checkpoint_activations(model, {"use_reentrant": False})
    handle = sp_attention.enable(model, backend="sdpa")
    before, meanwhile, found = attributes_of(model), [], {}

    def look(*_: Any) -> None:
        meanwhile.append(attributes_of(model) != before)

    hook = model.model.norm.register_forward_hook(look)
    called(model)
    found["a forward and a backward"] = attributes_of(model) == before
    hook.remove()

    def fail(*_: Any) -> None:
        raise ValueError("within a layer")

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ValueError, match="within a layer"):
        called(model)
    hook.remove()
    found["an error"] = attributes_of(model) == before

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        called(model)
    hook.remove()
    called(model)
    found["an interrupt, and a forward"] = attributes_of(model) == before
    loss = called(model, backward=False)
    handle.disable()
    with pytest.raises(sp_attention.UnsupportedError, match=r"call backward\(\) before handle.disable\(\)"):
        loss.backward()
    found["disable()"] = all("forward" not in held for held in attributes_of(model))
    found["is another meanwhile"] = any(meanwhile)
    return found


def test_checkpointed_layers_are_as_they_were_once_a_forward_is_over() -> None:
    for found in run_once(2, left_behind):
        assert found.pop("is another meanwhile") == CHECKPOINTS_CALLS
        assert set(found.values()) == {True}, found


def checkpointed_twice() -> str:
    """What is said of layers that are checkpointed by transformers and by torch's wrapper; empty if nothing is."""
    model = LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    layers = tuple(model.model.layers)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: module in layers
    )
    checkpoint_activations(model, {"use_reentrant": False})
    try:
        called(model)
    except sp_attention.UnsupportedError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore")
def test_layers_that_are_checkpointed_twice_are_refused_where_hooks_are_within() -> None:
    for text in run_once(2, checkpointed_twice):
        expected = f"is checkpointed by transformers {transformers.__version__} and, around it, by other code"
        assert (expected in text) == CHECKPOINTS_CALLS


def test_the_differences_are_those_of_this_version() -> None:
    here = Version(transformers.__version__)
    assert (versions.remap_positions is None) == (here < Version("5.23.0"))
    assert (versions.batch_rebalance_sampler() is None) == (here < Version("5.17.0"))
    assert versions.CHECKPOINTING_ENABLE.startswith("gradient" if here < Version("5.23.0") else "activation")
    assert ("__call__" in vars(GradientCheckpointingLayer)) == CHECKPOINTS_CALLS
    assert torch.is_tensor(batch_of("packed", LENGTH)["position_ids"])
