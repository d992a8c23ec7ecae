"""A stage in a process of its own: `python -m gpu_stages.work FILE`, where FILE is its result file, with the facts."""

import datetime
import sys
import warnings
from importlib import import_module
from pathlib import Path

import torch
import transformers

from gpu_stages.plan import STAGES
from gpu_stages.results import load


def main(file: Path) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = load(file)
    import_module(STAGES[results.stage].module).run(results, torch.device(results.facts["on"]))
    # Ranks of the stage may have written since.
    results = load(file)
    results.ended = f"It came to its end at {datetime.datetime.now(datetime.timezone.utc):%H:%M:%S} UTC."
    results.write()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
