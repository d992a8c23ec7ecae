"""Whole models train on two ranks with `backend="flash"` on the stand-in, as one process does with eager attention."""

from functools import cache

import cpu
import pytest
import torch
import transformers
from models import Tiny
from torch import Tensor

import sp_attention
from sp_attention.launch import run_ranks

Results = dict[str, Tensor]
EAGER = {"num_key_value_heads": 2, "attn_implementation": "eager"}
MODELS = {
    "llama": Tiny("LlamaForCausalLM", EAGER),
    "mistral": Tiny("MistralForCausalLM", EAGER | {"sliding_window": 5}),
    "gemma2": Tiny(
        "Gemma2ForCausalLM",
        EAGER | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    # Every expert serves every token: with a choice, the rounding of bfloat16 would choose others here and there.
    "gpt-oss": Tiny(
        "GptOssForCausalLM",
        EAGER
        | {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 4, "experts_implementation": "eager"},
    ),
}
KINDS = ("plain", "packed", "left-padded")
LENGTH = 33


def build(name: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    model = MODELS[name].build(torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.to(dtype)


def batch_of(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    if kind == "left-padded":
        mask = torch.ones_like(ids)
        mask[0, :11] = 0
        batch |= {"attention_mask": mask}
        # What predicts a first real token is padding, of which kernels and eager attention make different things.
        batch["labels"][0, :12] = -100
    if kind == "packed":
        positions = [torch.cat([torch.arange(n) for n in parts]) for parts in ([8, 9, 16], [20, 13])]
        batch["position_ids"] = torch.stack(positions)
    return batch


def trained(model: transformers.PreTrainedModel, kind: str) -> Results:
    """The loss, and the gradient of every parameter, of one rank or of the mean over ranks."""
    model.zero_grad()
    loss = model(**batch_of(kind)).loss
    loss.backward()
    if torch.distributed.is_initialized():
        sp_attention.average_gradients(model)
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def train_on_flash(dtype: torch.dtype) -> tuple[dict[str, Results], set[str]]:
    cpu.import_flash2()
    cpu.accept(torch.float32)
    cpu.offer_flash2_on_the_cpu()
    results, reports = {}, set()
    for name in MODELS:
        model = build(name, dtype)
        reports.add(sp_attention.enable(model, backend="flash").report().splitlines()[0])
        results |= {f"{name}-{kind}": trained(model, kind) for kind in KINDS}
    return results, reports


@cache
def on_two_ranks(dtype: torch.dtype) -> list[tuple[dict[str, Results], set[str]]]:
    return run_ranks(2, train_on_flash, dtype, timeout=400)


def error(results: Results, expected: Results) -> float:
    """The largest relative error, in norm, of the loss and of any gradient."""
    assert results.keys() == expected.keys()
    return max(
        float((results[name].double() - one.double()).norm() / one.double().norm()) for name, one in expected.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_on_flash_are_one_process_with_eager_attention(name: str, kind: str, dtype: torch.dtype) -> None:
    exact = trained(build(name, torch.float32), kind)
    # Half precision may be off by twice what it is with eager attention in one process.
    bound = 1e-5 if dtype == torch.float32 else 2 * error(trained(build(name, dtype), kind), exact)
    for results, reports in on_two_ranks(dtype):
        assert reports == {
            "sp_attention: 2 processes = 1 group x 2 ranks, each sequence shared by its group, kernel 'flash'"
        }
        found = error(results[f"{name}-{kind}"], exact)
        assert found <= bound, f"{found:.1e} > {bound:.1e}"
