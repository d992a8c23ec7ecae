"""transformers' Trainer and what is derived from it, for models that were made sequence-parallel."""

from typing import TypeVar

from transformers import Trainer

from sp_attention.integrations.trainer import InGroups
from sp_attention.integrations.trl import GeneratesInGroups

TrainerClass = TypeVar("TrainerClass", bound=Trainer)


def sequence_parallel(trainer_class: type[TrainerClass]) -> type[TrainerClass]:
    """A subclass of any Trainer for a model that `sp_attention.enable` was called on before.

    Everything is that of a run with as many processes as there are groups: the samples and their order, the total batch
    size, steps, epochs, learning rates, token counts, losses, gradient norms, evaluation and its metrics. All ranks of
    a group read the same data, and evaluation is sequence-parallel too.
    """
    base = GeneratesInGroups if hasattr(trainer_class, "_generate_and_score_completions") else InGroups
    return type(trainer_class.__name__, (base, trainer_class), {"__module__": trainer_class.__module__})
