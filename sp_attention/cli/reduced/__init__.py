"""Small models of any type of transformers, with random weights, and whole batches for them: no download."""

from sp_attention.cli.reduced.configuration import NotBuildableError
from sp_attention.cli.reduced.model import TASKS, build, enlarge, tasks_of, types_of
from sp_attention.cli.reduced.preparing import batches_for, prepare

__all__ = ["TASKS", "NotBuildableError", "batches_for", "build", "enlarge", "prepare", "tasks_of", "types_of"]
