"""Tensor beside sequence parallelism: exact on dimensions of a mesh of their own, refused over the same ranks."""

import pytest
import torch
from helpers import gradients_of, loss_step, relative_error, run_once
from models import Tiny
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM, PreTrainedModel

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations

# By two ranks of tensor parallelism, each has as many heads as here, and half of them are each rank's of a sequence.
LLAMA = Tiny("LlamaForCausalLM", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "head_dim": 8})


def cut_up(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    for layer in model.model.layers:
        plan = {name: ColwiseParallel() for name in columns}
        parallelize_module(
            layer, mesh, plan | {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        )


def errors(kind: str) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "tp"))
    reference, model = LLAMA.build(), LLAMA.build()
    cut_up(model, mesh["tp"])
    if kind == "FSDP2":
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh["sp"])
    options = {"loss_tile": 4} if kind == "tiles" else {}
    sp_attention.enable(model, backend="sdpa", group=mesh["sp"], **options)
    if kind == "checkpoints":
        checkpoint_activations(model, {"use_reentrant": False})
    (expected,), (loss,) = loss_step(reference), loss_step(model)
    if kind != "FSDP2":
        with pytest.raises(ValueError, match="pass the group of the ranks that have the same parts"):
            sp_attention.average_gradients(model)
        sp_attention.average_gradients(model, mesh["sp"].get_group())
    theirs, ours = gradients_of(reference), gradients_of(model)
    assert ours.keys() == theirs.keys()
    return {"loss": relative_error(loss, expected)} | {
        name: relative_error(ours[name], theirs[name]) for name in theirs
    }


@pytest.mark.parametrize("kind", ["plain", "FSDP2", "tiles", "checkpoints"])
def test_two_by_two_ranks_give_the_gradients_of_one_process(kind: str) -> None:
    for found in run_once(4, errors, kind, timeout=100):
        assert max(found.values()) < 1e-5, found


def refused_over_the_same_ranks() -> list[str]:
    texts = []
    for fsdp in (False, True):
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        model = LLAMA.build()
        cut_up(model, mesh["tp"])
        if fsdp:
            fully_shard(model, mesh=mesh["dp"])
        with pytest.raises(UnsupportedError) as refusal:
            sp_attention.enable(model, backend="sdpa")
        texts.append(str(refusal.value))
        assert not isinstance(sp_attention.api.handle_of(model), sp_attention.api.Handle)
    return texts


def test_the_same_ranks_are_refused() -> None:
    first, second = run_ranks(2, refused_over_the_same_ranks)
    assert first == second
    for text in first:
        assert text.startswith("model.layers.0.self_attn.q_proj.weight is cut up over ranks [0, 1] by tensor or expert")
        assert 'enable(group=mesh["sp"])' in text


def refused_as_transformers_cuts(folder: str) -> str:
    from helpers import as_launched

    as_launched()
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
    with pytest.raises(UnsupportedError) as refusal:
        sp_attention.enable(model, backend="sdpa")
    return str(refusal.value)


def test_tp_plan_auto_is_refused(tmp_path: object) -> None:
    LLAMA.build().save_pretrained(tmp_path)
    first, second = run_ranks(2, refused_as_transformers_cuts, str(tmp_path))
    assert first == second
    assert "is cut up over ranks [0, 1] by tensor or expert parallelism" in first
