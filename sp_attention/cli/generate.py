"""`sp-attention generate`: text that goes on from a long prompt, which several ranks share."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

import click

from sp_attention.cli.terminal import show_table
from sp_attention.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
# In seconds. A rank that fails ends the others at once; this is for all that a long prompt takes on CPUs.
TIMEOUT = 12 * 3600.0


@dataclass(frozen=True)
class Request:
    """The words of the command line, for every rank. as_text: rank 0 writes the text while it is generated."""

    folder: Path
    prompt: str
    new_tokens: int
    backend: str
    dtype: str
    sample: bool
    temperature: float | None
    seed: int
    as_text: bool


@dataclass(frozen=True)
class Generated:
    """One rank's account. Sizes are in bytes.

    cache: of what this rank keeps of keys, values and states; whole_cache: of what one process would keep; None for
    a model without a cache. start, peak: resident memory before the prompt, and at most since then.
    """

    text: str
    kernel: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache: int | None
    whole_cache: int | None
    start: int
    peak: int

    @property
    def tokens_per_second(self) -> float | None:
        """Of those after the first; None if there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


@dataclass
class Clock:
    """A streamer of transformers that notes when it is given the prompt, and each new token; `to` is given them too."""

    to: Any = None
    times: list[float] = field(default_factory=list)

    def put(self, tokens: "Tensor") -> None:
        self.times.append(perf_counter())
        if self.to is not None:
            self.to.put(tokens)

    def end(self) -> None:
        if self.to is not None:
            self.to.end()

    @property
    def prefill(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.times[1] - self.times[0]

    @property
    def decode(self) -> float:
        """Seconds from the first token to the last."""
        return self.times[-1] - self.times[1]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompt", type=click.File(encoding="utf-8"), required=True, help="Text file; - is standard input.")
@click.option("--ranks", type=click.IntRange(2), default=2, show_default=True, help="Processes to start.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to generate.")
@click.option("--backend", default="auto", show_default=True, help="Kernel; see `sp-attention backends`.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="auto: as in the folder.")
@click.option("--sample", is_flag=True, help="Draw tokens, instead of taking the likeliest.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="Of --sample; by default the folder's.")
@click.option("--seed", type=click.IntRange(0), help="Of --sample; 0 by default.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, with the text in it, when all is done.")
def generate(
    folder: Path,
    prompt: TextIO,
    ranks: int,
    max_new_tokens: int,
    backend: str,
    dtype: str,
    sample: bool,
    temperature: float | None,
    seed: int | None,
    as_json: bool,
) -> int:
    """Generate text from a prompt that several processes share.

    FOLDER holds a causal language model and its tokenizer. The prompt is a text file, given to the model as it is, but
    for a newline at its end. The text appears while it is generated, and then how long it took and what memory: each
    rank does a part of the prompt, and keeps its heads of the keys and values. Exit status 2 when it is refused.
    """
    from sp_attention.launch import RanksError, run_ranks

    if not sample and (temperature, seed) != (None, None):
        raise click.UsageError("--temperature and --seed are for --sample; give that too, or leave them out")
    text = prompt.read().removesuffix("\n")
    if not text.strip():
        raise click.UsageError("the prompt is empty")
    os.environ["HF_HUB_OFFLINE"] = "1"
    request = Request(folder, text, max_new_tokens, backend, dtype, sample, temperature, seed or 0, not as_json)
    try:
        answers = run_ranks(ranks, _generate, request, timeout=TIMEOUT)
    except RanksError as error:
        raise click.ClickException(str(error)) from error
    refused = next((answer for answer in answers if isinstance(answer, Refused)), None)
    if refused is not None:
        raise click.UsageError(refused.reason)
    if as_json:
        click.echo(json.dumps(_record(folder, answers), indent=2))
    else:
        _show(answers)
    return 0


def _generate(request: Request) -> Generated | Refused:
    """On every rank: load the model and let it generate; or why it cannot, which is the same everywhere."""
    import warnings

    import torch
    import torch.distributed as dist
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
    from transformers.cache_utils import Cache

    import sp_attention
    from sp_attention.cli.rss import forget_peak, resident_memory
    from sp_attention.region.kv_cache import sizes

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(request.folder)
    except (OSError, ValueError, ImportError) as error:
        return Refused(f"{request.folder} has no tokenizer that can be loaded: {_one_line(error)}")
    batch = tokenizer(request.prompt, return_tensors="pt")
    if not batch["input_ids"].shape[1]:
        return Refused(f"the tokenizer of {request.folder} makes no tokens of the prompt: are all of its files there?")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(request.folder, dtype=request.dtype)
    except (OSError, ValueError, ImportError) as error:
        return Refused(f"{request.folder} has no causal language model that can be loaded: {_one_line(error)}")
    writes = request.as_text and dist.get_rank() == 0
    clock = Clock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if writes else None)
    options = {} if request.temperature is None else {"temperature": request.temperature}
    try:
        torch.manual_seed(request.seed)
        handle = sp_attention.enable(model, backend=request.backend)
        start = resident_memory("VmRSS")
        forget_peak()
        generated = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=request.new_tokens,
            do_sample=request.sample,
            num_beams=1,
            streamer=clock,
            return_dict_in_generate=True,
            **options,
        )
    except sp_attention.UnsupportedError as error:
        return Refused(str(error))
    cache = generated.past_key_values
    mine, whole = sizes(cache) if isinstance(cache, Cache) else (None, None)
    given = batch["input_ids"].shape[1]
    new = generated.sequences[0, given:]
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        kernel=handle.backend.kernel,
        dtype=str(model.dtype).removeprefix("torch."),
        prompt_tokens=given,
        new_tokens=len(new),
        prefill_seconds=clock.prefill,
        decode_seconds=clock.decode,
        cache=mine,
        whole_cache=whole,
        start=start,
        peak=resident_memory("VmHWM"),
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _show(ranks: list[Generated]) -> None:
    first, speed = ranks[0], ranks[0].tokens_per_second
    rows = (
        ("prompt, tokens", str(first.prompt_tokens)),
        ("new tokens", str(first.new_tokens)),
        ("to the first token, s", f"{first.prefill_seconds:.2f}"),
        ("after it, tokens/s", "" if speed is None else f"{speed:.1f}"),
        ("key/value cache, each rank", ", ".join(_mebibytes(rank.cache) for rank in ranks)),
        ("  in one process, all heads", _mebibytes(first.whole_cache)),
        ("peak resident memory, each rank", ", ".join(_mebibytes(rank.peak) for rank in ranks)),
        ("  of it for generating", ", ".join(_mebibytes(rank.peak - rank.start) for rank in ranks)),
    )
    show_table(("", f"{len(ranks)} ranks"), rows, f"kernel {first.kernel}, {first.dtype}")


def _mebibytes(size: int | None) -> str:
    return "none" if size is None else f"{size / 2**20:.1f} MiB"


def _record(folder: Path, ranks: list[Generated]) -> dict[str, Any]:
    """What --json writes. Sizes are in bytes, of each rank; times are rank 0's, in seconds."""
    first = ranks[0]
    return {
        "model": str(folder),
        "ranks": len(ranks),
        "backend": first.kernel,
        "dtype": first.dtype,
        "prompt_tokens": first.prompt_tokens,
        "new_tokens": first.new_tokens,
        "prefill_seconds": first.prefill_seconds,
        "decode_tokens_per_second": first.tokens_per_second,
        "cache_bytes": [rank.cache for rank in ranks],
        "cache_bytes_one_process": first.whole_cache,
        "peak_bytes": [rank.peak for rank in ranks],
        "peak_bytes_for_generating": [rank.peak - rank.start for rank in ranks],
        "text": first.text,
    }
