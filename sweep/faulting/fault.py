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

    occasion: the number of the call of what the point is in; of agreements 0 is that of a forward, others of `enable`.
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
        """Whether other ranks can know which one it is: it tells them what it has, or that its rehearsal failed.

        Of weights only what is computed from them is told, and that by all.
        """
        differs = self.kind == "differ" and self.what != "weights"
        return differs or (self.kind == "raise" and self.point == "rehearsal")

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
    # As many as there are at least; the agreement of a forward is as likely as all others.
    occasions = {"exchange": 4 * LAYERS, "rehearsal": 20, "agreement": 5, "generate": 5}.get(point, 0)
    return Fault(
        kind,
        point,
        die.randrange(ranks),
        ranks,
        die.choice(what),
        die.randrange(STEPS),
        die.randrange(LAYERS),
        0 if point == "agreement" and die.random() < 0.5 else die.randint(min(1, occasions), occasions),
    )
