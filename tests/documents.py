"""The Python of the documents: every block by its place, what a page takes for granted, and what the block prints."""

import contextlib
import io
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from helpers import as_launched
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import sp_attention

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"^(?P<indent> *)```python\n(?P<code>.*?)^ *```$(?:\n\n^ *```text\n(?P<output>.*?)^ *```$)?",
    re.DOTALL | re.MULTILINE,
)
# Packages with environments of their own, which run the blocks that name them.
ELSEWHERE = {"deepspeed": ("deepspeed",), "trl": ("trl", "peft", "SFTTrainer")}


def programs(of: str = "") -> dict[str, tuple[str, str | None]]:
    """Python blocks of all documents, by file and line, with the text block that follows as what they print.

    of: those of one of the packages `ELSEWHERE`; by default those that need none of these.
    """
    found = {}
    for file in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("backends/**/*.md")]):
        text = file.read_text()
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start()) + 1
            code = "".join(row.removeprefix(block["indent"]) for row in block["code"].splitlines(keepends=True))
            if next((name for name, words in ELSEWHERE.items() if any(word in code for word in words)), "") == of:
                found[f"{file.relative_to(ROOT)}:{line}"] = (code, block["output"])
    return found


def printed(code: str, given: Callable[[], dict[str, Any]]) -> str:
    """What a program prints. One that does not begin with an import or a docstring goes on from what is `given`."""
    names = {} if code.startswith(("import ", '"""')) else given()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, names | {"__name__": "__main__"})
    return output.getvalue()


def outcomes(
    places: tuple[str, ...], of: str = "", given: Callable[[], dict[str, Any]] | None = None
) -> dict[str, tuple[str, str]]:
    """On every rank: what each program prints, and how it fails."""
    as_launched()
    known, found = programs(of), {}
    for place in places:
        try:
            found[place] = printed(known[place][0], given or model_and_data), ""
        except Exception:
            found[place] = "", traceback.format_exc()
    return found


def model_and_data() -> dict[str, Any]:
    """What readers have before they come to a page: imports, a model, data, a batch, an optimizer, arguments."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=6))
    rows = torch.randint(128, (8, 33))
    batch = {"input_ids": rows[:2], "labels": rows[:2]}
    return {
        "sp_attention": sp_attention,
        "torch": torch,
        "transformers": transformers,
        "Trainer": transformers.Trainer,
        "TrainingArguments": transformers.TrainingArguments,
        "DataLoader": DataLoader,
        "DistributedSampler": DistributedSampler,
        "fully_shard": fully_shard,
        "rank": dist.get_rank(),
        "model": model,
        "batch": batch,
        "data": [{"input_ids": row, "labels": row} for row in rows],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "config": {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}},
        "args": transformers.TrainingArguments(
            tempfile.mkdtemp(),
            max_steps=1,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        ),
        "accelerator": Accelerator(cpu=True),  # whose state the arguments have made anew
    }
