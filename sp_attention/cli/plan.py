"""`sp-attention plan`: from a configuration alone, what fits on which devices, and the lines that do it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sp_attention.cli.terminal import show_pairs, show_table, show_text


def _as(read: str) -> Callable[[click.Context, click.Parameter, str], int]:
    """What reads an option by a function of `planning.subject`."""

    def value(context: click.Context, parameter: click.Parameter, words: str) -> int:
        from sp_attention.cli.planning import subject

        try:
            found: int = getattr(subject, read)(words)
        except ValueError as error:
            raise click.BadParameter(str(error), context, parameter) from error
        return found

    return value


@click.command()
@click.argument("model")
@click.option("--length", required=True, callback=_as("tokens"), help="Tokens of a sequence: 131072, 128K, 1M.")
@click.option("--devices", type=click.IntRange(1), required=True, help="Devices in all.")
@click.option("--memory", required=True, callback=_as("size"), help="Of a device: 80GB, 40GiB.")
@click.option("--per-machine", type=click.IntRange(1), default=8, show_default=True, help="Devices of a machine.")
@click.option("--engine", type=click.Choice(["fsdp2", "zero3", "ddp"]), default="fsdp2", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at a time.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of tables.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="A PNG of memory by length.")
def plan(
    model: str,
    length: int,
    devices: int,
    memory: int,
    per_machine: int,
    engine: str,
    batch: int,
    as_json: bool,
    plot: Path | None,
) -> int:
    """Plan a training: ranks that share a sequence, savers, memory, bytes that travel, and the lines to paste.

    MODEL is a type of models of transformers, such as llama, a folder with config.json, or sizes, such as
    hidden=4096,layers=32,heads=32,kv_heads=8,intermediate=14336,vocab=128256, with experts=128,experts_per_token=8,
    moe_intermediate=768 if it has experts. Nothing is downloaded, no weights are needed, and nothing is computed: a
    layer of each kind runs on tensors without memory. Computed in bfloat16, with AdamW. Exit status 0: it fits; 1: it
    does not; 2: nothing can be told of this model.
    """
    import torch
    import transformers

    from sp_attention.cli.planning.choosing import Wanted, best, options
    from sp_attention.cli.planning.engines import ENGINES
    from sp_attention.cli.planning.lengths import model_of, parts_by_length
    from sp_attention.cli.planning.meta_model import NotPlannableError, meta_model
    from sp_attention.cli.planning.record import by_length, record
    from sp_attention.cli.planning.subject import configuration

    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    try:
        meta = meta_model(configuration(model), torch.bfloat16)
        wanted = Wanted(length, batch, devices, min(per_machine, devices), memory, ENGINES[engine])
        found = options(wanted, model_of(meta), parts_by_length(meta, batch))
        chosen = best(found)
        told = record(found, chosen)
    except NotPlannableError as error:
        print(f"sp-attention: {model} cannot be planned: {error}", file=sys.stderr)
        return 2
    if plot is not None:
        from sp_attention.cli.figure import draw_stacks

        title = f"{chosen.model.name}, {chosen.sp_size} ranks share a sequence, savers: {chosen.savers}"
        draw_stacks(plot, title, by_length(chosen), memory)
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        _show(told, chosen.wanted.engine.told)
    return 0 if chosen.fits else 1


def _show(told: dict[str, Any], engine: str) -> None:
    wanted, model, savers = told["wanted"], told["model"], told["savers"]
    show_text(
        f"{model['name']}: {model['parameters'] / 1e9:.2f} billion parameters, {model['layers']} layers; sequences of "
        f"{wanted['length']:,} tokens on {wanted['devices']} devices of {_gb(wanted['memory'])}, of which "
        f"{wanted['left']:.0%} are left free; {wanted['engine']}: {engine}"
    )
    click.echo()
    show_pairs(
        [
            ("fits", "yes" if told["fits"] else "no: this is what comes nearest"),
            ("sp_size", f"{told['sp_size']}: {_count(told['groups'], 'group')}, each with batches of its own"),
            ("grid", _grid(told["grid"])),
            ("checkpointing", "yes" if savers["checkpointing"] else "no"),
            ("mlp_tile", _tokens(savers["mlp_tile"])),
            ("loss_tile", _tokens(savers["loss_tile"])),
            ("offload", "yes" if savers["offload"] else "no"),
            ("longest", f"{told['longest']:,} tokens fit so"),
        ]
    )
    click.echo()
    peak = told["peak"]
    rows = [(part, _gb(size), f"{size / peak['bytes']:.0%}") for part, size in peak["parts"].items()]
    show_table(("part", "bytes", "share"), [*rows, ("all", _gb(peak["bytes"]), "100%")], f"Peak: {peak['in']}")
    click.echo()
    sent = [
        (name, _gb(told["sent"][key]["within"]), _gb(told["sent"][key]["across"]))
        for name, key in (("exchange around attention and mixers", "exchange"), ("weights and gradients", "engine"))
    ]
    show_table(("sent by a device in a step", "within its machine", "to other machines"), sent)
    click.echo()
    sizes = [
        (
            str(one["sp_size"]),
            f"{one['grid']['head_groups']} x {one['grid']['query_blocks']}",
            _savers(one["savers"]),
            _gb(one["peak"]),
            "yes" if one["fits"] else "no",
            f"{one['longest']:,}",
        )
        for one in told["sp_sizes"]
    ]
    show_table(("sp_size", "grid", "with", "peak", "fits", "longest"), sizes)
    click.echo("\nPaste:\n")
    click.echo("\n".join(told["lines"]))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _grid(grid: dict[str, int]) -> str:
    return f"{_count(grid['head_groups'], 'head group')} x {_count(grid['query_blocks'], 'query block')}"


def _tokens(number: int | None) -> str:
    return "none" if number is None else f"{number:,} tokens"


def _savers(savers: dict[str, Any]) -> str:
    return ", ".join(name for name, is_on in savers.items() if is_on) or "nothing"
