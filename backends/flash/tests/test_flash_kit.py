"""Every feature of the kit, by flash-attn's own Python on the stand-in extension, and by stand-ins for 3 and 4."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import newer
import pytest
import torch
from sp_attention_flash import backend
from sp_attention_flash.packages import FLASH2, FLASH3, FLASH4, Package

from sp_attention import Backend, Mask, testing

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


@pytest.mark.usefixtures("on_the_cpu")
def test_gradients_of_sinks_are_right_in_every_kind_of_mask() -> None:
    """The kit has sinks with few masks; here with all of them, and in float32."""
    for feature, build in testing.FEATURES.items():
        request = build()
        mask = request.mask
        odd = (mask.explicit, mask.function, request.bias, request.softcap, request.sinks)
        if any(one is not None for one in odd) or request.dropout or request.query.shape[3] > 256:
            continue
        name, heads = f"sinks, {feature}", request.query.shape[2]

        def with_sinks(build: Callable[[], Any] = build, heads: int = heads) -> Any:
            asked = build()
            return replace(asked, sinks=torch.linspace(-2, 3, heads, dtype=torch.float64))

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(testing.FEATURES, name, with_sinks)
            assert testing.check(offered(FLASH2), name, dtype=torch.float32, tolerance=2e-6) is None


@pytest.mark.usefixtures("on_the_cpu")
def test_where_nothing_is_seen_at_all_the_output_is_zeros() -> None:
    padding = torch.zeros(2, testing.LENGTH, dtype=torch.bool)
    mask = Mask(2, testing.LENGTH, testing.LENGTH, torch.device("cpu"), padding=padding)
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
