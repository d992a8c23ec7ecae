"""What this library raises on purpose.

    NotImplementedError
    └── UnsupportedError        a feature that cannot be done exactly
        ├── BackendError        an unknown, unavailable or broken backend, or a kernel that cannot do what is asked
        └── ShardedLogitsError  a part of the logits used as if they were all; also an AttributeError
    ValueError
    └── BatchError              the ranks of a group were given different batches, modes or models
    OSError
    └── CheckpointError         a rank could not write its part of a Trainer's checkpoint

Wrong arguments of `enable` are plain ValueErrors. Every one of them is raised on every rank of the group.
"""

from dataclasses import dataclass


class UnsupportedError(NotImplementedError):
    """This cannot be done exactly, so it is not done. The text says what, why, and what can be done instead."""


class BackendError(UnsupportedError):
    """The backend does not exist here, or cannot be used, or cannot do what a model asks; the text has the reason."""


class BatchError(ValueError):
    """The ranks of a sequence-parallel group did not all get the same whole batch, in the same mode, or one model."""


class ShardedLogitsError(UnsupportedError, AttributeError):
    """Logits of this rank's span were used as if they were all; an AttributeError, so that `hasattr` is answered."""


class CheckpointError(OSError):
    """A rank could not write its part of a checkpoint; what is in memory, and earlier checkpoints, are as they were."""


@dataclass(frozen=True)
class Refused:
    """In place of a value: the reason why there is none."""

    reason: str


def told(error: Exception, length: int = 300) -> str:
    """What somebody else's error is and says, in one line: that of a module may be its repr, of a line a part."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else f"{text[:length]} ..."
