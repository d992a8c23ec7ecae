"""`sp-attention backends`: what is registered, why something cannot be used, and what is refused."""

import json
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from sp_attention.cli.terminal import show_table, show_text, together

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
    """A table, and below it why: what cannot be used, what is refused, where all of it is from, what is broken."""
    rows, problems, refusals, origins = [], [], [], []
    for entry, answer in zip(registry.backends, answers, strict=True):
        backend = entry.backend
        name = backend.kernel if backend.device == "any" else f"{backend.kernel} on {backend.device}"
        available = "no" if entry.problem is not None else "yes" if answer is not None else f"no {backend.device} here"
        counted = str(len(answer.refused)) if answer is not None else ""
        rows.append((backend.kernel, backend.device, str(backend.priority), available, counted))
        problems += [(entry.problem, name)] if entry.problem is not None else []
        refusals += [(f"{', '.join(names)}: {reason}", name) for reason, names in by_reason(answer).items()]
        origins.append((str(entry.plugin), name))
    show_table(("kernel", "device", "priority", "available", "refuses"), rows)
    _list("Not available:", [f"{', '.join(names)}: {reason}" for reason, names in together(problems).items()])
    _list("Refused:", [f"{', '.join(names)}: {reason}" for reason, names in together(refusals).items()])
    _list("Broken plugins:", [f"{broken.plugin}: {broken.reason}" for broken in registry.broken])
    _list("From:", [f"{origin}: {', '.join(names)}" for origin, names in together(origins).items()])


def _list(title: str, lines: list[str]) -> None:
    if lines:
        click.echo(f"\n{title}")
    for line in lines:
        show_text(line, "  ")


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
                **origin(entry.plugin),
            }
            for entry in registry.backends
        ],
        "broken": [{"reason": broken.reason, **origin(broken.plugin)} for broken in registry.broken],
    }


def origin(plugin: "Plugin") -> dict[str, str | None]:
    dist = plugin.point.dist
    return {
        "distribution": dist.name if dist is not None else None,
        "version": dist.version if dist is not None else None,
        "entry_point": plugin.point.name,
    }
