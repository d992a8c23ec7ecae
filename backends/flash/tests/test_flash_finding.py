"""A package that cannot be used is offered with the reason and the cure, and looking for it imports nothing of it."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import sp_attention_flash
import torch
from sp_attention_flash import finding
from sp_attention_flash.packages import FLASH2, FLASH3, FLASH4, HUB2, PACKAGES, Package

from sp_attention import BackendError
from sp_attention.kernels import registry

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """What this machine has, as far as `finding` can tell."""

    def has(
        *packages: Package, cuda: str | None = "13.0", hip: str | None = None, device: tuple[int, int] | None = (9, 0)
    ) -> None:
        def version(distribution: str) -> str:
            if distribution not in {package.distribution for package in packages}:
                raise PackageNotFoundError(distribution)
            return next(package.oldest for package in packages if package.distribution == distribution)

        monkeypatch.setattr(finding, "version", version)
        monkeypatch.setattr(finding, "_overwritten", lambda distribution: False)
        monkeypatch.setattr(finding, "import_module", lambda name: None)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *which: device)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")

    return has


def test_what_is_there_can_be_used(machine: Machine) -> None:
    machine(*PACKAGES, device=(9, 0))
    assert finding.unusable(FLASH2) is finding.unusable(FLASH3) is None
    assert finding.unusable(FLASH4) == "flash-attn-4 has no right backward for Some GPU: use flash or sdpa"
    machine(*PACKAGES, device=(10, 0))
    assert finding.unusable(FLASH2) is finding.unusable(FLASH4) is None


def test_what_is_not_installed_is_told_with_its_cure(machine: Machine) -> None:
    machine()
    told = [finding.unusable(package) or "" for package in PACKAGES]
    assert told[0].startswith("flash-attn is not installed: pip install --no-build-isolation")
    assert told[1].startswith("flash_attn_3 is not installed: pip install --no-build-isolation . in the folder hopper")
    assert told[2] == "flash-attn-4 is not installed: pip install --pre 'flash-attn-4>=4.0.0b36' triton"


def test_what_is_too_old_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(*PACKAGES)
    monkeypatch.setattr(finding, "version", lambda distribution: "2.5.9")
    assert (finding.unusable(FLASH2) or "").startswith("flash-attn 2.5.9 is older than 2.8.3: pip install")


@pytest.mark.parametrize(
    ("lacking", "text"),
    [
        (
            {"cuda": None},
            rf"torch {torch.__version__} is built without CUDA: install a torch with it, then pip install",
        ),
        ({"cuda": None, "hip": "6.4"}, "flash-attn for ROCm has kernels of its own, which are not covered yet"),
        ({"device": None}, "torch finds no CUDA device: look at what nvidia-smi says"),
        ({"device": (7, 5)}, "flash-attn has no right backward for Some GPU: use flash or sdpa"),
    ],
    ids=["torch", "rocm", "device", "old-device"],
)
def test_what_the_machine_lacks_is_told(lacking: dict[str, object], text: str, machine: Machine) -> None:
    machine(*PACKAGES, **lacking)
    assert (finding.unusable(FLASH2) or "").startswith(text)


@pytest.mark.parametrize("package", [FLASH2, FLASH3], ids=lambda package: package.kernel)
def test_an_extension_that_does_not_load_is_told(
    package: Package, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undefined(name: str) -> None:
        raise ImportError(f"{name}.so: undefined symbol: _ZN3c104cuda\nmore")

    machine(package)
    monkeypatch.setattr(finding, "import_module", undefined)
    told = finding.unusable(package) or ""
    assert f"does not load ({package.extension}.so: undefined symbol: _ZN3c104cuda): it is built for another" in told
    assert told.endswith(package.cure)


def test_a_package_that_another_has_overwritten_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Path(__file__)
    file = SimpleNamespace(name="interface.py", size=there.stat().st_size, locate=lambda: there)
    overwritten = finding._overwritten
    monkeypatch.setattr(finding, "files", lambda distribution: [file])
    assert not overwritten("flash-attn-4")
    file.size += 1
    assert overwritten("flash-attn-4")
    machine(FLASH4)
    monkeypatch.setattr(finding, "_overwritten", overwritten)
    assert (finding.unusable(FLASH4) or "").startswith("flash-attn-4 is overwritten by an older package: pip install")


@pytest.mark.parametrize(
    ("device", "packages", "expected"),
    [
        ((8, 0), [FLASH2], FLASH2),
        ((9, 0), [FLASH2], FLASH2),
        ((9, 0), [FLASH2, FLASH3, FLASH4], FLASH3),
        ((9, 0), [FLASH2, FLASH4], FLASH2),
        ((10, 0), [FLASH2, FLASH4], FLASH4),
        ((10, 0), [FLASH2], FLASH2),
        ((10, 0), [], None),
    ],
)
def test_flash_is_the_package_that_was_made_for_the_device(
    device: tuple[int, int], packages: list[Package], expected: Package | None, machine: Machine
) -> None:
    machine(*packages, device=device)
    assert finding.best(packages) is expected


def test_flash_is_what_can_be_used(machine: Machine) -> None:
    machine(FLASH2, device=(8, 0))
    offered = {backend.kernel: backend for backend in sp_attention_flash.sp_attention_backends()}
    assert list(offered) == ["flash", "flash2", "flash3", "flash4", HUB2.kernel]
    assert offered["flash"].unavailable is offered["flash2"].unavailable is None
    assert offered["flash"].attend.args == (FLASH2,)  # type: ignore[attr-defined]  # a partial
    assert offered["flash3"].unavailable is not None
    machine()
    flash = sp_attention_flash.sp_attention_backends()[0]
    assert (flash.unavailable or "").startswith("no flash-attn package can be used; `sp-attention backends` says")


def test_here_it_is_listed_with_the_reason() -> None:
    """On a machine without CUDA, with the real flash-attn 2 and 4 installed."""
    without = f"torch {torch.__version__} is built without CUDA"
    assert (finding.unusable(FLASH2) or "").startswith(without)
    assert (finding.unusable(FLASH4) or "").startswith(without)
    assert registry.load().broken == ()
    with pytest.raises(BackendError, match=r"'flash' on cuda cannot be used: no flash-attn package can be used;"):
        registry.find("cuda", "flash")
    command = [sys.executable, "-m", "sp_attention", "backends"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for kernel in ("flash", "flash2", "flash3", "flash4"):
        assert f" {kernel} " in listed


def test_listing_kernels_imports_no_flash_attn() -> None:
    program = (
        "import json, sys; from sp_attention.kernels import registry; found = registry.load(); "
        "heavy = ('flash_attn', 'flash_attn_2_cuda', 'flash_attn_interface', 'cutlass'); "
        "print(json.dumps([[e.backend.kernel for e in found.backends if e.backend.device == 'cuda'], "
        "[name for name in heavy if name in sys.modules]]))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == [["flash", "flash2", "flash3", "flash4", HUB2.kernel], []]
