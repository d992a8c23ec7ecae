"""`sp-attention verify`: one model in one process and on several ranks, number for number."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from sp_attention.cli.outcomes import DIFFERS, EXACT, KINDS, REFUSED, VARIANTS, Comparison, Verdict
from sp_attention.cli.terminal import show_table, show_text

if TYPE_CHECKING:
    from sp_attention.cli.subject import Subject

STATUS = {EXACT: 0, DIFFERS: 1}
TIMEOUT = 600.0


@dataclass(frozen=True)
class Verified:
    """A comparison and what it is of. reason: why there is none."""

    comparison: Comparison | None
    model: str = ""
    task: str = ""
    dtype: str = ""
    parameters: int = 0
    reason: str = ""

    @property
    def outcome(self) -> str:
        return self.comparison.outcome if self.comparison is not None else "cannot run"


def _some_of(words: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """What reads an option that is some of these words, with commas between them."""

    def read(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        chosen = tuple(word for word in value.split(",") if word)
        for word in chosen:
            if word not in words:
                raise click.BadParameter(f"{word!r} is not one of {', '.join(words)}.", context, parameter)
        return chosen

    return read


@click.command()
@click.argument("model")
@click.option("--ranks", type=click.IntRange(2), default=2, show_default=True, help="Processes to start.")
@click.option("--backend", default="auto", show_default=True, help="Kernel; see `sp-attention backends`.")
@click.option("--task", help="causal-lm, masked-lm, seq2seq-lm, ...; by default the first that the model is for.")
@click.option("--length", type=click.IntRange(16), default=33, show_default=True, help="Tokens in a sequence.")
@click.option("--kinds", callback=_some_of(KINDS), default=",".join(KINDS), show_default=True, help="Batches to try.")
@click.option(
    "--with", "variants", callback=_some_of(VARIANTS), default="", help=f"Steps to try too: {','.join(VARIANTS)}."
)
@click.option("--full", is_flag=True, help="The size and the weights of a folder, not small random ones.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of a table.")
def verify(
    model: str,
    ranks: int,
    backend: str,
    task: str | None,
    length: int,
    kinds: tuple[str, ...],
    variants: tuple[str, ...],
    full: bool,
    as_json: bool,
) -> int:
    """Compare a model on several ranks with the same model in one process.

    MODEL is a type of models of transformers, such as qwen3, a folder with a configuration, or module:function, which
    returns a model; the module may be in the current folder. A type or a folder stands for a small model with random
    weights, unless --full. Compared are the loss, the outputs and the gradient of every parameter, for each kind of
    batch. Exit status 0: exact; 1: a number differs; 2: something is refused or cannot run.
    """
    from sp_attention.cli.subject import Subject
    from sp_attention.launch import RanksError, run_ranks

    if ":" in model:  # A function of the user's, who may keep its module here, beside whatever else.
        sys.path.append(os.getcwd())
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        verified = run_ranks(
            ranks, _verify, Subject(model, task, length, full), backend, kinds, variants, timeout=TIMEOUT
        )[0]
    except RanksError as error:
        verified = Verified(None, model, reason=str(error))
    if as_json:
        click.echo(json.dumps(_record(verified, ranks), indent=2))
    else:
        _show(verified, ranks)
    return STATUS.get(verified.outcome, 2)


def _verify(subject: "Subject", backend: str, kinds: tuple[str, ...], variants: tuple[str, ...]) -> Verified:
    """On every rank: build the model and compare it; the answer is the same everywhere."""
    import warnings

    import transformers

    from sp_attention.cli.comparison import compare
    from sp_attention.cli.reduced import NotBuildableError
    from sp_attention.cli.subject import prepared

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        ready = prepared(subject)
    except (NotBuildableError, ValueError, OSError) as error:
        return Verified(None, subject.model, subject.task or "", reason=str(error))
    batches = {kind: batch for kind, batch in ready.batches.items() if kind in kinds}
    comparison = compare(ready.model, batches, backend, variants)
    dtype = str(ready.model.dtype).removeprefix("torch.")
    return Verified(comparison, type(ready.model).__name__, ready.task, dtype, ready.model.num_parameters())


def _show(verified: Verified, ranks: int) -> None:
    comparison = verified.comparison
    if comparison is None:
        print(f"sp-attention: {verified.model} cannot be verified: {verified.reason}", file=sys.stderr)
        return
    size = f"{verified.parameters / 1e3:.0f} thousand parameters"
    show_text(f"{verified.model} ({verified.task}), {size}, {verified.dtype}, one process and {ranks} ranks")
    if comparison.refused:
        show_text(f"{REFUSED}: {comparison.refused}")
        return
    rows = [
        (verdict.kind, verdict.outcome, "" if verdict.error is None else f"{verdict.error:.1e}", verdict.where)
        for verdict in comparison.verdicts
    ]
    show_table(("batch", "result", "largest error", "of"), rows)
    for verdict in comparison.verdicts:
        for line in _remarks(verdict):
            show_text(f"{verdict.kind}: {line}")
    show_text(f"kernel: {comparison.kernel}")
    for kind, parts in comparison.parts.items():
        show_text(f"{kind}: {', '.join(parts)}")
    show_text(verified.outcome)


def _remarks(verdict: Verdict) -> list[str]:
    if verdict.outcome == DIFFERS and verdict.first is not None:
        return [f"the first module whose output differs is {verdict.first.module}, by {verdict.first.error:.1e}"]
    if verdict.outcome == DIFFERS:
        return ["every module's output agrees, so it differs from there on or backward"]
    return [verdict.reason] if verdict.reason else []


def _record(verified: Verified, ranks: int) -> dict[str, Any]:
    """What --json writes. An error that is no number, of a shape or of NaN, is null."""
    comparison = verified.comparison or Comparison(())
    return {
        "model": verified.model,
        "task": verified.task,
        "ranks": ranks,
        "backend": comparison.kernel,
        "dtype": verified.dtype,
        "parameters": verified.parameters,
        "outcome": verified.outcome,
        "reason": verified.reason or comparison.refused,
        "parts": comparison.parts,
        "batches": [
            {
                "kind": verdict.kind,
                "outcome": verdict.outcome,
                "error": _number(verdict.error),
                "of": verdict.where,
                "reason": verdict.reason,
                "first": verdict.first and {"module": verdict.first.module, "error": _number(verdict.first.error)},
            }
            for verdict in comparison.verdicts
        ],
    }


def _number(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None
