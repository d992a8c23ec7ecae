"""Small models of any type of transformers, with random weights, and whole batches for them: no download, no table."""

from sp_attention.cli.reduced.batches import KINDS, batches_for
from sp_attention.cli.reduced.configuration import NotBuildableError
from sp_attention.cli.reduced.model import TASKS, build, enlarge, tasks_of, types_of

__all__ = ["KINDS", "TASKS", "NotBuildableError", "batches_for", "build", "enlarge", "tasks_of", "types_of"]
