"""Whole models on two ranks with the kernel `npu`, against one process with eager attention."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import standin  # noqa: F401  # registers the stand-ins
import torch
from models import Tiny, batch_of
from ranks import run_on_devices
from torch import Tensor

import sp_attention

EAGER = {"attn_implementation": "eager"}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "experts_implementation": "eager"}
MODELS = {
    "llama": Tiny("LlamaForCausalLM", EAGER),
    "mistral-window5": Tiny("MistralForCausalLM", EAGER | {"sliding_window": 5}),
    # Sinks, and a window in every second layer.
    "gpt-oss": Tiny("GptOssForCausalLM", EAGER | GPT_OSS),
}
SOFTCAPPED = Tiny("Gemma2ForCausalLM", EAGER)
KINDS = ("plain", "left-padded", "right-padded", "packed")


def train(name: str, backend: str) -> dict[str, float]:
    """For each kind of batch, the largest relative error of the loss and of any parameter's gradient."""
    reference, model = MODELS[name].build(torch.float32), MODELS[name].build(torch.float32).to("npu:0")
    sp_attention.enable(model, backend=backend)
    errors = {}
    for kind in KINDS:
        results = []
        for each in (reference, model):
            each.zero_grad()
            batch = {
                key: one.to(each.device) if isinstance(one, Tensor) else one for key, one in batch_of(kind, 33).items()
            }
            output = each(**batch)
            output.loss.backward()
            results.append([output.loss.detach()])
        sp_attention.average_gradients(model)
        for result, each in zip(results, (reference, model), strict=True):
            result += [parameter.grad for parameter in each.parameters()]
        errors[kind] = max(error_of(ours, theirs) for theirs, ours in zip(*results, strict=True))
    return errors


def error_of(ours: Tensor, theirs: Tensor) -> float:
    assert ours.device.type == "npu"
    return float((ours.cpu() - theirs).abs().max() / theirs.abs().max())


def train_all(backend: str) -> dict[str, dict[str, float]]:
    return {name: train(name, backend) for name in MODELS}


@cache
def trained(backend: str) -> list[dict[str, dict[str, float]]]:
    with TemporaryDirectory() as folder:
        return run_on_devices(2, Path(folder), train_all, backend)


@pytest.mark.parametrize("backend", ["npu", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_one_process(name: str, kind: str, backend: str) -> None:
    for errors in trained(backend):
        assert errors[name][kind] < 2e-5


def chosen() -> tuple[str, str, str]:
    """What becomes of a softcap: the refusal, and the kernel that "auto" takes; and the one for a model without."""
    llama, gemma = (tiny.build(torch.float32).to("npu:0") for tiny in (MODELS["llama"], SOFTCAPPED))
    with pytest.raises(sp_attention.UnsupportedError) as refusal:
        sp_attention.enable(gemma, backend="npu")
    return str(refusal.value), sp_attention.enable(gemma).backend.kernel, sp_attention.enable(llama).backend.kernel


def test_a_softcap_is_refused_and_auto_takes_what_can_do_it(tmp_path: Path) -> None:
    for refusal, gemma, llama in run_on_devices(2, tmp_path, chosen):
        assert refusal == (
            "model.layers.0.self_attn: kernel 'npu' on npu cannot do this: npu_fusion_attention has no softcap. Use "
            'enable(model, backend="transformers:eager"). Installed kernels that can: transformers:eager.'
        )
        assert (gemma, llama) == ("transformers:eager", "npu")
