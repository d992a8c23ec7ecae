"""What rounds of seconds say: the median of one over another's, with the quartiles."""

from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Ratio:
    """Times over the median of other times: the median of them, and the quartiles."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(times: list[float], base: list[float]) -> Ratio:
    """How long it took, over the median of what else was timed in the same rounds."""
    of = median(base)
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Ratio(median(times) / of, low / of, high / of)
