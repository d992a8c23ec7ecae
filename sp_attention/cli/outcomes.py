"""What a comparison says: verdicts on batches, and what a report says of parts; no torch, so that --help is quick."""

import re
from dataclasses import dataclass

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
    """What came of a model. refused: why `enable` did. kernel, report: what it took, and what the handle says."""

    verdicts: tuple[Verdict, ...]
    kernel: str = ""
    report: str = ""
    refused: str = ""

    @property
    def outcome(self) -> str:
        """The worst of all: a number that differs, then a failure, then a refusal; exact when nothing is worse."""
        found = {verdict.outcome for verdict in self.verdicts} | ({REFUSED} if self.refused else set())
        return next((outcome for outcome in (DIFFERS, FAILED, REFUSED, EXACT) if outcome in found), NOT_COMPARABLE)


def parts_of(report: str) -> dict[str, list[str]]:
    """From the text of a report: the parts of layers that run head-parallel, position-wise, gathered or left alone."""
    parts: dict[str, list[str]] = {}
    for line in report.splitlines():
        found = re.match(r" +(\S+): (head-parallel|gathered|position-wise|left alone)\b", line)
        if found is not None and found[1] not in parts.get(found[2], []):
            parts.setdefault(found[2], []).append(found[1])
    return parts
