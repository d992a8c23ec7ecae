"""What the rehearsal found in a model: its stacks, and what each part of each layer is; as text for people too."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from sp_attention.errors import Refused
from sp_attention.region.locality import Sample
from sp_attention.region.plan import Embedding, GatheredModule, Layer, RegionPlan, Stack
from sp_attention.region.sequence_dims import Extent
from sp_attention.ulysses.grid import Grid
from sp_attention.ulysses.head_groups import head_groups
from sp_attention.ulysses.head_plan import HeadPlan

Plans = Mapping[tuple[int, int], HeadPlan | Grid]
# How much of a layer runs on whole tensors: only its mixers; what attends too; all of it.
MIXERS, ATTENTION, EVERYTHING = range(3)
# What a part of a layer is that gives for a token the same whatever else it is given.
POSITION_WISE = "position-wise"
# What attends through transformers' attention interface, to its own sequence.
HEAD_PARALLEL = "head-parallel"
# What it is that is given whole tensors for it.
MIXES = "gathered: mixes tokens"


@dataclass(frozen=True)
class LayerFindings:
    """A layer as it was found: what is known of it whatever of it is gathered, and what each of its parts is.

    kinds: by the name of a part, what it is. mixers: the parts that mix tokens, which are given whole tensors, unless
    they do it by functions that share their work; parts: those that learn and are position-wise as far as their results
    tell; attending: the children that attend, as parts to gather where sharing out their heads is not exact. tileable:
    position-wise parts outside of those that keep more for backward than what they are given, such as MLPs and norms.
    """

    layer: Layer
    kinds: Mapping[str, str]
    mixers: tuple[GatheredModule, ...]
    parts: tuple[GatheredModule, ...]
    attending: tuple[GatheredModule, ...]
    tileable: Mapping[str, nn.Module]
    gathers: int = MIXERS

    def with_mixers(self, parts: Iterable[GatheredModule]) -> "LayerFindings":
        """The layer with parts that count as mixers."""
        more = tuple(part for part in parts if part in self.parts)
        kind = "gathered: more comes of its tokens than what it returns, such as a loss"
        return replace(
            self,
            kinds={**self.kinds, **{part.name: kind for part in more}},
            mixers=self.mixers + more,
            parts=tuple(part for part in self.parts if part not in more),
            tileable={name: one for name, one in self.tileable.items() if all(one is not part.module for part in more)},
        )

    @property
    def sharing(self) -> tuple[GatheredModule, ...]:
        """The mixers that share their work."""
        return tuple(one for one in self.mixers if one.calls)

    def sharing_only(self, mixers: Iterable[GatheredModule]) -> "LayerFindings":
        """The layer with no other mixers sharing their work: all others are given whole tensors."""
        whole = {one.name for one in self.sharing} - {one.name for one in mixers}
        return replace(
            self,
            kinds={**self.kinds, **dict.fromkeys(whole, MIXES)},
            mixers=tuple(replace(one, calls=()) if one.name in whole else one for one in self.mixers),
        )

    def planned(self) -> Layer:
        if self.gathers == EVERYTHING:
            return replace(self.layer, gathered=True, gathered_modules=())
        attending = self.attending if self.gathers == ATTENTION else ()
        return replace(self.layer, gathered_modules=self.mixers + attending)


@dataclass(frozen=True)
class Findings:
    """What was found in a model.

    stacks: by name, the layers in the order of their calls. idle: the lists of position-wise modules, which can be
    shared out where nothing else can. separate: the stacks between whose layers the model works.
    extents: the narrow extent of each stack. left_alone: the lists of modules that are no stack, and why.
    models: those around the stacks, outermost first; arguments: the tensor arguments that each was given.
    embeddings: those of stacks, of which each rank can look up its own tokens only. samples: a layer of each kind that
    shares its work, proven with sequences of `proven_length`.
    """

    stacks: Mapping[str, tuple[LayerFindings, ...]]
    idle: Mapping[str, tuple[LayerFindings, ...]]
    separate: frozenset[str]
    extents: Mapping[str, Extent]
    left_alone: Mapping[str, str]
    models: tuple[PreTrainedModel, ...]
    arguments: Mapping[nn.Module, frozenset[str]]
    cross_attention: frozenset[nn.Module]
    embeddings: Mapping[str, Embedding]
    samples: tuple[Sample, ...] = ()
    proven_length: int = 0

    @property
    def shares_nothing(self) -> bool:
        """Every layer does all of its work on whole tensors and hands on whole ones."""
        return all(
            (name in self.separate or len(layers) == 1) and all(found.gathers == EVERYTHING for found in layers)
            for name, layers in self.stacks.items()
        )

    @property
    def attends_by_heads(self) -> bool:
        """Some attention is shared out by heads; mixers may be too."""
        layers = (found for stack in self.stacks.values() for found in stack if found.gathers == MIXERS)
        return any(kind == HEAD_PARALLEL for found in layers for kind in found.kinds.values())

    def planned(self) -> tuple[Stack, ...]:
        return tuple(
            Stack(name, tuple(found.planned() for found in layers), name in self.separate, self.embeddings.get(name))
            for name, layers in self.stacks.items()
        )


def report(findings: Findings) -> list[str]:
    """A line of text for each kind of layer, which names the parts that are not position-wise."""
    lines = [f"  {embedding.name}: looks up this rank's tokens" for embedding in findings.embeddings.values()]
    for name, layers in findings.stacks.items():
        where = "; each layer cuts and gathers on its own" if name in findings.separate else ""
        alike: dict[str, list[str]] = {}
        for found in layers:
            alike.setdefault(_described(found), []).append(found.layer.name.rsplit(".", 1)[-1])
        lines += [f"  {name}, {_numbered(which)}: {text}{where}" for text, which in alike.items()]
    alone = sorted(findings.left_alone.items())
    if findings.samples:
        lines.append(
            f"  layers do the same in sequences of up to {findings.proven_length} tokens; longer ones are tried"
        )
    return lines + [f"  {name}: left alone: {why}" for name, why in alone if name not in findings.stacks]


def parts(findings: Findings) -> dict[str, list[str]]:
    """The names of parts of layers by what they are: head-parallel, position-wise, gathered; of lists, left alone."""
    found: dict[str, list[str]] = {}
    for layers in findings.stacks.values():
        for layer in layers:
            for name, kind in {} if layer.gathers == EVERYTHING else _kinds(layer):
                names = found.setdefault(kind.split(":")[0].split(",")[0].split(" (")[0], [])
                names += [] if name in names else [name]
    alone = sorted(name for name in findings.left_alone if name not in findings.stacks)
    return found | ({"left alone": alone} if alone else {})


def described(plan: RegionPlan, plans: Plans, ranks: int) -> list[str]:
    """What becomes of heads, logits, caches, checkpoints and random numbers, as lines of text.

    plans: how attention of so many query and KV heads is shared.
    """
    loss, lm_head, caches = plan.sharded_loss, plan.lm_head, plan.caches
    whole = ", of hidden states that are whole before the head" if plan.cut_before else ""
    if isinstance(loss, Refused):
        lines = [f"  logits are whole: {loss.reason}{whole}"]
    else:
        stay = "are a ShardedLogits" if ranks == 1 else "stay sharded"
        lines = [f"  logits {stay} in training with labels, else whole{whole}"]
        if isinstance(lm_head, Refused):
            lines.append(f"  the loss is given all of them at once: {lm_head.reason}")
        else:
            by = ", by the kernel of Liger" if lm_head.liger else ""
            lines.append(f"  the loss makes those of {lm_head.tile} tokens at a time{by}")
    told = f"are refused: {caches.reason}" if isinstance(caches, Refused) else caches
    lines.append(f"  key/value caches {told}")
    if plan.offloads:
        lines.append("  inputs of checkpointed layers are in CPU memory until backward")
    if plan.chunk:
        instead = f"enable(mlp_tile={plan.chunk}) gives parts of layers so many at a time"
        lines.append(f"  feed-forwards take all of a rank's tokens, not {plan.chunk} at a time: {instead}")
    if plan.random:
        lines.append("  random numbers in training: shared outside of the layers, each rank's own inside")
    return [*_grids(plans, ranks), *_head_groups(plan, ranks), *lines]


def _counts(plan: RegionPlan) -> list[tuple[int, int]]:
    """The numbers of heads and KV heads of self-attention."""
    counts = {
        (heads, kv_heads)
        for stack in plan.stacks
        for layer in stack.layers
        for (over_memory, kv_heads), heads in layer.heads.items()
        if heads and not over_memory
    }
    return sorted(counts)


def _head_groups(plan: RegionPlan, ranks: int) -> list[str]:
    """How many heads attend at a time."""
    told = []
    for heads, kv_heads in _counts(plan) if plan.head_groups is not None else ():
        most = max(1, heads // ranks) if plan.head_groups == "auto" else plan.head_groups
        groups = len(head_groups(heads, kv_heads, most).query)
        how = "as many as have 64 MiB on a rank, up to" if plan.head_groups == "auto" else "in"
        told.append(f"  attention of {heads} heads {how} {groups} groups, one after the other")
    return told


def _grids(plans: Plans, ranks: int) -> list[str]:
    """How ranks share self-attention that has fewer heads than they are."""
    lines = []
    for (heads, _), shared in sorted(plans.items(), key=lambda pair: pair[0]):
        if isinstance(shared, Grid):
            blocks = f"{shared.groups} head groups x {shared.blocks} query blocks"
            lines.append(f"  {ranks} ranks = {blocks}, in attention of {heads} heads")
        elif ranks > heads:
            why = "the kernel does not do queries that are later in a sequence"
            lines.append(f"  attention of {heads} heads is shared by {heads} of {ranks} ranks: {why}")
    return lines


def _described(found: LayerFindings) -> str:
    if found.gathers == EVERYTHING:
        return "all of it: gathered: only as a whole does it give the same numbers"
    alike: dict[str, list[str]] = {}
    for name, kind in _kinds(found):
        alike.setdefault(kind, []).append(name)
    position_wise = alike.pop(POSITION_WISE, None)
    texts = [f"{', '.join(names)}: {kind}" for kind, names in alike.items()]
    if position_wise:
        texts.append(f"{'all else' if alike else 'all of it'}: {POSITION_WISE}")
    return "; ".join(texts)


def _kinds(found: LayerFindings) -> list[tuple[str, str]]:
    """What each part of a layer is, by its name within the layer."""
    gathered = {part.name for part in found.attending} if found.gathers == ATTENTION else set()
    kinds = {
        name: kind
        for name, kind in found.kinds.items()
        if not any(name == part or name.startswith(f"{part}.") for part in gathered)
    }
    kinds |= dict.fromkeys(gathered, "gathered: attends, and only as a whole gives the same numbers")
    return [(name.removeprefix(found.layer.name + "."), kind) for name, kind in sorted(kinds.items())]


def _numbered(names: list[str]) -> str:
    """Layers by their numbers, neighbours as a range: "layers 0 to 30, 40"."""
    ranges: list[list[str]] = []
    for name in names:
        follows = ranges and name.isdecimal() and ranges[-1][-1].isdecimal() and int(name) == int(ranges[-1][-1]) + 1
        ranges[-1].append(name) if follows else ranges.append([name])
    texts = [one[0] if len(one) == 1 else f"{one[0]} to {one[-1]}" for one in ranges]
    return f"{'layer' if len(names) == 1 else 'layers'} {', '.join(texts)}"
