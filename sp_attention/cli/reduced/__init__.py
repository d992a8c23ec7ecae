"""Small models of any type of transformers, with random weights, and whole batches for them: no download."""

from sp_attention.cli.reduced.batches import KINDS
from sp_attention.cli.reduced.configuration import NotBuildableError
from sp_attention.cli.reduced.model import TASKS, enlarge, tasks_of, types_of
from sp_attention.cli.reduced.preparing import batches_for, prepare

__all__ = ["KINDS", "TASKS", "NotBuildableError", "batches_for", "enlarge", "prepare", "tasks_of", "types_of"]
