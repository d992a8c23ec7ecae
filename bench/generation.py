"""Generation after a long prompt, by one process and by two ranks: `python bench/generation.py`.

A Llama with random weights in float32, and kernel sdpa. Every round starts new processes, one and then two, each with
one thread; the one process runs transformers alone. So two ranks have twice the cores, and a rank's work and memory is
to be held against the half of what one process has. All of it twice, with the C library's allocator as it comes, and
told to give back what is freed. Writes what was measured as JSON, and a table of it in Markdown.
"""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import click
import torch
import torch.distributed as dist
import transformers

import sp_attention
from sp_attention.cli.generate import Clock
from sp_attention.cli.rss import forget_peak, resident_memory
from sp_attention.cli.tables import markdown_table
from sp_attention.launch import run_ranks
from sp_attention.region.kv_cache import sizes

RANKS, TIMEOUT = 2, 1800.0
# glibc keeps freed memory of up to 32 MiB a piece for itself, more of it the more sizes there are, and gives larger
# pieces back. Half a tensor is under that limit sooner than a whole one. With this variable it gives back 1 MiB too.
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
DEFAULT, GIVES_BACK = "as it comes", f"{THRESHOLD}={2**20}"
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One process's account of a generation.

    prefill: up to the first token, in seconds of the clock and of a core, and the most memory in bytes above what stood
    before. cache_bytes: at the end. tokens_per_second: of those after the first. tokens: their numbers.
    """

    prefill_seconds: float
    prefill_cpu_seconds: float
    prefill_bytes: int
    cache_bytes: int
    tokens_per_second: float
    tokens: str


@dataclass
class Marks:
    """A streamer that notes the peak of memory and the time of this process at the prompt and at each token."""

    memory: list[int] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def put(self, tokens: torch.Tensor) -> None:
        self.memory.append(resident_memory("VmHWM"))
        self.cpu.append(process_time())

    def end(self) -> None:
        pass


def run(length: int, new: int) -> Run:
    """On every rank of the default process group: generate `new` tokens after a prompt of `length` made-up ones."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**MODEL, max_position_embeddings=length + new, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(MODEL["vocab_size"], (1, length))
    if dist.get_world_size() > 1:
        sp_attention.enable(model, backend="sdpa")
    marks = Marks()
    clock = Clock(marks)
    start = resident_memory("VmRSS")
    forget_peak()
    made = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
    )
    return Run(
        prefill_seconds=clock.prefill,
        prefill_cpu_seconds=marks.cpu[1] - marks.cpu[0],
        prefill_bytes=marks.memory[1] - start,
        cache_bytes=sizes(made.past_key_values)[0],
        tokens_per_second=(new - 1) / clock.decode,
        tokens=" ".join(map(str, made.sequences[0, length:].tolist())),
    )


def table(record: Record) -> str:
    """Markdown: medians over the rounds, with the least and the most; of several ranks, the worst of each round."""

    def row(
        name: str, allocator: str, of: str, show: Callable[[float], str], worst: Callable[..., float] = max
    ) -> list[str]:
        rounds = [one for one in record["rounds"] if one["allocator"] == allocator]
        alone = [one["one_process"][of] for one in rounds]
        shared = [worst(rank[of] for rank in one["ranks"]) for one in rounds]
        cells = [f"{show(median(all))} ({show(min(all))} to {show(max(all))})" for all in (alone, shared)]
        return [name, *cells, f"{median(shared) / median(alone):.2f}"]

    def mebibytes(size: float) -> str:
        return f"{size / 2**20:.0f} MiB"

    rows = [
        row("time to the first token", DEFAULT, "prefill_seconds", "{:.1f} s".format),
        row("of it, computing on a core", DEFAULT, "prefill_cpu_seconds", "{:.1f} s".format),
        row("tokens/s after it", DEFAULT, "tokens_per_second", "{:.1f}".format, min),
        row("key/value cache at the end", DEFAULT, "cache_bytes", mebibytes),
        row("peak memory of the prefill, freed memory given back", GIVES_BACK, "prefill_bytes", mebibytes),
        row("peak memory of the prefill, allocator as it comes", DEFAULT, "prefill_bytes", mebibytes),
    ]
    return markdown_table([f"{record['tokens']} tokens", "one process", f"each of {RANKS} ranks", "ratio"], rows)


@click.command()
@click.option("--tokens", type=click.IntRange(RANKS), default=16384, show_default=True, help="In the prompt.")
@click.option("--new-tokens", type=click.IntRange(2), default=16, show_default=True, help="To generate after it.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of all four measurements.")
@click.option("--results", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON to write.")
def main(tokens: int, new_tokens: int, rounds: int, results: Path) -> None:
    """Measure generation after a long prompt in one process and on two ranks."""
    record: Record = {
        "date": date.today().isoformat(),
        "tokens": tokens,
        "new_tokens": new_tokens,
        "model": MODEL,
        "threads_of_a_process": 1,
        "cores": os.cpu_count(),
        "versions": {
            "sp_attention": sp_attention.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "rounds": [],
    }
    for number in range(rounds):
        for allocator in (DEFAULT, GIVES_BACK):
            _set(allocator)
            load = os.getloadavg()[0]
            (alone,) = run_ranks(1, run, tokens, new_tokens, timeout=TIMEOUT)
            ranks = run_ranks(RANKS, run, tokens, new_tokens, timeout=TIMEOUT)
            same = all(rank.tokens == alone.tokens for rank in ranks)
            record["rounds"].append(
                {
                    "allocator": allocator,
                    "load_before": load,
                    "same_tokens": same,
                    "one_process": asdict(alone),
                    "ranks": [asdict(rank) for rank in ranks],
                }
            )
            results.write_text(json.dumps(record, indent=2) + "\n")
            click.echo(f"round {number + 1} of {rounds}, {allocator}; the same tokens: {same}", err=True)
    click.echo(table(record))


def _set(allocator: str) -> None:
    """For processes that start from now on, which decide it when they start."""
    if allocator == GIVES_BACK:
        os.environ[THRESHOLD] = str(2**20)
    else:
        os.environ.pop(THRESHOLD, None)


if __name__ == "__main__":
    main()
