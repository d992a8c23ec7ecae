"""Architectures of every kind, small, on several ranks: loss, outputs and every gradient against one process."""

import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch.distributed as dist
import transformers

from sp_attention.cli.comparison import compare
from sp_attention.cli.outcomes import VARIANTS, Comparison
from sp_attention.cli.reduced import prepare
from sp_attention.launch import run_ranks

LENGTH = 33

# Every process start takes several models.
MODELS = (
    {
        # Encoders, decoders that look at them, and towers of vision and sound.
        "t5": "seq2seq-lm",
        "bart": "seq2seq-lm",
        "whisper": "speech-seq2seq",
        "bert": "masked-lm",
        "modernbert": "masked-lm",
        "vit": "image-classification",
        "qwen2_vl": "image-text-to-text",
        "qwen3_vl": "image-text-to-text",
    },
    {
        # Windows, chunks, sinks, soft caps, latent attention, experts, and inputs for each layer.
        "gemma2": "causal-lm",
        "gemma3_text": "causal-lm",
        "gemma3n_text": "causal-lm",
        "gpt_oss": "causal-lm",
        "deepseek_v3": "causal-lm",
        "llama4_text": "causal-lm",
        "mixtral": "causal-lm",
    },
    {
        # Convolutions, scans and other recurrences, alone and beside attention.
        "qwen3_next": "causal-lm",
        "lfm2": "causal-lm",
        "mamba2": "causal-lm",
        "bamba": "causal-lm",
        "falcon_h1": "causal-lm",
        "rwkv": "causal-lm",
    },
    {
        # Older ways to attend, and to know positions.
        "bloom": "causal-lm",
        "mpt": "causal-lm",
        "opt": "causal-lm",
        "gpt_neox": "causal-lm",
        "gpt2": "causal-lm",
        "albert": "masked-lm",
    },
)
# What every number of ranks runs beside plain training.
VARIANTS_OF = {2: VARIANTS, 3: ("reentrant-checkpointing", "two-forwards")}
# Torch's kernel has no soft cap.
KERNELS = {"gemma2": "transformers:eager"}


def compare_all(models: dict[str, str]) -> dict[str, tuple[Comparison, list[str]]]:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = {}
    for name, task in models.items():
        model, batches = prepare(name, task, LENGTH)
        plain = compare(model, batches, "auto")
        # One batch, padded where it can be, in every variant.
        kind = "left-padded" if "left-padded" in batches else "plain"
        varied = compare(model, {kind: batches[kind]}, "auto", VARIANTS_OF[dist.get_world_size()])
        found[name] = (replace(plain, verdicts=(*plain.verdicts, *varied.verdicts)), list(batches))
    return found


@cache
def comparisons(group: int, ranks: int) -> dict[str, tuple[Comparison, list[str]]]:
    found: dict[str, tuple[Comparison, list[str]]] = run_ranks(ranks, compare_all, MODELS[group], timeout=400)[0]
    return found


@pytest.mark.parametrize("ranks", [2, 3], ids="P{}".format)
@pytest.mark.parametrize(
    ("group", "name"), [pytest.param(i, name, id=name) for i, models in enumerate(MODELS) for name in models]
)
def test_every_number_is_that_of_one_process(group: int, name: str, ranks: int) -> None:
    comparison, kinds = comparisons(group, ranks)[name]
    assert not comparison.refused
    assert comparison.kernel == KERNELS.get(name, "sdpa")
    wrong = [verdict for verdict in comparison.verdicts if verdict.outcome != "exact"]
    if name == "albert":  # which transformers cannot checkpoint
        wrong = [verdict for verdict in wrong if "does not support activation checkpointing" not in verdict.reason]
    assert not wrong, comparison.report
    assert len(comparison.verdicts) == len(kinds) + 1 + len(VARIANTS_OF[ranks])
    if MODELS[group][name] == "image-text-to-text":
        assert "pixels" in kinds
