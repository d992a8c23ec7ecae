"""Which ranks share a sequence, and which savers are needed, so that a step fits: the cheapest that does."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from sp_attention.cli.planning.engines import Engine, held, sent
from sp_attention.cli.planning.peaks import Moment, Parts, peak
from sp_attention.ulysses.grid import grid_of

# Tokens at a time, where MLPs are given tiles.
MLP_TILE = 2048
# A share of memory is left to what is not counted: the driver, the collectives' library, and gaps between tensors.
LEFT = 0.08
LONGEST = 2**30


@dataclass(frozen=True)
class Savers:
    """What saves memory, each at the cost of time."""

    checkpointing: bool = False
    mlp_tile: int | None = None
    offload: bool = False

    def __str__(self) -> str:
        named = {"checkpointing": self.checkpointing, "mlp_tile": self.mlp_tile, "offload": self.offload}
        return ", ".join(name for name, is_on in named.items() if is_on) or "none"


# From what costs nothing to what costs most.
LADDER = (
    Savers(),
    Savers(True),
    Savers(True, MLP_TILE),
    Savers(True, None, offload=True),
    Savers(True, MLP_TILE, offload=True),
)


@dataclass(frozen=True)
class Wanted:
    """What is to be trained on what. memory: bytes of a device."""

    length: int
    batch: int
    devices: int
    per_machine: int
    memory: int
    engine: Engine

    @property
    def usable(self) -> int:
        return int(self.memory * (1 - LEFT))


# What each part of a step takes, of so many tokens, on so many ranks, with this tile.
PartsOf = Callable[[int, int, int | None], Parts]


@dataclass(frozen=True, eq=False)
class Model:
    """Integers about a model. layers: the kind of each. of_layers: the parameters of each. heads: query and key heads.

    heads is None where nothing attends. tiles: whether there are MLPs that `mlp_tile` can be for.
    """

    name: str
    stack: str
    parameters: int
    layers: tuple[int, ...]
    of_layers: tuple[int, ...]
    heads: tuple[int, int] | None
    loss_tile: int
    tiles: bool = True


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends in a step to devices of its own machine and of others."""

    within: int
    across: int


@dataclass(frozen=True, eq=False)
class Option:
    """So many ranks share a sequence, with these savers."""

    wanted: Wanted
    model: Model
    parts_of: PartsOf
    sp_size: int
    savers: Savers

    def peak(self, length: int) -> Moment:
        """Of a device, in a step with sequences of so many tokens."""
        wanted, savers = self.wanted, self.savers
        engine = held(wanted.engine, self.model.parameters, self.model.of_layers, wanted.devices)
        parts = self.parts_of(length, self.sp_size, savers.mlp_tile)
        return peak(engine, self.model.layers, parts, checkpointing=savers.checkpointing, offload=savers.offload)

    @cached_property
    def moment(self) -> Moment:
        return self.peak(self.wanted.length)

    @property
    def fits(self) -> bool:
        return self.moment.total <= self.wanted.usable

    @property
    def grid(self) -> tuple[int, int]:
        """Head groups × query blocks."""
        found = None if self.model.heads is None else grid_of(*self.model.heads, self.sp_size)
        return (self.sp_size, 1) if found is None else (found.groups, found.blocks)

    @property
    def crosses(self) -> bool:
        """Whether the ranks that share a sequence are of several machines."""
        return self.wanted.per_machine % self.sp_size != 0

    @property
    def longest(self) -> int:
        """The longest sequence of a multiple of 1,024 tokens that fits, 0 if none does."""
        lengths = range(1024, LONGEST, 1024)
        at = bisect_left(lengths, True, key=lambda length: self.peak(length).total > self.wanted.usable)
        return lengths[at - 1] if at else 0

    def exchange(self) -> Traffic:
        """What attention and mixers send, in all layers."""
        parts = self.parts_of(self.wanted.length, self.sp_size, self.savers.mlp_tile)
        to_each: Counter[int] = Counter()
        for kind in self.model.layers:
            layer = (parts.again if self.savers.checkpointing else parts.layers)[kind]
            to_each.update(layer.sent)
            to_each.update(layer.sent_back)
        me = 1 if self.sp_size > 2 else 0
        machine = me // self.wanted.per_machine
        within = sum(size for rank, size in to_each.items() if rank // self.wanted.per_machine == machine)
        return Traffic(within, sum(to_each.values()) - within)

    def of_engine(self) -> Traffic:
        """What the engine sends, as evenly to all devices as there are."""
        devices = self.wanted.devices
        total = sent(self.wanted.engine, self.model.parameters, devices)
        others = max(0, devices - self.wanted.per_machine)
        across = total * others // max(1, devices - 1)
        return Traffic(total - across, across)


def options(wanted: Wanted, model: Model, parts_of: PartsOf) -> Mapping[int, Option]:
    """For each number of ranks that may share a sequence the option with the fewest savers that fits, or with all."""
    found = {}
    steps = [one for one in LADDER if one.mlp_tile is None or model.tiles]
    for size in range(1, wanted.devices + 1):
        if wanted.devices % size == 0:
            ladder = [Option(wanted, model, parts_of, size, savers) for savers in (steps if size > 1 else steps[:2])]
            found[size] = next((one for one in ladder if one.fits), None) or min(
                ladder, key=lambda one: one.moment.total
            )
    return found


def best(found: Mapping[int, Option]) -> Option:
    """The one that fits with fewest savers, within a machine if one does, on fewest ranks; else the smallest."""
    fitting = [one for one in found.values() if one.fits]
    if not fitting:
        return min(found.values(), key=lambda one: one.moment.total)
    return min(fitting, key=lambda one: (one.crosses, LADDER.index(one.savers), one.sp_size))
