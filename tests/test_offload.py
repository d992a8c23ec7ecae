"""Inputs of checkpointed layers that are saved elsewhere."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from models import LLAMA, batch_of
from tiled import CASES, CHECKPOINTED, TILE, error_of
from torch import Tensor

import sp_attention
from sp_attention.launch import run_ranks
from sp_attention.region import activation_checkpoint


class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
    """Stands in for `save_on_cpu`, which has no other memory here to save in: in copies, which are counted."""

    saved: ClassVar[list[torch.Size]] = []

    def __init__(self, pin_memory: bool, device_type: str) -> None:
        assert (pin_memory, device_type) == (True, "cpu")

        def pack(tensor: Tensor) -> Any:
            self.saved.append(tensor.shape)
            return tensor.detach().numpy().copy()

        super().__init__(pack, torch.from_numpy)


def offloaded() -> dict[str, tuple[float, list[torch.Size]]]:
    activation_checkpoint.save_on_cpu = Elsewhere
    found = {}
    for name in CHECKPOINTED:
        Elsewhere.saved.clear()
        error, *_ = error_of(CASES[name], loss_tile=TILE, mlp_tile=4, offloads=True)
        found[name] = error, list(Elsewhere.saved)
    model = LLAMA.build()
    handle = sp_attention.enable(model, backend="sdpa")
    handle.hooks.plan = replace(handle.hooks.plan, offloads=True)
    with pytest.raises(
        sp_attention.UnsupportedError, match=r"nothing checkpoints model.layers.0, so nothing of it can"
    ):
        model(**batch_of("plain", 33))
    with torch.no_grad():
        model(**batch_of("plain", 33))
    model.eval()(**batch_of("plain", 33))
    return found


def test_inputs_of_checkpointed_layers_are_saved_elsewhere() -> None:
    for rank, each in enumerate(run_ranks(2, offloaded, timeout=120)):
        for error, saved in each.values():
            assert error < 1
            # Those of two layers in two forwards, and nothing else.
            assert saved == [(2, 17 - rank, 48)] * 2 + [(2, 10, 48)] * 2
