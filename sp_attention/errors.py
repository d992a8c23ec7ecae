"""What this library raises on purpose.

    NotImplementedError
    └── UnsupportedError        a feature that cannot be done exactly
        └── BackendError        an unknown, unavailable or broken backend
    ValueError
    └── BatchError              the ranks of a group were given different batches

Wrong arguments of `enable` are plain ValueErrors. Every one of them is raised on every rank of the group.
"""


class UnsupportedError(NotImplementedError):
    """This cannot be done exactly, so it is not done. The text says what, why, and what can be done instead."""


class BackendError(UnsupportedError):
    """The backend that was asked for does not exist on this device or cannot be used; the text has the reason."""


class BatchError(ValueError):
    """The ranks of a sequence-parallel group did not all get the same whole batch."""
