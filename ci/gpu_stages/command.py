"""The command line of `ci/gpu`."""

import argparse
import re
from pathlib import Path

from gpu_stages import collect, machine, running, verdicts
from gpu_stages.plan import DEADLINE, REHEARSAL, STAGES

TEXT = """Check this library on the accelerator of this machine, in stages that each end within four minutes.

Each stage writes a JSON file and a page of what it found, row by row, and none waits for another. With `--device cpu`
all of it is rehearsed, with stand-ins: docs/devices.md.
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("ci/gpu", description=TEXT, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = "; ".join(f"{stage.name}: {stage.shows}" for stage in STAGES.values())
    made.add_argument("--stage", action="append", choices=STAGES, metavar="STAGE", help=f"all by default. {shown}")
    made.add_argument("--device", help="cpu rehearses; by default this machine's accelerator")
    made.add_argument("--to", type=Path, metavar="FOLDER", help="for results; by default one in docs/results")
    made.add_argument("--deadline", type=float, metavar="SECONDS", help=f"of a stage: {DEADLINE:.0f}, rehearsed 600")
    made.add_argument("--collect", type=Path, nargs="?", const=collect.FOLDER, metavar="FOLDER", help=collect.TEXT)
    made.add_argument("--only", action="append", metavar="PACKAGE", help="of what is collected")
    made.add_argument("--python", default=collect.PYTHON, help="version of the machine that is collected for")
    made.add_argument("--verdicts", type=Path, metavar="FILE", help=verdicts.TEXT)
    made.add_argument("--pages", type=Path, metavar="FOLDER", help="write the pages of its result files anew")
    return made


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    if asked.collect is not None:
        return collect.main(asked.collect, asked.python, asked.only)
    if asked.verdicts is not None:
        return verdicts.main(asked.verdicts)
    if asked.pages is not None:
        print(*running.pages(asked.pages), sep="\n")
        return 0
    device = machine.device_named(asked.device)
    if device is None:
        print("torch finds no accelerator here, so there is nothing to run; `--device cpu` rehearses it with stand-ins")
        return 1
    rehearsed = machine.is_stand_in(device)
    folder = asked.to or _folder(device)
    bad = False
    for name in asked.stage or STAGES:
        results = running.run(name, device, folder, asked.deadline or (REHEARSAL if rehearsed else DEADLINE))
        print(running.summary(results), flush=True)
        bad |= any(results.bad()) or (results.ended or "").startswith("failed")
    return int(bad)


def _folder(device: "machine.torch.device") -> Path:
    """Of a device in docs/results, by its name and the day; a rehearsal's in build."""
    if machine.is_stand_in(device):
        return machine.ROOT / "build" / "gpu" / "rehearsal"
    name = re.sub(r"[^\w]+", "-", machine.name_of(device))
    return machine.ROOT / "docs" / "results" / f"{name}-{machine.today()}"
