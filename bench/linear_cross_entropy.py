"""Our loss in tiles beside torch's `F.linear_cross_entropy`: `python bench/linear_cross_entropy.py`.

A head without steps, forward and backward of the sum of losses, a seventh of the targets ignored. Each step is in a new
process with one thread: the time that the processor gave it, and the most memory above what stood before it. Errors are
of the loss and of the gradients of hidden states, weight and bias, relative to the largest number that float64 gives.
The raw numbers are in docs/data/speed/linear_cross_entropy.json.
"""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_attention.cli.rss import forget_peak, resident_memory
from sp_attention.launch import run_ranks
from sp_attention.loss.tiled_loss import LMHead, LMHeadInput, tile_for

DATA = Path(__file__).parent.parent / "docs" / "data" / "speed" / "linear_cross_entropy.json"
IGNORED = -100
# A dtype and a vocabulary.
CASES = (("float32", 32768), ("float32", 131072), ("bfloat16", 32768), ("bfloat16", 131072))

Loss = Callable[[nn.Linear, Tensor, Tensor], Tensor]


def at_once(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """As transformers' ForCausalLMLoss."""
    return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORED, reduction="sum")


def tiled(head: nn.Linear, hidden: Tensor, targets: Tensor, steps: tuple[Callable[[Tensor], Tensor], ...]) -> Tensor:
    """Our own, which is taken where there are steps, or torch's where it is taken."""
    known = LMHead(head, "lm_head", steps, head.out_features, tile_for(head.out_features))
    return LMHeadInput(known, head, hidden[None], known.tiles(len(hidden)), nullcontext).loss(targets[None], IGNORED)


def torchs(head: nn.Linear, hidden: Tensor, targets: Tensor, ours: bool) -> Tensor:
    """With chunks of our tiles, or of its own choice."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=tile_for(head.out_features) if ours else None)
    return F.linear_cross_entropy(
        hidden, head.weight, targets, linear_bias=head.bias, reduction="sum", ignore_index=IGNORED, options=options
    )


LOSSES: dict[str, Loss] = {
    "at once": at_once,
    "ours": partial(tiled, steps=(lambda logits: logits[:],)),
    "torch": partial(torchs, ours=False),
    "torch, our tiles": partial(torchs, ours=True),
    "taken": partial(tiled, steps=()),
}
TIMED = ("ours", "torch", "torch, our tiles", "taken")


def made(dtype: str, vocabulary: int, bias: bool, tokens: int, size: int) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(size, vocabulary, bias=bias).to(getattr(torch, dtype))
    hidden = torch.randn(tokens, size).to(head.weight.dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,)).masked_fill(torch.arange(tokens) % 7 == 0, IGNORED)
    return head, hidden, targets


def step(loss: Loss, head: nn.Linear, hidden: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss and its gradients."""
    learned = [hidden, *head.parameters()]
    result = loss(head, hidden, targets)
    return [result.detach(), *torch.autograd.grad(result, learned)]


def cost_of(name: str, case: tuple[str, int], tokens: int, size: int) -> tuple[int, float]:
    """Bytes and seconds of a process, for one step."""
    torch.set_num_threads(1)
    step(LOSSES[name], *made(case[0], 64, False, 8, 8))
    given = made(*case, False, tokens, size)
    forget_peak()
    before, began = resident_memory("VmRSS"), process_time()
    step(LOSSES[name], *given)
    seconds = process_time() - began
    return resident_memory("VmHWM") - before, seconds


def errors_of(dtype: str, tokens: int = 512, vocabulary: int = 8192, size: int = 512) -> dict[str, list[float]]:
    """Of the loss and of each gradient, by contender, with a bias."""
    head, hidden, targets = made(dtype, vocabulary, True, tokens, size)
    wide = nn.Linear(size, vocabulary).double()
    wide.load_state_dict({name: one.double() for name, one in head.state_dict().items()})

    def exact(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden), targets, ignore_index=IGNORED, reduction="sum")

    right = step(exact, wide, hidden.detach().double().requires_grad_(), targets)
    return {
        name: [
            float((one.double() - other).abs().max() / other.abs().max())
            for one, other in zip(step(loss, head, hidden, targets), right, strict=True)
        ]
        for name, loss in LOSSES.items()
    }


@click.command()
@click.option("--tokens", default=4096, show_default=True)
@click.option("--size", default=512, show_default=True, help="Of hidden states, E.")
@click.option("--rounds", default=2, show_default=True)
def main(tokens: int, size: int, rounds: int) -> None:
    # glibc keeps freed memory for itself otherwise, and little of what a step takes is seen.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    record: dict[str, Any] = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "tokens": tokens,
        "size": size,
        "errors": {dtype: errors_of(dtype) for dtype in ("float64", "float32", "bfloat16")},
        "costs": [],
    }
    for _, case, name in product(range(rounds), CASES, TIMED):
        ((spent, seconds),) = run_ranks(1, cost_of, name, case, tokens, size, timeout=3600)
        record["costs"].append({"case": case, "name": name, "bytes": spent, "seconds": seconds})
        DATA.write_text(json.dumps(record, indent=1) + "\n")
        print(*case, name, f"{spent / 2**20:.0f} MiB, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
