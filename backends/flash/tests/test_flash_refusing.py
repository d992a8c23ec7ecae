"""What the packages do not do is refused with a reason, before they are called."""

from dataclasses import replace
from typing import Any

import cpu
import pytest
import torch
from sp_attention_flash import refusing
from sp_attention_flash.packages import FLASH2, FLASH3, FLASH4, PACKAGES, Package

from sp_attention import BackendError, Mask, Request, enable, testing
from sp_attention.launch import run_ranks

LENGTH = testing.LENGTH


def asked(
    dtype: torch.dtype = torch.bfloat16, size: int = 64, heads: int = 4, kv_heads: int = 4, **features: Any
) -> Request:
    def tensor(n: int, value_size: int = size) -> torch.Tensor:
        return torch.empty(2, LENGTH, n, value_size, dtype=dtype)

    mask = features.pop("mask", Mask(2, LENGTH, LENGTH, torch.device("cpu")))
    value = tensor(kv_heads, features.pop("value_size", size))
    return Request(tensor(heads), tensor(kv_heads), value, mask, 0.1, **features)


def masked(**conditions: Any) -> Mask:
    return Mask(2, LENGTH, LENGTH, torch.device("cpu"), causal=False, **conditions)


SINKS = torch.zeros(4)
CASES: dict[str, tuple[Package, Request, int | None, str]] = {
    "float32": (FLASH2, asked(torch.float32), 9, "flash2 computes in float16 and bfloat16, and this is float32"),
    "float64": (FLASH4, asked(torch.float64), 10, "flash4 computes in float16 and bfloat16, and this is float64"),
    "mask tensor": (
        FLASH2,
        asked(mask=masked(explicit=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))),
        9,
        "flash2 takes no mask tensors; sdpa and transformers:eager do",
    ),
    "mask function": (FLASH3, asked(mask=masked(function=testing._prefix)), 9, "flash3 takes no mask functions; sdpa"),
    "bias": (FLASH4, asked(bias=torch.zeros(1, 4, LENGTH, LENGTH)), 10, "flash4 adds no bias to the scores; sdpa"),
    "dropout on 3": (FLASH3, asked(dropout=0.1), 9, "flash3 has no dropout; flash2, sdpa and transformers:eager have"),
    "dropout on 4": (FLASH4, asked(dropout=0.1), 10, "flash4 has no dropout; flash2, sdpa"),
    "dropout and softcap": (FLASH2, asked(dropout=0.1, softcap=2.0), 9, "flash2 has a softcap, or dropout, but not"),
    "dropout and sinks": (FLASH2, asked(dropout=0.1, sinks=SINKS), 9, "flash2 has attention sinks, or dropout, but"),
    "softcap and sinks": (FLASH4, asked(softcap=2.0, sinks=SINKS), 10, "flash4 has a softcap, or attention sinks, but"),
    "heads": (FLASH2, asked(heads=4, kv_heads=3), 9, "flash2 wants each KV head to serve as many query heads, not 4"),
    "head size": (FLASH2, asked(size=512), 9, "flash2 has head sizes up to 256, and this is 512; sdpa does any"),
    "value size": (FLASH3, asked(value_size=257), 9, "flash3 has head sizes up to 256, and this is 257; sdpa does any"),
    "old device": (FLASH2, asked(), 7, "flash2 has no right backward on devices of compute capability 7.x; sdpa"),
    "3 on Blackwell": (FLASH3, asked(), 10, "flash3 has no right backward on devices of compute capability 10.x; sdpa"),
    "4 on Ampere": (FLASH4, asked(), 8, "flash4 has no right backward on devices of compute capability 8.x; sdpa"),
    "4 on Hopper": (FLASH4, asked(), 9, "flash4 has no right backward on devices of compute capability 9.x; sdpa"),
    "4, 192 on Blackwell": (FLASH4, asked(size=192), 10, "flash4 on devices of compute capability 10.x has no head si"),
    "4, 256 and a softcap": (
        FLASH4,
        asked(size=256, softcap=2.0),
        10,
        "flash4 on devices of compute capability 10.x has neither a softcap nor attention sinks for a head size of 256",
    ),
    "4, sinks on 12.x": (
        FLASH4,
        asked(sinks=SINKS),
        12,
        "flash4 on devices of compute capability 12.x has no gradient",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals_say_what_and_name_what_can(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, request, arch, text = CASES[case]
    monkeypatch.setattr(refusing, "DEVICE", "cpu")
    monkeypatch.setattr(refusing, "_arch", lambda device: arch)
    told = refusing.refuses(package, request)
    assert told is not None
    assert told.startswith(text)


@pytest.mark.parametrize(
    ("package", "request_", "arch"),
    [
        (FLASH2, asked(size=256), 8),
        (FLASH2, asked(torch.float16, heads=8, kv_heads=2, dropout=0.1), 12),
        (FLASH3, asked(size=256, softcap=2.0), 9),
        (FLASH4, asked(size=256), 10),
        (FLASH4, asked(size=128, sinks=SINKS), 10),
        (FLASH4, asked(size=128, softcap=2.0), 12),
    ],
)
def test_what_they_can_is_not_refused(
    package: Package, request_: Request, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusing, "DEVICE", "cpu")
    monkeypatch.setattr(refusing, "_arch", lambda device: arch)
    assert refusing.refuses(package, request_) is None


def test_deterministic_backward_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusing, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(refusing, "_arch", lambda device: 9)
    assert refusing.refuses(FLASH2, asked(size=256)) is None
    assert refusing.refuses(FLASH3, asked(size=192)) is None
    told = refusing.refuses(FLASH3, asked(size=256))
    assert told == "flash3 has no deterministic backward for a head size of 256; flash2 has"
    monkeypatch.setattr(refusing, "_arch", lambda device: 12)
    told = refusing.refuses(FLASH4, asked())
    assert told == "flash4 on devices of compute capability 12.x has no deterministic backward; flash2 has"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.kernel)
def test_other_devices_are_refused(package: Package) -> None:
    told = refusing.refuses(package, asked())
    assert told == f"{package.kernel} computes on cuda, and this is on cpu; sdpa computes on both"


def test_mixed_dtypes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusing, "DEVICE", "cpu")
    request = asked()
    told = refusing.refuses(FLASH2, replace(request, value=request.value.half()))
    assert told == "flash2 wants one dtype, not torch.bfloat16, torch.bfloat16 and torch.float16"


