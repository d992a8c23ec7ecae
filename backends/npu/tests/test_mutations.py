"""The checks can fail: the adapter with one mistake at a time, each of which a check of the kit, or one here, sees."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import standin  # noqa: F401  # registers the stand-ins
import torch
from sp_attention_npu import kernel, sp_attention_backends
from sp_attention_npu.kernel import Dense
from torch import Tensor

from sp_attention import testing
from sp_attention.kernels import varlen
from sp_attention.kernels.request import Mask, Request
from sp_attention.kernels.varlen import Calls, Pattern

NPU = torch.device("npu:0")
(BACKEND,) = sp_attention_backends()


def later_queries() -> Request:
    """Queries that are neither the first nor the last tokens of their keys' sequence."""
    mask = Mask(testing.BATCH, 11, testing.LENGTH, torch.device("cpu"), offset=17)
    return testing.request(mask, testing.Shape(query_length=11))


def padded_window() -> Request:
    """Padding on the right, of which the first queries still see a real key through the window."""
    real = torch.arange(testing.LENGTH)[None] < torch.tensor([[30], [37]])
    mask = Mask(testing.BATCH, testing.LENGTH, testing.LENGTH, torch.device("cpu"), window=7, padding=real)
    return testing.request(mask)


def blind_rows() -> Request:
    """A mask in which the first queries see nothing, and that is no run of padding."""
    mask = Mask(
        testing.BATCH, testing.LENGTH, testing.LENGTH, torch.device("cpu"), function=lambda b, h, q, k: k % 3 == 2
    )
    return testing.request(mask)


MORE = {"later queries, causal": later_queries, "padding on the right, window": padded_window, "blind rows": blind_rows}


@dataclass(frozen=True)
class Mistake:
    """What is put in place of a name of a module, made from what stands there; and features in which it shows."""

    module: Any
    name: str
    wrong: Callable[[Any], Any]
    features: tuple[str, ...]


def asking(change: Callable[[Request], Request]) -> Callable[[Any], Any]:
    """Calls of the operator for another request than the one that was given."""
    return lambda operate: lambda request, *args, **kwargs: operate(change(request), *args, **kwargs)


