"""The kit tells when our adapter is wrong: one fault each, and a feature that must show it."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sp_attention_flash import attending, backend
from sp_attention_flash.packages import FLASH2, Package
from torch import Tensor

from sp_attention import Mask, Request, testing
from sp_attention.kernels import varlen

Given = dict[str, Any]
Patch = Callable[[pytest.MonkeyPatch], None]


def passing(change: Callable[[Given], Given]) -> Patch:
    """The package's functions are given something else than they should be."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = Package.functions

        def wrong(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
                given = {"q": q, "k": k, "v": v, **options}
                return function(**given | change(given))

            return called

        monkeypatch.setattr(Package, "functions", lambda package: tuple(map(wrong, right(package))))

    return patch


def asked(change: Callable[[Request], Request]) -> Patch:
    """The adapter does another request than it is given."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = attending.attend
        monkeypatch.setattr("sp_attention_flash.attend", lambda package, request: right(package, change(request)))

    return patch


def masked(change: Callable[[Mask], Mask]) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = varlen.calls
        monkeypatch.setattr(varlen, "calls", lambda mask: right(change(mask)))

    return patch


def window_plus(before: int, after: int) -> Patch:
    def change(given: Given) -> Given:
        left, right = given["window_size"]
        return {"window_size": (left + before if left >= 0 else left, right + after if right > 0 else right)}

    return passing(change)


def without_leading_zero(given: Given) -> Given:
    return {name: given[name][1:] for name in ("cu_seqlens_q", "cu_seqlens_k") if name in given}


def shifted_edges(given: Given) -> Given:
    """The inner edges of keys one token late."""
    if "cu_seqlens_k" not in given:
        return {}
    edges = given["cu_seqlens_k"].clone()
    edges[1:-1] += 1
    return {"cu_seqlens_k": edges}


def other_groups(given: Given) -> Given:
    """Query head i on KV head i % hkv instead of i // (h // hkv)."""
    repeats = given["q"].shape[-2] // given["k"].shape[-2]
    return {name: torch.cat([given[name]] * repeats, -2) for name in "kv"}


def without_gradient_of_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending._LogSumExp, "apply", lambda lse, *others: lse)


def base_two(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attending.call

    def called(*args: Any, **options: Any) -> Any:
        out, lse = right(*args, **options)
        return out, None if lse is None else lse * 1.4426950408889634

    monkeypatch.setattr(attending, "call", called)


def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of queries that are left out are not made room for: they come in the order of the calls."""
    right = varlen.calls

    def calls(mask: Mask) -> varlen.Calls:
        found = right(mask)
        places = None if found.places is None else torch.arange(len(found.places)).clamp_max(int(found.places.max()))
        return replace(found, places=places)

    monkeypatch.setattr(varlen, "calls", calls)


MUTATIONS: dict[str, tuple[Patch, str]] = {
    "causal flag flipped": (passing(lambda given: {"causal": not given["causal"]}), "causal"),
    "causal flag flipped, documents": (passing(lambda given: {"causal": not given["causal"]}), "packed documents"),
    "window one wider": (window_plus(1, 0), "sliding window"),
    "window one narrower": (window_plus(-1, 0), "packed documents, sliding window"),
    "window one wider on the other side": (window_plus(0, 1), "sliding window on both sides"),
    "window dropped": (passing(lambda given: {"window_size": (-1, -1)}), "padding, sliding window"),
    "scale missing": (passing(lambda given: {"softmax_scale": None}), "scale"),
    "scale of the padded size": (
        passing(lambda given: {"softmax_scale": given["q"].shape[-1] ** -0.5}),
        "values larger than keys",
    ),
    "KV heads in another order": (passing(other_groups), "grouped KV heads"),
    "keys and values swapped": (passing(lambda given: {"k": given["v"], "v": given["k"]}), "causal"),
    "lengths without leading zero": (passing(without_leading_zero), "packed documents"),
    "documents one token late": (passing(shifted_edges), "packed documents, bidirectional"),
    "lengths in int64": (
        passing(lambda given: {name: given[name].long() for name in given if name.startswith("cu_seqlens")}),
        "chunks",
    ),
    "longest sequence too short": (
        passing(lambda given: {name: given[name] - 1 for name in given if name.startswith("max_seqlen")}),
        "cross-attention",
    ),
    "softcap dropped": (passing(lambda given: {"softcap": 0.0}), "softcap"),
    "dropout dropped": (passing(lambda given: {"dropout_p": 0.0}), "dropout"),
    "probability to keep for dropout": (
        passing(lambda given: {"dropout_p": 1 - given["dropout_p"]} if "dropout_p" in given else {}),
        "dropout",
    ),
    "sinks dropped": (asked(lambda request: replace(request, sinks=None)), "attention sinks"),
    "sinks without gradient through lse": (without_gradient_of_lse, "attention sinks, sliding window"),
    "lse in base two": (base_two, "attention sinks, packed documents"),
    "padding ignored": (masked(lambda mask: replace(mask, padding=None)), "left padding"),
    "holes in the padding ignored": (
        masked(lambda mask: replace(mask, padding=None)),
        "padding between real tokens",
    ),
    "documents ignored": (masked(lambda mask: replace(mask, documents=None)), "packed documents, padding"),
    "offset ignored": (masked(lambda mask: replace(mask, offset=0)), "later queries of a sequence"),
    "outputs not put back": (in_place, "right padding"),
}

# What shows in anything but a wrong output.
TOLD = {
    "lengths without leading zero": "the kernel would read from before the first token",
    "lengths in int64": "cu_seqlens must have dtype int32",
    "longest sequence too short": "a sequence is longer than was said",
    "dropout dropped": "their variance by 100%",
    "probability to keep for dropout": "their variance by",
    "sinks without gradient through lse": "gradient of query is off by",
}


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_kit_tells(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, feature = MUTATIONS[mutation]
    monkeypatch.setattr(testing, "FEATURES", {feature: testing.FEATURES[feature]})
    testing.conform(backend("flash2", FLASH2, 0, None), dtype=torch.float32)
    patch(monkeypatch)
    told = re.escape(feature) + r"\s+.*" + TOLD.get(mutation, "output is off by")
    with pytest.raises(AssertionError, match=told):
        testing.conform(backend("flash2", FLASH2, 0, None), dtype=torch.float32)
