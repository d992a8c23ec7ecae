"""`sp-attention doctor`: what is here, in one block to paste into a report, and whether the kernels are right."""

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import click

from sp_attention.cli.terminal import show_pairs, show_table, show_text, together

OUTCOMES = ("right", "refused", "wrong")


@click.command()
@click.option("--run", "runs", is_flag=True, help="Check what kernels do on the devices here, with every gradient.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of text.")
def doctor(runs: bool, as_json: bool) -> int:
    """Say what is installed, and what may be wrong with it, in one block to paste into a report.

    With --run, every kernel that can be used does everything in sp_attention.testing that it does not refuse, on every
    device here, and plain masks of up to 4096 tokens too; a minute for each kernel on a CPU. Exit status 0: nothing
    that ran is wrong; 1: a kernel is; 2: kernels cannot run.
    """
    from sp_attention.cli.machine import facts

    # What packages print when they are imported, or used, is not what was asked for.
    with redirect_stdout(sys.stderr):
        found = facts()
        problem = found["torch"]["problem"]
        found["plugins"] = _plugins() if problem is None else None
    if not as_json:
        show_pairs(_rows(found))
    status = 0
    if runs and problem is not None:
        click.echo("sp-attention: kernels cannot be checked, for torch cannot be imported", err=True)
        status = 2
    elif runs:
        with redirect_stdout(sys.stderr):
            found["checked"] = list(_checked())
        status = int(any(kernel["wrong"] for kernel in found["checked"]))
        if not as_json:
            click.echo()
            _show(found["checked"])
    if as_json:
        click.echo(json.dumps(found, indent=2))
    return status


def _plugins() -> dict[str, Any]:
    from sp_attention.cli.backends import described, origin
    from sp_attention.kernels.registry import load
    from sp_attention.mixers import registry

    found = described(load())
    found["broken"] += [{"reason": one.reason, **origin(one.plugin)} for one in registry.load().broken]
    return found


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The block, as names and texts; a name is left out where it is the one before."""
    torch = found["torch"]
    yield "sp-attention", found["sp_attention"]
    yield "python", found["python"]
    yield "platform", found["platform"]
    for name, version in found["packages"].items():
        yield name, version or "not installed"
        if name == "torch" and torch["problem"] is not None:
            yield "", f"cannot be imported: {torch['problem']}"
        elif name == "torch":
            built = [f"{kind} {torch[key]}" for kind, key in (("CUDA", "cuda"), ("ROCm", "rocm")) if torch[key]]
            yield "", f"built with {', '.join(built) or 'neither CUDA nor ROCm'}"
    cann = found["cann"]
    yield "CANN", f"{cann['version']} in {cann['home']}" if cann is not None else "not found"
    if torch["problem"] is None:
        yield "devices", f"cpu, {torch['threads']} threads"
        for device in torch["devices"]:
            yield "", _device(device)
        if torch["devices_problem"] is not None:
            yield "", f"no others: {torch['devices_problem']}"
        yield "process groups", ", ".join(torch["process_groups"]) or "none"
    yield "environment", " ".join(f"{name}={value}" for name, value in found["environment"].items()) or "not torchrun's"
    plugins = found["plugins"]
    if plugins is None:
        yield "backends", "not asked, for want of torch"
        return
    states = together(
        (f" on {entry['device']}, of {_origin(entry)}: {entry['reason'] or 'available'}", entry["kernel"])
        for entry in plugins["backends"]
    )
    for number, (state, kernels) in enumerate(states.items()):
        yield "" if number else "backends", ", ".join(kernels) + state
    for entry in plugins["broken"]:
        yield "broken plugin", f"{_origin(entry)}: {entry['reason']}"


def _device(device: dict[str, Any]) -> str:
    text = f"{device['type']}:{device['index']}"
    if device["name"] is not None:
        text += f", {device['name']}"
    if device["total_memory"] is not None:
        text += f", {device['total_memory'] / 2**30:.0f} GiB"
    if device["major"] is not None:
        text += f", compute capability {device['major']}.{device['minor']}"
    return text


def _origin(entry: dict[str, Any]) -> str:
    return f"{entry['distribution']} {entry['version']}"


def _checked() -> Iterator[dict[str, Any]]:
    """Every usable kernel on every device that is here: what is right, and what is refused or wrong and why."""
    from rich.console import Console

    from sp_attention.cli.kernels import ask, check, devices
    from sp_attention.kernels.registry import usable
    from sp_attention.testing import REFUSED, RIGHT, WRONG

    with Console(stderr=True).status("") as status:
        for device in devices():
            for backend in usable(device):
                answers = ask(backend, device)
                found: dict[str, dict[str, str]] = {RIGHT: {}, REFUSED: {}, WRONG: {}}
                for result in check(backend, answers):
                    found[result.outcome][result.feature] = result.reason
                    status.update(f"{backend.kernel} on {device}: {result.feature}")
                of = {"kernel": backend.kernel, "device": device, "dtype": answers.dtype}
                yield {**of, "right": list(found[RIGHT]), "refused": found[REFUSED], "wrong": found[WRONG]}


def _show(checked: list[dict[str, Any]]) -> None:
    """A row for every kernel, and a line for every reason why it refuses something, or what it does wrong."""
    rows = [
        (*(each[key] for key in ("kernel", "device", "dtype")), *(str(len(each[key])) for key in OUTCOMES))
        for each in checked
    ]
    show_table(("kernel", "device", "dtype", "right", "refused", "WRONG"), rows)
    for each in checked:
        for outcome, word in (("refused", "refused"), ("wrong", "WRONG")):
            for reason, features in together((reason, one) for one, reason in each[outcome].items()).items():
                show_text(f"{each['kernel']} on {each['device']}: {word}: {', '.join(features)}: {reason}")
