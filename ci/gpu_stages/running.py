"""Runs stages, each in processes of its own with a deadline, so that none waits for another's failure."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from time import time

import torch

from gpu_stages import collect, machine
from gpu_stages.plan import STAGES
from gpu_stages.results import AGAIN, Results, load, peek

# Where programs lie that are compiled when they are first called: for the next stage, and for `--collect` to pack.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "CUTE_DSL_CACHE_DIR")
# A stage whose processes end so often is left as it is.
STARTS = 12


def run(name: str, device: torch.device, folder: Path, deadline: float) -> Results:
    """What a stage has found when it ends, or is ended at its deadline, in seconds."""
    results = Results(folder, name, machine.facts(device))
    results.facts |= {"on": str(device), "deadline": f"{deadline:.0f} s", "until": time() + deadline}
    if machine.is_stand_in(device):
        results.facts["stand_in"] = STAGES[name].stand_in
    results.write()
    for _ in range(STARTS):
        worker = [sys.executable, "-m", "gpu_stages.work", str(results.file)]
        code = process(worker, folder / f"{name}.log", results.left)
        results = load(results.file)
        if code == 0 or code is None or (code != AGAIN and not results.tables):
            break
    if code is None:
        results.ended = f"It was ended at its deadline of {deadline:.0f} s: what follows is what it had."
    elif code:
        results.ended = f"failed: its process ended with status {code}, {STARTS} times or before its first row"
        results.ended += f": {(folder / f'{name}.log').read_text()[-600:]}"
    results.write()
    return results


def process(command: list[str], log: Path, seconds: float) -> int | None:
    """The exit status of a process of a stage, None where it had to be ended."""
    with log.open("a") as file:
        worker = subprocess.Popen(command, env=_environment(), stdout=file, stderr=file, start_new_session=True)
        try:
            return worker.wait(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if worker.poll() is None:
                # Its ranks end when it does; what they compile with is in its session.
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


def _environment() -> dict[str, str]:
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    collect.unpack(collect.FOLDER / collect.PACKED, collect.CACHE)
    caches = {name: str(collect.CACHE / name.split("_")[0].lower()) for name in CACHES}
    own = {"PYTHONPATH": path, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    return caches | own | os.environ | {"PYTHONPATH": path}


def summary(results: Results) -> str:
    """A line or some for the terminal."""
    rows = sum(map(len, results.tables.values()))
    lines = [f"{results.stage}: {rows} rows in {results.file.with_suffix('.md')}. {results.ended}"]
    return "\n".join([*lines, *(f"    {what}" for what in results.bad())])


def pages(folder: Path) -> list[Path]:
    """Write the pages of the result files of a folder anew."""
    found = [peek(file) for file in sorted(folder.glob("*.json")) if file.stem in STAGES]
    for results in found:
        results.write()
    return [results.file.with_suffix(".md") for results in found]
