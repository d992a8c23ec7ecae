"""`sp-attention backends`: what is registered, why something cannot be used, and what is refused."""

import json
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sp_attention.cli.kernels import Answers
    from sp_attention.kernels.registry import Plugin, Registered, Registry


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of a table.")
def backends(as_json: bool) -> None:
    """List the kernels of every installed plugin.

    Device, priority for backend="auto", availability or the reason against it, what is refused, and origin. The
    features are those of sp_attention.testing; kernels are asked for them, and are not run.
    """
    from sp_attention.kernels.registry import load

    # What plugins print when they are imported is not what was asked for.
    with redirect_stdout(sys.stderr):
        registry = load()
        answers = [_asked(entry) for entry in registry.backends]
    if as_json:
        record = described(registry)
        for entry, answer in zip(record["backends"], answers, strict=True):
            # Null for a kernel that cannot be used, or whose device is not here.
            entry["asked"] = answer and {"device": answer.device, "dtype": answer.dtype}
            entry["refuses"] = answer and answer.refused
        click.echo(json.dumps(record, indent=2))
    else:
        _show(registry, answers)


def _asked(entry: "Registered") -> "Answers | None":
    from sp_attention.cli.kernels import ask, device_for

    device = device_for(entry.backend) if entry.problem is None else None
    return None if device is None else ask(entry.backend, device)


def _show(registry: "Registry", answers: "list[Answers | None]") -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("device", Column("kernel", no_wrap=True), "priority", "available", "refuses", "from")
    for entry, answer in zip(registry.backends, answers, strict=True):
        backend = entry.backend
        said = [f"{'; '.join(names)}: {reason}" for reason, names in by_reason(answer).items()]
        if entry.problem is None and answer is None:
            said = [f"not asked: there is no {backend.device} here"]
        cells = [str(backend.priority), entry.problem or "yes", "\n".join(said), str(entry.plugin)]
        table.add_row(*map(Text, [backend.device, backend.kernel, *cells]))  # what strangers write is no markup
    for broken in registry.broken:
        table.add_row(*map(Text, ["-", "-", "-", f"broken plugin: {broken.reason}", "", str(broken.plugin)]))
    Console().print(table)


def by_reason(answers: "Answers | None") -> dict[str, list[str]]:
    """What is refused, by the reason for it."""
    from sp_attention.testing import FEATURES

    found: dict[str, list[str]] = {}
    for name, reason in (answers.refused if answers is not None else {}).items():
        found.setdefault(reason, []).append(name)
    return {reason: ["everything"] if FEATURES.keys() <= set(names) else names for reason, names in found.items()}


def described(registry: "Registry") -> dict[str, Any]:
    """A registry as JSON has it."""
    return {
        "backends": [
            {
                "device": entry.backend.device,
                "kernel": entry.backend.kernel,
                "priority": entry.backend.priority,
                "available": entry.problem is None,
                "reason": entry.problem,
                **_origin(entry.plugin),
            }
            for entry in registry.backends
        ],
        "broken": [{"reason": broken.reason, **_origin(broken.plugin)} for broken in registry.broken],
    }


def _origin(plugin: "Plugin") -> dict[str, str | None]:
    dist = plugin.point.dist
    return {
        "distribution": dist.name if dist is not None else None,
        "version": dist.version if dist is not None else None,
        "entry_point": plugin.point.name,
    }
