"""Checkpoints of a Trainer: what cannot be written is an error on every rank, what was cut off is not resumed from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from sp_attention.distributed.consistency import share_problem
from sp_attention.distributed.peers import Peers
from sp_attention.errors import CheckpointError


class WholeCheckpoints(Trainer):
    """Writes checkpoints on all ranks or on none, and resumes from the last one that was written to its end."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            # Where there is none Trainer raises what it always does.
            resume_from_checkpoint = _last_whole(str(self.args.output_dir)) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        def write() -> None:
            super(WholeCheckpoints, self).save_model(output_dir, _internal_call)

        # Others than Trainer may call it on one rank.
        return self._together(write) if _internal_call else write()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._together(lambda: super(WholeCheckpoints, self)._save_optimizer_and_scheduler(output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        self._together(lambda: super(WholeCheckpoints, self)._save_rng_state(output_dir))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # What is left of it is the state, which one rank writes.
        self._together(lambda: super(WholeCheckpoints, self)._save_checkpoint(*args, **kwargs))

    def _together(self, write: Callable[[], None]) -> None:
        """Write a part of a checkpoint; raises CheckpointError on every rank if it fails on one.

        Else the others would go on, and wait for that rank in their next collective.
        """
        world = dist.group.WORLD if dist.is_initialized() else None
        if world is None:
            return write()
        problem: CheckpointError | None = None
        try:
            write()
        except CheckpointError:
            raise  # of a part of it, on every rank
        except Exception as error:
            step = self.state.global_step
            problem = CheckpointError(
                f"rank {dist.get_rank()} could not write {PREFIX_CHECKPOINT_DIR}-{step}: {type(error).__name__}: "
                f"{error}. The weights in memory are those of step {step}: save them elsewhere, or make room and train "
                "again with resume_from_checkpoint=True, which takes the last checkpoint that is whole"
            )
            problem.__cause__ = error
        share_problem(problem, Peers(world, dist.get_rank(), dist.get_world_size()))


def _last_whole(folder: str) -> str | None:
    """The last checkpoint that was written to its end, None if there is none: Trainer writes its state last."""
    return next((found for found in reversed(sort_checkpoints(folder)) if _has_state(Path(found))), None)


def _has_state(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True
