"""What tiles spare in training: `python bench/tiles.py`.

A Llama with random weights in float32 on two ranks with one thread each, a new pair of processes for every setting: the
most memory above what stood before a step, of either rank, and the time of the faster of two steps after a first one.
"""

import os
from time import perf_counter
from typing import Any

import click
import torch
import torch.distributed as dist
import transformers

import sp_attention
from sp_attention.cli.rss import forget_peak, resident_memory
from sp_attention.cli.tables import markdown_row, markdown_table
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations

MODEL = {
    "vocab_size": 32768,
    "hidden_size": 256,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
# What is passed to enable(), and whether layers are checkpointed.
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "all at once": ({"loss_tile": None}, False),
    "loss in tiles": ({}, False),
    "loss in tiles, mlp_tile=256": ({"mlp_tile": 256}, False),
    "all at once, checkpointed": ({"loss_tile": None}, True),
    "loss in tiles, checkpointed": ({}, True),
    "loss in tiles, mlp_tile=256, checkpointed": ({"mlp_tile": 256}, True),
}


def step_of(setting: str, length: int) -> tuple[int, float, float]:
    """Bytes, seconds, and the loss of a step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL, max_position_embeddings=length)).train()
    options, checkpointed = SETTINGS[setting]
    if checkpointed:
        checkpoint_activations(model, {"use_reentrant": False})
    sp_attention.enable(model, backend="sdpa", **options)
    ids = torch.randint(MODEL["vocab_size"], (1, length))
    spent, seconds, loss = 0, [], 0.0
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        dist.barrier()
        forget_peak()
        before, start = resident_memory("VmRSS"), perf_counter()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        seconds.append(perf_counter() - start)
        spent, loss = resident_memory("VmHWM") - before, output.loss.item()
        del output
    return spent, min(seconds[1:]), loss


@click.command()
@click.option("--length", default=4096, show_default=True, help="Tokens of the sequence that the two ranks share.")
def main(length: int) -> None:
    # glibc keeps freed memory for itself otherwise, and little of what a step takes is seen.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    print(f"{length} tokens, {MODEL}")
    print(markdown_table(["", "MiB of a step", "seconds", "loss"], []))
    for setting in SETTINGS:
        ranks = run_ranks(2, step_of, setting, length, timeout=600)
        spent, seconds = max(spent for spent, *_ in ranks), max(seconds for _, seconds, _ in ranks)
        cells = [setting, f"{spent / 2**20:.0f}", f"{seconds:.1f}", f"{ranks[0][2]:.6f}"]
        print(markdown_row(cells), flush=True)


if __name__ == "__main__":
    main()
