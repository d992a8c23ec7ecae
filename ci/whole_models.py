"""Whole models on several ranks of this machine's accelerator against one process, and what memory they take.

Ranks take turns of the devices that there are. They talk through gloo, which takes tensors through the host and lets
ranks share a device, as NCCL does not: all but NCCL is as in a run on several devices.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sp_attention
from sp_attention.cli.comparison import TOLERANCES
from sp_attention.cli.differences import largest_error
from sp_attention.cli.reduced import prepare
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations

RANKS, LENGTH, NEW, TIMEOUT = (2, 3, 4), 33, 5, 400.0
# Rounding may choose other experts, so models that have some are compared in float64 only.
DENSE = ("llama", "mistral", "gemma2", "qwen3")
TYPES = {torch.float64: (*DENSE, "gpt_oss", "qwen3_moe", "bloom", "gpt2", "lfm2"), torch.bfloat16: DENSE}
# The model whose memory is measured: a Llama of 0.27 billion parameters, in bfloat16.
LARGE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}
LENGTHS = (16384,)


@dataclass(frozen=True)
class Way:
    """How a model trains. asked: what `enable` is asked for, None for a model that is left as it is."""

    asked: dict[str, Any] | None
    checkpoints: bool = False


# Of Llama besides; a head that is one matrix has its tiles from Liger's kernel where that is installed.
OPTIONS = {
    "all logits at once": Way({"loss_tile": None}),
    "logits and MLP in tiles": Way({"loss_tile": 8, "mlp_tile": 8}),
    "checkpointed": Way({}, checkpoints=True),
    "checkpointed, offload": Way({"offload": True}, checkpoints=True),
}
WAYS = {
    1: {"one process": Way(None), "one process, checkpointed": Way(None, checkpoints=True)},
    2: {
        "as it comes": Way({}),
        "checkpointed": Way({}, checkpoints=True),
        "checkpointed, offload, mlp_tile": Way({"offload": True, "mlp_tile": 2048}, checkpoints=True),
    },
}
WAYS[4] = WAYS[2]

Values = dict[str, Tensor]
Step = Callable[[PreTrainedModel], Values]


@dataclass(frozen=True)
class Compared:
    """What came of a step of a model. error, own: the largest relative error of a value of this rank, and of one
    process in the same dtype, both against the same weights in float64. problem: what was raised instead.
    """

    model: str
    dtype: str
    step: str
    kernel: str = ""
    error: float = float("inf")
    own: float = 0.0
    problem: str = ""

    @property
    def verdict(self) -> str:
        if self.problem:
            return f"**wrong**: {self.problem}"
        return "exact" if self.error <= max(2 * self.own, TOLERANCES[torch.float64]) else "**wrong**"


HEAD_OF_EXACTNESS = ("ranks", "model", "dtype", "step", "kernel", "largest error", "of one process", "")
HEAD_OF_MEMORY = ("tokens", "ranks", "", "peak over weights", "÷ one process", "seconds of a step")


def exactness(kind: str) -> Iterator[list[str]]:
    """Rows of a table: of each step what came of it on the rank with the largest error. kind: of device."""
    for ranks in RANKS:
        for each in zip(*run_ranks(ranks, _compared, kind, timeout=TIMEOUT), strict=True):
            worst = max(each, key=lambda one: (bool(one.problem), one.error))
            *words, error, own, _ = astuple(worst)
            yield [str(ranks), *words, f"{error:.1e}", f"{own:.1e}", worst.verdict]


def memory(kind: str) -> Iterator[list[str]]:
    """Rows of a table: of each way to train, what device memory a step takes at most on the rank that takes most."""
    for length in LENGTHS:
        alone = 0
        for ranks, ways in WAYS.items():
            everyone = run_ranks(ranks, _measured, kind, length, ways, timeout=TIMEOUT)
            for name in ways:
                peak, seconds = max(each[name] for each in everyone)
                alone = alone or peak
                cells = (f"{peak / 2**20:.0f} MiB", f"{peak / alone:.2f}", f"{seconds:.1f}")
                yield [str(length), str(ranks), name, *cells]


def _device(kind: str) -> torch.device:
    """This rank's, which is now the current one."""
    module = torch.get_device_module(kind)
    device = torch.device(kind, dist.get_rank() % module.device_count())
    module.set_device(device)
    transformers.logging.set_verbosity_error()
    return device


