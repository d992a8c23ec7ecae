"""A case: a model, what it is given, how it is enabled, and what is called, in order."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from typing import Any

from sweep.fuzzing.models import KINDS, Kind

CHECKPOINTING = ("none", "non-reentrant", "reentrant")


@dataclass(frozen=True)
class Case:
    """The defaults are the simplest values there are: a fault is shrunk towards them.

    heads, kv_heads, layers, dtype, dropout: the model's. mask, labels: of `batches.py`. groups: the ranks are cut into
    so many groups, each with batches of its own. backend to longest: the options of `enable`. frozen: every second
    parameter is. calls: of `calls.py`. seed: of batches.
    """

    model: str = "llama"
    heads: int = 2
    kv_heads: int = 2
    layers: int = 1
    dtype: str = "float64"
    dropout: float = 0.0
    ranks: int = 2
    groups: int = 1
    rows: int = 1
    length: int = 7
    mask: str = "none"
    labels: str = "all"
    backend: str = "auto"
    loss_tile: int | str | None = "auto"
    mlp_tile: int | None = None
    whole_logits: bool = False
    longest: int | None = None
    checkpointing: str = "none"
    frozen: bool = False
    lora: bool = False
    training: bool = True
    calls: tuple[str, ...] = ("step",)
    seed: int = 0

    @property
    def kind(self) -> Kind:
        """What is known of its model."""
        return KINDS[self.model]

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers, which are not those of one process."""
        return bool(self.dropout) and self.training

    def __str__(self) -> str:
        """What is not simple of it, as JSON."""
        given = asdict(self)
        return json.dumps({one.name: given[one.name] for one in fields(self) if getattr(self, one.name) != one.default})


def case_of(text: str) -> Case:
    """The case of a JSON object; raises ValueError for what is none."""
    try:
        given = json.loads(text)
        case = Case(**given | {"calls": tuple(given.get("calls", Case.calls))})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{text} is no case: {error}") from error
    if case.model not in KINDS:
        raise ValueError(f"there is no model '{case.model}', but {', '.join(KINDS)}")
    return case


def case_in(record: dict[str, Any]) -> Case:
    """The case of a record, which may have been read from a file."""
    return Case(**record["case"] | {"calls": tuple(record["case"]["calls"])})


def drawn(seed: int, number: int) -> Case:
    """A random case, the same for the same seed and number."""
    die = random.Random(f"{seed}, {number}")
    name = die.choice([*KINDS])
    kind = KINDS[name]
    heads = die.randint(1, 6)
    ranks = die.choice([2, 2, 3, 4])
    dropout = die.random() < 0.12
    adapted = die.random() < 0.15
    whole_logits = die.random() < 0.2
    length = die.randint(*die.choice([(1, 8), (9, 40), (41, 300)]))
    return Case(
        model=name,
        heads=heads,
        kv_heads=die.choice([some for some in range(1, heads + 1) if heads % some == 0])
        if kind.groups_heads
        else heads,
        layers=die.randint(1, 3),
        dtype=die.choice(["float64", "float64", "float64", "float32"]),
        dropout=0.3 if dropout and kind.dropout else 0.0,
        ranks=ranks,
        groups=die.choice([1, 2]) if ranks == 4 else 1,
        rows=die.randint(1, 3),
        length=length,
        mask=die.choice(kind.masks),
        labels=die.choice(kind.labels),
        backend=die.choice(kind.backends),
        loss_tile=die.choice(
            ["auto", None] if whole_logits or kind.family != "causal" else ["auto", None, 5 if length < 60 else 37]
        ),
        mlp_tile=die.choice([None, None, 3 if length < 60 else 29]) if kind.tiles_mlp or die.random() < 0.1 else None,
        whole_logits=whole_logits,
        longest=die.choice([None, None, length]),
        checkpointing=die.choice(CHECKPOINTING),
        frozen=die.random() < 0.2,
        lora=adapted and find_spec("peft") is not None,
        training=die.random() < 0.8,
        calls=_calls(die, kind),
        seed=die.randrange(1000),
    )


def _calls(die: random.Random, kind: Kind) -> tuple[str, ...]:
    """One to five; the last one is compared, whatever was before."""
    some = [die.choice(kind.calls) for _ in range(die.randint(1, 5))]
    if "disable" in some[:-1] and die.random() < 0.7:
        some.insert(die.randint(some.index("disable") + 1, len(some) - 1), "enable")
    return tuple(some) if some[-1] not in ("disable", "enable") else (*some[:-1], "step")


def simpler(case: Case) -> list[Case]:
    """Cases of which one thing is simpler, those first that make most else unnecessary."""
    found = []
    if len(case.calls) > 1:
        found += [replace(case, calls=case.calls[:at] + case.calls[at + 1 :]) for at in range(len(case.calls))]
    elif case.calls != Case.calls:
        found.append(replace(case, calls=Case.calls))
    for one in fields(case):
        value = getattr(case, one.name)
        if one.name not in ("calls", "heads", "kv_heads", "length", "model") and value != one.default:
            found.append(replace(case, **{one.name: one.default}))
    for heads, kv_heads in ((2, 2), (2, 1), (3, 3), (case.heads, case.heads)):
        if (heads, kv_heads) == (case.heads, case.kv_heads):
            break
        if case.kind.groups_heads or heads == kv_heads:
            found.append(replace(case, heads=heads, kv_heads=kv_heads))
    found.append(replace(case, model=Case.model))
    lengths = {2, Case.length, case.length // 2, 3 * case.length // 4, case.length - 1}
    found += [replace(case, length=length) for length in sorted(lengths) if 0 < length < case.length]
    return [other for other in found if other != case and fits(other)]


def fits(case: Case) -> bool:
    """Whether its model can be given all of this."""
    kind = case.kind
    return (
        case.mask in kind.masks
        and case.labels in kind.labels
        and case.backend in kind.backends
        and {*case.calls} <= {*kind.calls, "enable"}
        and case.ranks % case.groups == 0
        and case.ranks > case.groups
        and case.heads % case.kv_heads == 0
        and not (case.whole_logits and isinstance(case.loss_tile, int))
    )


def shrunk(case: Case, is_faulty: Callable[[Case], bool], tries: int) -> Case:
    """The simplest case found, in so many tries, that `is_faulty` too; the case itself where nothing simpler is."""
    # What was in vain is tried again only when nothing else is left, and something has changed since.
    in_vain: set[frozenset[tuple[str, Any]]] = set()
    goes_on = True
    while goes_on:
        goes_on = False
        in_vain.clear()
        while some := [other for other in simpler(case) if _changes(case, other) not in in_vain]:
            if tries <= 0:
                return case
            tries -= 1
            if is_faulty(some[0]):
                case, goes_on = some[0], True
            else:
                in_vain.add(_changes(case, some[0]))
    return case


def _changes(case: Case, other: Case) -> frozenset[tuple[str, Any]]:
    return frozenset(asdict(other).items() - asdict(case).items())
