"""What one process of the demo does: train a small Llama on text, alone or as one of the ranks of a sequence."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sp_attention
from sp_attention.cli.rss import resident_memory

VOCABULARY = 2048
# SGD makes steps as large as the gradients, so that a gradient of the wrong size shows in the losses.
LEARNING_RATE, FINE_TUNING_RATE, MOMENTUM = 0.05, 1e-3, 0.9


@dataclass(frozen=True)
class Training:
    """What to train: `steps` sequences of `seq` tokens from `tokens` (a file of one int64 tensor), one a step.

    model: a folder with a pretrained causal language model, or None for a Llama of `layers` layers made here.
    """

    tokens: Path
    steps: int
    seq: int
    layers: int
    backend: str
    model: Path | None


@dataclass(frozen=True)
class Trained:
    """One process's account: the loss of each step, memory in bytes, and tokens of the whole sequence per second.

    gradients: those of step 1 by parameter name, from rank 0 only. peak: the most resident memory. start: the
    resident memory before the model was built.
    """

    losses: list[float]
    parameters: int
    peak: int
    start: int
    tokens_per_second: float
    gradients: dict[str, Tensor]


def train(training: Training, report: Callable[[int], None]) -> Trained:
    """Train on all ranks of the default process group; `report` is told the number of each finished step."""
    start = resident_memory("VmRSS")
    model = build(training)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    alone = dist.get_world_size() == 1
    if not alone:
        sp_attention.enable(model, backend=training.backend)
    elif training.backend.startswith("transformers:"):
        model.set_attn_implementation(training.backend.removeprefix("transformers:"))
    rate = LEARNING_RATE if training.model is None else FINE_TUNING_RATE
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    tokens = torch.load(training.tokens)
    losses, seconds, gradients = [], 0.0, {}
    for step in range(training.steps):
        batch = tokens[step * training.seq : (step + 1) * training.seq][None]
        began = perf_counter()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        sp_attention.average_gradients(model)
        if step == 0 and dist.get_rank() == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        if step > 0 or training.steps == 1:  # The first step also warms up.
            seconds += perf_counter() - began
        losses.append(loss.item())
        report(step + 1)
    speed = max(training.steps - 1, 1) * training.seq / seconds
    return Trained(losses, parameters, resident_memory("VmHWM"), start, speed, gradients)


def build(training: Training) -> PreTrainedModel:
    """The model to train, in float32, the same on every rank."""
    if training.model is not None:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(training.model, dtype=torch.float32)
        loaded.train()
        return loaded
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=training.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=training.seq,
    )
    made = LlamaForCausalLM(config)
    made.train()
    return made