def asking_for_more() -> tuple[dict[str, str], dict[str, str]]:
    """What `enable`, or the first forward, says of a model that asks for more; and what "auto" takes."""
    from test_flash_models import batch_of, build

    cpu.import_flash2()
    cpu.offer_flash2_on_the_cpu()
    told, taken = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build("llama", dtype)
        mask = torch.ones(2, 1, 33, 33, dtype=torch.bool).tril()
        try:
            enable(model, backend="flash")
            model(**batch_of("plain"), attention_mask=mask)
        except BackendError as error:
            told[str(dtype)] = str(error)
        taken[str(dtype)] = enable(build("llama", dtype), backend="auto").report()
    return told, taken


def test_a_model_that_asks_for_more_is_refused_on_every_rank_with_what_can() -> None:
    for told, taken in run_ranks(2, asking_for_more, timeout=300):
        assert "flash2 computes in float16 and bfloat16, and this is float32; sdpa does any" in told["torch.float32"]
        assert "flash2 takes no mask tensors; sdpa and transformers:eager do" in told["torch.bfloat16"]
        for text in told.values():
            assert 'Use enable(model, backend="sdpa"). Installed kernels that can: sdpa, transformers:' in text
        assert "kernel 'flash'" in taken["torch.bfloat16"].splitlines()[0]
        assert "kernel 'sdpa'" in taken["torch.float32"].splitlines()[0]
        assert "kernel 'flash' was passed over: " in taken["torch.float32"]