def _compared(kind: str) -> list[Compared]:
    device, found = _device(kind), []
    for dtype, types in TYPES.items():
        for name in types:
            model, batches = prepare(name, "causal-lm", LENGTH)
            model = nn.Module.to(model, device, dtype)
            inputs = {
                kind: {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                for kind, batch in batches.items()
            }
            steps: dict[str, Step] = {kind: _training(batch) for kind, batch in inputs.items()}
            if dtype == torch.float64:  # else rounding may choose other tokens
                steps["generate"] = _generation(inputs["plain"]["input_ids"])
            found += _judged(model, steps, Way({}))
            if name == "llama":
                for option, way in OPTIONS.items():
                    found += _judged(model, {option: steps["left-padded"]}, way)
    return found


def _judged(model: PreTrainedModel, steps: dict[str, Step], way: Way) -> Iterator[Compared]:
    """What comes of the steps of a copy of the model that trains this way."""
    exact, shared = nn.Module.to(copy.deepcopy(model), dtype=torch.float64), copy.deepcopy(model)
    names = model.config.model_type, str(model.dtype).removeprefix("torch.")
    with sp_attention.enable(shared, "auto", **way.asked or {}) as handle:
        if way.checkpoints:
            checkpoint_activations(shared)
        for name, step in steps.items():
            try:
                expected = step(exact)
                if not all(bool(value.isfinite().all()) for value in expected.values()):
                    continue  # Eager attention makes NaN of padding in some models.
                own, error = (largest_error(step(one), expected)[0] for one in (model, shared))
            except Exception as problem:  # it is told, and the others go on
                yield Compared(*names, name, handle.backend.kernel, problem=f"{type(problem).__name__}: {problem}")
            else:
                yield Compared(*names, name, handle.backend.kernel, error, own)


def _training(inputs: dict[str, Any]) -> Step:
    """Yields the loss and every gradient."""

    def step(model: PreTrainedModel) -> Values:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        sp_attention.average_gradients(model)
        gradients = {f"gradient of {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
        return {"loss": loss.detach(), **gradients}

    return step


def _generation(prompt: Tensor) -> Step:
    """Yields the logits of a few new tokens, each the likeliest."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def step(model: PreTrainedModel) -> Values:
        model.eval()
        found = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **options)
        model.train()
        return {"logits": torch.stack(found.logits)}

    return step


def _measured(kind: str, length: int, ways: dict[str, Way]) -> dict[str, tuple[int, float]]:
    """By way: bytes at most over those of the weights, and seconds, of a step after the first."""
    device, found = _device(kind), {}
    module = torch.get_device_module(device)
    for name, way in ways.items():
        torch.manual_seed(0)
        config = LlamaConfig(**LARGE, max_position_embeddings=length)
        model = LlamaForCausalLM(config).to(device, torch.bfloat16).train()
        ids = torch.randint(LARGE["vocab_size"], (1, length)).to(device)
        before = module.memory_allocated()
        if way.asked is not None:
            sp_attention.enable(model, "auto", **way.asked)
        if way.checkpoints:
            checkpoint_activations(model)
        for _ in range(2):
            module.reset_peak_memory_stats()
            start = perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            sp_attention.average_gradients(model)
            module.synchronize()
        found[name] = module.max_memory_allocated() - before, perf_counter() - start
        del model
        gc.collect()
        module.empty_cache()
    return found
