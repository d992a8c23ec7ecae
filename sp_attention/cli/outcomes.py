"""What a comparison says: verdicts on batches, and what parts of layers are; no torch, so that --help is quick."""

from collections.abc import Mapping
from dataclasses import dataclass, field

EXACT, DIFFERS, REFUSED, NOT_COMPARABLE, FAILED = "exact", "differs", "refused", "not comparable", "failed"
# Of several ranks' verdicts the first of these counts.
WORST_FIRST = (FAILED, DIFFERS, REFUSED, NOT_COMPARABLE, EXACT)

VARIANTS = ("checkpointing", "reentrant-checkpointing", "hidden-states", "two-forwards", "no-grad", "frozen")
KINDS = ("plain", "left-padded", "right-padded", "packed", "pixels")


@dataclass(frozen=True)
class Parting:
    """The first module, in the order of the forward, whose output is another than in one process."""

    module: str
    error: float
    call: int


@dataclass(frozen=True)
class Verdict:
    """What came of one batch. error: the largest relative error on any rank, and of what. reason: why not exact."""

    kind: str
    outcome: str
    error: float | None = None
    where: str = ""
    reason: str = ""
    first: Parting | None = None


@dataclass(frozen=True)
class Comparison:
    """What came of a model.

    refused: why `enable` did. kernel: what it took. parts: those of layers, by what they are.
    """

    verdicts: tuple[Verdict, ...]
    kernel: str = ""
    refused: str = ""
    parts: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """The worst of all: a number that differs, then a failure, then a refusal; exact when nothing is worse."""
        found = {verdict.outcome for verdict in self.verdicts} | ({REFUSED} if self.refused else set())
        return next((outcome for outcome in (DIFFERS, FAILED, REFUSED, EXACT) if outcome in found), NOT_COMPARABLE)
