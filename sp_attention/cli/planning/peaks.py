"""From what each part of a step takes to the peak of the whole step: which moment it is in, and what it is made of.

Integers only. The moments are those that the step goes through: each layer's forward, the loss, its backward, each
layer's backward, and the embedding's.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

WEIGHTS, GRADIENTS, OPTIMIZER, ENGINE = "weights", "gradients", "optimizer", "engine's buffers"
BATCH, INPUTS, ATTENTION = "batch and positions", "kept for backward", "attention in flight"
EXCHANGE, LAYER, LOGITS = "exchange buffers", "one layer's other tensors", "logits and loss"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, ENGINE, BATCH, INPUTS, ATTENTION, EXCHANGE, LAYER, LOGITS)
Bytes = Mapping[str, int]


@dataclass(frozen=True)
class Phases:
    """What is alive in a forward and its backward, in bytes by part, but for what was there before.

    forward, backward: at most, in these. kept: between them, with what was returned. returned: the bytes of that.
    gradients: of weights, in the end. sent, sent_back: to each rank of the group, in either.
    """

    forward: Bytes
    kept: Bytes
    backward: Bytes
    returned: int
    gradients: int
    sent: Mapping[int, int]
    sent_back: Mapping[int, int]


@dataclass(frozen=True)
class Parts:
    """What one rank's parts of a step take. layers: by kind; again: the same, checkpointed. end: last norm, head, loss.

    hidden: the hidden states that a layer is given. batch: tokens, labels, and what all layers are given alike, such as
    tables of positions. embedding: the gradient of its table.
    """

    layers: Mapping[int, Phases]
    again: Mapping[int, Phases]
    end: Phases
    hidden: int
    batch: int
    embedding: int


@dataclass(frozen=True)
class Held:
    """What is there all the time, or is kept by whoever trains.

    weights, optimizer, engine: bytes. gradients: of all weights from the start, None where they come with backward.
    """

    weights: int
    optimizer: int
    engine: int
    gradients: int | None


@dataclass(frozen=True)
class Moment:
    """When it is, and what is alive then, by part."""

    name: str
    parts: Bytes

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def peak(held: Held, kinds: tuple[int, ...], parts: Parts, *, checkpointing: bool, offload: bool) -> Moment:
    """The moment of a step in which most is alive, of layers of these kinds in order."""
    return max(_moments(held, kinds, parts, checkpointing, offload), key=lambda moment: moment.total)


def _moments(held: Held, kinds: tuple[int, ...], parts: Parts, checkpointing: bool, offload: bool) -> Iterator[Moment]:
    layers = [(parts.again if checkpointing else parts.layers)[kind] for kind in kinds]
    always = Counter({WEIGHTS: held.weights, OPTIMIZER: held.optimizer, ENGINE: held.engine, BATCH: parts.batch})
    always[GRADIENTS] = held.gradients or 0
    # Before each layer, what those before it keep; a layer's input is kept with those of which it is the output.
    kept = [Counter({INPUTS: parts.hidden})]
    for layer in layers:
        mine = layer.returned if checkpointing else sum(layer.kept.values())
        kept.append(kept[-1] + Counter({INPUTS: mine}))
    if offload and checkpointing:  # What is on its way to CPU memory, and what was last back from there.
        kept = [Counter({INPUTS: min(one[INPUTS], 2 * parts.hidden)}) for one in kept]
    for number, layer in enumerate(layers):
        yield Moment(f"forward of layer {number}", always + kept[number] + Counter(layer.forward))
    yield Moment("loss", always + kept[-1] + _as_logits(parts.end.forward))
    yield Moment("backward of the loss", always + kept[-1] + _as_logits(parts.end.backward))
    done = parts.end.gradients
    for number, layer in reversed([*enumerate(layers)]):
        gradients = Counter({GRADIENTS: done if held.gradients is None else 0})
        yield Moment(f"backward of layer {number}", always + kept[number] + gradients + Counter(layer.backward))
        done += layer.gradients
    gradients = Counter({GRADIENTS: done if held.gradients is None else 0})
    yield Moment("backward of the embedding", always + gradients + Counter({GRADIENTS: parts.embedding}))


def _as_logits(parts: Bytes) -> Counter[str]:
    """All that the end takes is of logits and the loss, but for gradients of weights."""
    gradients = parts.get(GRADIENTS, 0)
    return Counter({LOGITS: sum(parts.values()) - gradients, GRADIENTS: gradients})
