"""What mixer functions are given and return, as data: where tokens and heads are in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Cut:
    """Where tokens and heads are in a tensor.

    tokens: the dim of S, None of states and of weights. heads: the dim of the heads, None where all heads share the
    tensor. of: "query" if these are the heads that are shared out, "kv" if groups of them have one in common. The rows
    of the batch are dim 0, but of tensors whose heads are.
    """

    tokens: int | None
    heads: int | None
    of: Literal["query", "kv"] = "query"


@dataclass(frozen=True)
class Scan:
    """A recurrence over the sequence in which no head sees another: each rank runs it for its heads, over all tokens.

    name: as text for people. functions: the names by which models call it, all of which take the same arguments.
    arguments: by name, every name that one may have, those that are cut. result: how what it returns is cut; state:
    its second result, such as the last state, if it has one. device: the type of the devices it is for, "any" for all.
    """

    name: str
    functions: tuple[str, ...]
    arguments: Mapping[str, Cut]
    result: Cut
    state: Cut | None = None
    device: str = "any"


@dataclass(frozen=True)
class Convolution:
    """A causal convolution over the sequence, [B, C, S]: each rank does its span, with the columns before it.

    given, weight: the names that its input, and the weight [C, K], may have. whole: arguments about the whole sequence,
    such as where documents begin: with one of them it is run on all tokens.
    """

    name: str
    functions: tuple[str, ...]
    given: tuple[str, ...]
    weight: tuple[str, ...]
    whole: tuple[str, ...] = ()
    device: str = "any"


@dataclass(frozen=True)
class Fused:
    """Several steps of a mixer in one function, for which models have another way where it returns None, as here."""

    name: str
    functions: tuple[str, ...]
    device: str = "any"


Mixer: TypeAlias = Scan | Convolution | Fused
