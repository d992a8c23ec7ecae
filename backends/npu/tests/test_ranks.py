"""Whole models on two ranks with the kernel `npu`, against one process with eager attention."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import standin  # noqa: F401  # registers the stand-ins
import torch
import transformers
from ranks import run_on_devices
from torch import Tensor

import sp_attention

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "experts_implementation": "eager"}


@dataclass(frozen=True)
class Tiny:
    cls: str
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self) -> transformers.PreTrainedModel:
        """The same weights every time, in float32 and training mode, with eager attention."""
        model_class = getattr(transformers, self.cls)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**COMMON | self.settings, attn_implementation="eager"))
        return model.train()


MODELS = {
    "llama": Tiny("LlamaForCausalLM"),
    "mistral-window5": Tiny("MistralForCausalLM", {"sliding_window": 5}),
    # Sinks, and a window in every second layer.
    "gpt-oss": Tiny("GptOssForCausalLM", GPT_OSS),
}
SOFTCAPPED = Tiny("Gemma2ForCausalLM")
KINDS = ("plain", "left-padded", "right-padded", "packed")
LENGTH = 33


def batch_of(kind: str, device: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if kind.endswith("padded"):
        mask = torch.ones_like(ids)
        mask[0, slice(0, 11) if kind == "left-padded" else slice(22, LENGTH)] = 0
        # Nothing real is before the first real token, so nothing predicts it.
        labels = ids.masked_fill(mask == 0, -100).index_fill(1, torch.arange(12), -100)
        batch |= {"attention_mask": mask, "labels": labels}
    if kind == "packed":
        positions = torch.cat([torch.arange(8), torch.arange(9), torch.arange(16)])
        batch |= {"position_ids": torch.stack([positions, torch.arange(LENGTH)]), "use_cache": False}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def train(name: str, backend: str) -> dict[str, float]:
    """For each kind of batch, the largest relative error of the loss and of any parameter's gradient."""
    reference, model = MODELS[name].build(), MODELS[name].build().to("npu:0")
    sp_attention.enable(model, backend=backend)
    errors = {}
    for kind in KINDS:
        results = []
        for each in (reference, model):
            each.zero_grad()
            output = each(**batch_of(kind, each.device))
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
    llama, gemma = (tiny.build().to("npu:0") for tiny in (MODELS["llama"], SOFTCAPPED))
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
