"""Architectures of every kind, small, on several ranks: loss, outputs and every gradient against one process."""

from dataclasses import replace

import pytest
import torch.distributed as dist
from helpers import TWO_AND_THREE, Selected, be_quiet, run_once

from sp_attention.cli.comparison import compare
from sp_attention.cli.outcomes import VARIANTS, Comparison
from sp_attention.cli.reduced import prepare

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
# One or two of each group: all of them are slow.
QUICK = ("t5", "qwen2_vl", "gemma3n_text", "deepseek_v3", "qwen3_next", "bamba", "bloom")
# What every number of ranks runs beside plain training.
VARIANTS_OF = {2: VARIANTS, 3: ("reentrant-checkpointing", "two-forwards")}
# Torch's kernel has no soft cap.
KERNELS = {"gemma2": "transformers:eager"}


def compare_all(models: tuple[tuple[str, str], ...]) -> dict[str, tuple[Comparison, list[str]]]:
    be_quiet()
    found = {}
    for name, task in models:
        model, batches = prepare(name, task, LENGTH)
        plain = compare(model, batches, "auto")
        # One batch, padded where it can be, in every variant.
        kind = "left-padded" if "left-padded" in batches else "plain"
        varied = compare(model, {kind: batches[kind]}, "auto", VARIANTS_OF[dist.get_world_size()])
        found[name] = (replace(plain, verdicts=(*plain.verdicts, *varied.verdicts)), list(batches))
    return found


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
@pytest.mark.parametrize(
    ("group", "name"),
    [
        pytest.param(i, name, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for i, models in enumerate(MODELS)
        for name in models
    ],
)
def test_every_number_is_that_of_one_process(group: int, name: str, ranks: int, selected: Selected) -> None:
    models = tuple((each, MODELS[group][each]) for each in selected("name", group=group, ranks=ranks))
    comparison, kinds = run_once(ranks, compare_all, models, timeout=400)[0][name]
    assert not comparison.refused
    assert comparison.kernel == KERNELS.get(name, "sdpa")
    wrong = [verdict for verdict in comparison.verdicts if verdict.outcome != "exact"]
    if name == "albert":  # which transformers cannot checkpoint
        wrong = [verdict for verdict in wrong if "does not support activation checkpointing" not in verdict.reason]
    assert not wrong, comparison.report
    assert len(comparison.verdicts) == len(kinds) + 1 + len(VARIANTS_OF[ranks])
    if MODELS[group][name] == "image-text-to-text":
        assert "pixels" in kinds
