"""A fault: what becomes of which rank, and where."""

import json
import random
from dataclasses import asdict, dataclass

POINTS = ("forward", "exchange", "backward", "recomputation", "rehearsal", "agreement", "generate")
# What can be unlike on one rank, by the point; elsewhere a rank does what the others do, or nothing.
DIFFERENCES = {
    "forward": ("tokens", "length", "rows", "labels"),
    "rehearsal": ("option", "weights"),
    "agreement": ("training", "gradients"),
    "generate": ("tokens", "length"),
}
# A rank that stops is still there, and says nothing any more.
KINDS = ("raise", "die", "stop", "differ")
LAYERS, STEPS = 2, 2


@dataclass(frozen=True)
class Fault:
    """kind: of `KINDS`; what: of `DIFFERENCES`, or how it dies. step, layer, occasion: when, as far as a point has it.

    occasion: counts calls of what the point is in, from 0.
    """

    kind: str
    point: str
    rank: int = 1
    ranks: int = 2
    what: str = ""
    step: int = 0
    layer: int = 0
    occasion: int = 0

    @property
    def is_told(self) -> bool:
        """Whether other ranks can know which one it is: it tells them what it has, or that its rehearsal failed."""
        return self.kind == "differ" or (self.kind == "raise" and self.point == "rehearsal")

    def __str__(self) -> str:
        return json.dumps(asdict(self))


def fault_of(text: str) -> Fault:
    """The fault of a JSON object; raises ValueError for what is none."""
    try:
        fault = Fault(**json.loads(text))
    except TypeError as error:
        raise ValueError(f"{text} is no fault: {error}") from error
    if fault.kind not in KINDS or fault.point not in POINTS or not 0 <= fault.rank < fault.ranks:
        raise ValueError(f"{text}: kinds are {', '.join(KINDS)}, and points {', '.join(POINTS)}")
    return fault


def drawn(seed: int, number: int) -> Fault:
    """A random fault, the same for the same seed and number."""
    die = random.Random(f"{seed}, {number}")
    kind = die.choice(KINDS)
    point = die.choice([*DIFFERENCES] if kind == "differ" else POINTS)
    ranks = die.choice([2, 3])
    what = {"differ": DIFFERENCES.get(point, ("",)), "die": ("exit", "SIGKILL")}.get(kind, ("",))
    # As many as there are at least.
    occasions = {"exchange": 2 * LAYERS, "rehearsal": 4, "agreement": 3, "generate": 3}.get(point, 1)
    return Fault(
        kind,
        point,
        die.randrange(ranks),
        ranks,
        die.choice(what),
        die.randrange(STEPS),
        die.randrange(LAYERS),
        die.randrange(occasions),
    )
