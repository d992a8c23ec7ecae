"""Every feature of the kit, by flash-attn's own Python on the stand-in extension, and by stand-ins for 3 and 4."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import newer
import pytest
import torch
from sp_attention_flash import backend
from sp_attention_flash.packages import FLASH2, FLASH3, FLASH4, Package

from sp_attention import Backend, Mask, Request, testing
from sp_attention.kernels import varlen

REFUSED = (
    "any mask function (prefix-LM)",
    "mask tensor",
    "mask tensor by head",
    "mask tensor of keys",
    "additive bias",
    "additive bias by head",
    "head size 512",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Functions = tuple[Callable[..., Any], Callable[..., Any]]
NEWER: dict[Package, Functions] = {
    FLASH3: (newer.flash3_func, newer.flash3_varlen_func),
    FLASH4: (newer.flash4_func, newer.flash4_varlen_func),
}


def offered(package: Package) -> Backend:
    return backend(package.kernel, package, 0, None)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash2_is_right_or_refuses(dtype: torch.dtype) -> None:
    testing.conform(offered(FLASH2), REFUSED, dtype=dtype)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("package", NEWER, ids=lambda package: package.kernel)
def test_newer_packages_are_right_or_refuse(
    package: Package, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Package, "functions", lambda package: NEWER[package])
    testing.conform(offered(package), (*REFUSED, "dropout"), dtype=dtype)


def conditions(feature: str) -> dict[str, Any]:
    mask = testing.FEATURES[feature]().mask
    return {"documents": mask.documents, "padding": mask.padding}


LENGTH = testing.LENGTH
# Masks that the kit has not, each of which is cut in a way of its own.
MASKS = {
    "right padding, sliding window": {**conditions("right padding"), "window": 7},
    "right padding, window of two": {**conditions("right padding"), "window": 2},
    "padding between real tokens, sliding window": {**conditions("padding between real tokens"), "window": 7},
    "padding between real tokens, window on both sides": {
        **conditions("padding between real tokens"),
        "window": 7,
        "causal": False,
    },
    "packed documents, window on both sides": {**conditions("packed documents"), "window": 7, "causal": False},
    "later queries": {"query_length": 11, "offset": 17},
    "later queries, sliding window": {"query_length": 11, "offset": 17, "window": 7},
    "later queries, window on both sides": {"query_length": 11, "offset": 17, "window": 7, "causal": False},
    "last queries, window on both sides": {"query_length": 11, "offset": 26, "window": 7, "causal": False},
    "fewer keys than queries": {"key_length": 20},
}


def built(query_length: int = LENGTH, key_length: int = LENGTH, **features: Any) -> Request:
    sinks = features.pop("sinks")
    mask = Mask(2, query_length, key_length, torch.device("cpu"), **features)
    return testing.request(mask, testing.Shape(query_length, key_length, heads=6), sinks=sinks)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("sinks", [None, torch.linspace(-2, 3, 6, dtype=torch.float64)], ids=["plain", "sinks"])
@pytest.mark.parametrize("name", MASKS)
def test_every_way_of_cutting_a_mask_is_right(
    name: str, sinks: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(testing.FEATURES, name, lambda: built(**MASKS[name], sinks=sinks))
    assert testing.check(offered(FLASH2), name, dtype=torch.float32, tolerance=2e-6) is None


@pytest.mark.usefixtures("on_the_cpu")
def test_where_nothing_is_seen_at_all_the_output_is_zeros() -> None:
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask = Mask(2, LENGTH, LENGTH, torch.device("cpu"), padding=padding)
    request = testing.request(mask)
    request = replace(request, **{name: getattr(request, name).float() for name in ("query", "key", "value")})
    out = offered(FLASH2).attend(request)
    assert out.shape == request.query.shape
    assert not out.any()


@pytest.mark.usefixtures("on_the_cpu")
def test_deterministic_algorithms_are_asked_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(*args: Any, deterministic: bool, **options: Any) -> Any:
        asked.append(deterministic)
        return newer.flash3_func(*args, deterministic=deterministic, **options)

    monkeypatch.setattr(Package, "functions", lambda package: (note, note))
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            testing.check(offered(FLASH3), "causal", dtype=torch.float32)
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


@pytest.mark.usefixtures("on_the_cpu")
def test_a_mask_is_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []

    def counted(mask: Mask) -> varlen.Calls:
        masks.append(mask)
        return right(mask)

    right = varlen.calls
    monkeypatch.setattr(varlen, "calls", counted)
    request = testing.moved(testing.FEATURES["packed documents, padding"](), torch.device("cpu"), torch.bfloat16)
    for _ in range(3):
        offered(FLASH2).attend(request)
    assert masks == [request.mask]