def telling(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    """Calls of the operator with other options."""
    return lambda operate: lambda *args, **options: operate(*args, **options | change(options))


def polarity(options: dict[str, Any]) -> dict[str, Any]:
    return {} if options.get("atten_mask") is None else {"atten_mask": ~options["atten_mask"]}


def other_groups(operate: Any) -> Any:
    """KV head i % hkv for query head i, instead of i // (h // hkv)."""

    def call(request: Request, query: Tensor, key: Tensor, value: Tensor, layout: str, **options: Any) -> Tensor:
        heads = query.shape[-2] // key.shape[-2]
        mixed = query.unflatten(-2, (heads, -1)).transpose(-2, -3).flatten(-3, -2)
        out = operate(request, mixed, key, value, layout, **options)
        return out.unflatten(-2, (-1, heads)).transpose(-2, -3).flatten(-3, -2)

    return call


def near(before: int, after: int) -> Callable[[Any], Any]:
    """Other limits in mode 4."""

    def change(options: dict[str, Any]) -> dict[str, Any]:
        if options.get("sparse_mode") != 4:
            return {}
        return {"pre_tockens": options["pre_tockens"] + before, "next_tockens": options["next_tockens"] + after}

    return telling(change)


def mode(right: int, wrong: int) -> Callable[[Any], Any]:
    """Another sparse mode, with the mask that it wants."""

    def change(options: dict[str, Any]) -> dict[str, Any]:
        given = options.get("sparse_mode", 0)
        triangle = torch.ones(kernel.TRIANGLE, kernel.TRIANGLE, dtype=torch.bool, device=NPU).triu(1)
        return {"sparse_mode": wrong, "atten_mask": triangle if wrong else None} if given == right else {}

    return telling(change)


def from_zero(options: dict[str, Any]) -> dict[str, Any]:
    return {name: [0, *options[name]] for name in ("actual_seq_qlen", "actual_seq_kvlen") if name in options}


def without(pattern: Pattern) -> Callable[[Any], Any]:
    """The sequences of one pattern left out, as if their queries saw nothing."""

    def wrong(right: Any) -> Any:
        def calls(mask: Mask, *limits: int) -> Calls:
            found = right(mask, *limits)
            kept = tuple(one for one in found.sequences if one.pattern != pattern)
            queries = sum(int(one.query_edges[-1]) for one in kept)
            return replace(found, sequences=kept, places=found.places.clamp_max(queries))

        return calls

    return wrong


WINDOWS = ("sliding window", "packed documents, sliding window", "attention sinks, sliding window")
SINKS = ("attention sinks", "attention sinks, packed documents")
MISTAKES = {
    "mask polarity inverted": Mistake(kernel, "_operate", telling(polarity), ("causal", "mask tensor", *WINDOWS)),
    "hidden and seen exchanged": Mistake(
        kernel, "dense", lambda right: lambda allowed: right(~allowed), ("padding between real tokens",)
    ),
    "window of one key more": Mistake(kernel, "_operate", near(1, 0), WINDOWS),
    "window of one key less": Mistake(kernel, "_operate", near(-1, 0), WINDOWS),
    "window sees the next key": Mistake(
        kernel, "_operate", near(0, 1), ("sliding window", "sliding window on both sides")
    ),
    "scale missing": Mistake(
        kernel, "_operate", asking(lambda request: replace(request, scale=1.0)), ("causal", "scale", "packed documents")
    ),
    "lengths with a leading zero": Mistake(
        kernel, "_operate", telling(from_zero), ("packed documents", "left padding")
    ),
    "sparse mode 2 instead of 3": Mistake(kernel, "_operate", mode(3, 2), ("later queries, causal",)),
    "causal dropped": Mistake(kernel, "_operate", mode(3, 0), ("causal", "packed documents", "left padding")),
    "causal where all is seen": Mistake(
        kernel, "_operate", mode(0, 3), ("bidirectional", "right padding", "cross-attention")
    ),
    "sink dropped": Mistake(kernel, "_operate", asking(lambda request: replace(request, sinks=None)), SINKS),
    "sink without gradient": Mistake(
        kernel, "_operate", asking(lambda r: replace(r, sinks=None if r.sinks is None else r.sinks.detach())), SINKS
    ),
    "order of grouped heads exchanged": Mistake(kernel, "_operate", other_groups, ("grouped KV heads",)),
    "kept and dropped exchanged": Mistake(
        kernel, "_operate", asking(lambda request: replace(request, dropout=1 - request.dropout)), ("dropout",)
    ),
    "wide values without room": Mistake(kernel, "F", lambda right: _NoPadding, ("values larger than keys",)),
    "blind queries not zeroed": Mistake(
        kernel,
        "Dense",
        lambda right: lambda hidden, blind: Dense(hidden, torch.zeros_like(blind)),
        ("blind rows",),
    ),
    "blind queries left to the operator": Mistake(
        kernel,
        "Dense",
        lambda right: lambda hidden, blind: right(hidden | blind.transpose(1, 2), blind),
        ("blind rows",),
    ),
    "queries after the last real key left out": Mistake(varlen, "calls", without(Pattern()), ("right padding",)),
    "outputs of two calls exchanged": Mistake(
        varlen,
        "calls",
        lambda right: (
            lambda mask, *limits: replace(found := right(mask, *limits), sequences=tuple(reversed(found.sequences)))
        ),
        ("right padding", "packed documents, window on both sides"),
    ),
    "masks of one batch row for all": Mistake(
        kernel,
        "_masked",
        lambda right: lambda call, r: right(replace(call, hidden=call.hidden[:1]), r),
        ("mask tensor",),
    ),
}
CASES = [(mistake, feature) for mistake, made in MISTAKES.items() for feature in made.features]


class _NoPadding:
    @staticmethod
    def pad(tensor: Tensor, room: Any) -> Tensor:
        return tensor


@pytest.fixture(autouse=True)
def more_features(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, build in MORE.items():
        monkeypatch.setitem(testing.FEATURES, name, build)


@pytest.mark.parametrize("feature", MORE)
def test_without_mistakes_it_is_right(feature: str) -> None:
    # What the kit asks besides is in test_conforms.
    assert testing.check(BACKEND, feature, device=NPU, dtype=torch.float32) is None


@pytest.mark.parametrize(("mistake", "feature"), CASES)
def test_a_mistake_is_seen(mistake: str, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MISTAKES[mistake]
    monkeypatch.setattr(made.module, made.name, made.wrong(getattr(made.module, made.name)))
    # Off, or not what the operator's documentation allows.
    with pytest.raises((AssertionError, ValueError)):
        testing.check(replace(BACKEND, attend=kernel.attend), feature, device=NPU, dtype=torch.float32)
