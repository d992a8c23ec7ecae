"""What the kernels on this machine say when they are asked, and whether they are right in what they do."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from sp_attention import testing
from sp_attention.kernels.request import Backend, Request, reason_against

# On the CPU it is best seen in the widest dtype what is exact. Elsewhere kernels are used in narrow ones, and not every
# device has float64.
CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}


@dataclass(frozen=True)
class Answers:
    """What a kernel says to `testing.FEATURES`. refused: the reasons, by feature, and by dtype where it is the dtype.

    dtype: that it was asked in, the first of those in which it does most.
    """

    device: str
    dtype: str
    refused: dict[str, str]


@dataclass(frozen=True)
class Result:
    """What came of one feature, as `testing.outcome` says it."""

    feature: str
    outcome: str
    reason: str = ""


def devices() -> list[str]:
    """The types of devices that are here: the CPU and what torch calls the accelerator."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def device_for(backend: Backend) -> str | None:
    """The device that a kernel can be asked on; None when there is none here."""
    here = devices()
    return here[-1] if backend.device == "any" else next((device for device in here if device == backend.device), None)


def ask(backend: Backend, device: str) -> Answers:
    """Ask for every feature, without running the kernel."""
    dtypes = CPU_DTYPES if device == "cpu" else DTYPES
    refused = {dtype: _refused(backend, device, dtype) for dtype in dtypes}
    chosen = min(dtypes, key=lambda dtype: len(refused[dtype]))
    by_dtype = {
        _name(dtype): reasons["causal"]
        for dtype, reasons in refused.items()
        if dtype != chosen and reasons.keys() == testing.FEATURES.keys()
    }
    return Answers(device, _name(chosen), by_dtype | refused[chosen])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refused(backend: Backend, device: str, dtype: torch.dtype) -> dict[str, str]:
    reasons = {feature: reason_against(backend, _request(feature, device, dtype)) for feature in testing.FEATURES}
    return {feature: reason for feature, reason in reasons.items() if reason is not None}


@cache
def _request(feature: str, device: str, dtype: torch.dtype) -> Request:
    return testing.request_for(feature, module=module_for(feature), device=device, dtype=dtype)


def check(backend: Backend, answers: Answers) -> Iterator[Result]:
    """Let a kernel do everything that it does not refuse, where it has given its answers, and compare."""
    device, dtype = answers.device, getattr(torch, answers.dtype)
    # Most models compute the softmax of their eager attention in float32.
    tolerance = 1e-6 if dtype == torch.float64 else None
    for feature in testing.FEATURES | testing.LONG:
        module = module_for(feature)
        options = {"module": module, "device": device, "dtype": dtype, "tolerance": tolerance}
        yield Result(feature, *testing.outcome(backend, feature, **options))


def module_for(feature: str) -> nn.Module | None:
    """A model's attention, 3 heads of 8, whose own eager function has the feature.

    None where transformers cannot be imported, as with torch-npu and no driver: its kernels are not here then.
    """
    return _module("sinks" if feature.startswith("attention sinks") else feature)


@cache
def _module(feature: str) -> nn.Module | None:
    try:
        from transformers import Gemma2Config, GptOssConfig, LlamaConfig
        from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
        from transformers.models.llama.modeling_llama import LlamaAttention
    except ImportError:
        return None
    if feature == "sinks":
        return GptOssAttention(GptOssConfig(**SIZES), layer_idx=0)
    if feature == "softcap":
        return Gemma2Attention(Gemma2Config(**SIZES), layer_idx=0)
    return LlamaAttention(LlamaConfig(**SIZES), layer_idx=0)
