"""What each engine keeps on a device besides activations, and what it sends, by parameter; integers only.

As the lines that a plan gives set them up, with AdamW, and by what each of them documents of itself; not measured.
"""

from dataclasses import dataclass

from sp_attention.cli.planning.peaks import Held


@dataclass(frozen=True)
class Engine:
    """Bytes for each parameter. computes: of the weights that layers compute with. reduced: as gradients travel.

    sharded: weights, gradients and states of the optimizer are cut over all devices. told: as text for people.
    """

    name: str
    weights: int
    gradients: int
    optimizer: int
    computes: int
    reduced: int
    sharded: bool
    told: str


ENGINES = {
    "ddp": Engine(
        "ddp", 2, 2, 4, 2, 2, False, "weights, gradients and AdamW's states in bfloat16, whole on each device"
    ),
    "fsdp2": Engine(
        "fsdp2", 4, 4, 8, 2, 4, True, "weights, gradients and AdamW's states in float32, cut over all devices"
    ),
    "zero3": Engine(
        "zero3", 2, 2, 12, 2, 2, True, "bfloat16 weights and gradients, float32 weights and AdamW's states, all cut"
    ),
}
# Parameters that DeepSpeed keeps gathered, gathers ahead, and reduces at a time, where its configuration says nothing.
_LIVE, _AHEAD, _BUCKET = 10**9, 5 * 10**7, 5 * 10**8


def held(engine: Engine, parameters: int, layers: tuple[int, ...], devices: int) -> Held:
    """What a device holds. layers: the parameters of each."""
    cut = devices if engine.sharded else 1
    buffers = 0
    if engine.name == "fsdp2":
        # A layer at work and the next one gathered, and all that is in no layer, which stays gathered until backward is
        # done; and the gradients of one of these on their way.
        outside, largest = parameters - sum(layers), max(layers)
        buffers = engine.computes * (2 * largest + outside) + engine.reduced * max(largest, outside)
    if engine.name == "zero3":
        buffers = engine.computes * (min(parameters, _LIVE) + min(parameters, _AHEAD) + min(parameters, _BUCKET))
    weights, gradients, optimizer = (
        -(-parameters * each // cut) for each in (engine.weights, engine.gradients, engine.optimizer)
    )
    return Held(weights, optimizer, buffers, gradients)


def sent(engine: Engine, parameters: int, devices: int) -> int:
    """The bytes that a device sends in a step: weights gathered twice and gradients reduced, or these alone."""
    each = 2 * engine.computes + engine.reduced if engine.sharded else 2 * engine.reduced
    return parameters * each * (devices - 1) // devices
