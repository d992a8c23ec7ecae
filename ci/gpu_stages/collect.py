"""Prepares what a machine without a network needs: wheels, and what was compiled before.

ci/gpu --collect build/gpu/wheels                                  # here, where packages can be fetched
pip install --no-index --no-deps --target build/gpu/site build/gpu/wheels/*.whl      # there
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_stages.machine import ROOT
from gpu_stages.results import told
from sp_attention.cli.tables import markdown_row

TEXT = "fetch and build wheels for a machine that has no network, and pack what stages have compiled before"
FOLDER = ROOT / "build" / "gpu" / "wheels"
CACHE, PACKED = ROOT / "build" / "gpu" / "cache", "compiled.tar.gz"
# Of Python on the machine with the device.
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
# What building packages of kernels wants to hear where there is no device, and where one is.
BUILDING = {"DS_BUILD_OPS": "0", "FLASH_ATTENTION_FORCE_BUILD": "TRUE", "MAX_JOBS": str(os.cpu_count())}


@dataclass(frozen=True)
class Package:
    """name: as it is installed. of: the stages that want it. source: it has no wheel, or none for every torch.

    path: of a package of this checkout. compiles: it has an extension, for which nvcc is wanted where it is collected.
    """

    name: str
    of: str
    source: bool = False
    path: str = ""
    compiles: bool = False


PACKAGES = (
    Package("sp-attention", "all", path="."),
    Package("sp-attention-flash", "flash", path="backends/flash"),
    Package("transformers", "all"),
    Package("huggingface_hub", "all"),
    Package("tokenizers", "all"),
    Package("safetensors", "all"),
    Package("pluggy", "all"),
    Package("click", "all"),
    Package("liger-kernel", "exchange"),
    Package("flash-linear-attention", "models"),
    Package("fla-core", "models"),
    Package("einops", "models, flash"),
    Package("flash-attn", "flash", source=True, compiles=True),
    Package("flash-attn-4", "flash"),
    Package("nvidia-cutlass-dsl", "flash"),
    Package("nvidia-cutlass-dsl-libs-base", "flash"),
    Package("quack-kernels", "flash"),
    Package("apache-tvm-ffi", "flash"),
    Package("torch-c-dlpack-ext", "flash"),
    Package("kernels", "flash"),
    Package("deepspeed", "long", source=True),
    Package("hjson", "long"),
    Package("py-cpuinfo", "long"),
    Package("msgpack", "long"),
)


@dataclass(frozen=True)
class Collected:
    """What came of a package: its file, or why there is none."""

    package: str
    of: str
    file: str = ""
    problem: str = ""


def main(folder: Path, python: str = PYTHON, only: list[str] | None = None) -> int:
    """Exits with 1 where something that all stages want is missing; what single stages want is told."""
    unknown = sorted({*(only or ())} - {package.name for package in PACKAGES})
    if unknown:
        print(f"not collected: {', '.join(unknown)}. There are: {', '.join(package.name for package in PACKAGES)}")
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    print(markdown_row(["package", "of stage", "file"]), markdown_row(["---"] * 3), sep="\n")
    for package in PACKAGES:
        if only is None or package.name in only:
            found.append(collected(package, folder, python))
            print(markdown_row([package.name, package.of, found[-1].file or f"none: {found[-1].problem}"]), flush=True)
            (folder / "collected.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    packed = pack(CACHE, folder / PACKED)
    print(f"{packed} files that stages have compiled are in {folder / PACKED}" if packed else "nothing is compiled yet")
    return int(any(one.problem and one.of == "all" for one in found))


def collected(package: Package, folder: Path, python: str) -> Collected:
    """Fetch or build it; what is there already, of any version, is left as it is, unless it is of this checkout."""
    there = [] if package.path else list(files_of(package, folder))
    try:
        if not there:
            _run(command(package, folder, python))
        return Collected(package.name, package.of, next(files_of(package, folder)).name)
    except (subprocess.CalledProcessError, StopIteration, OSError) as error:
        return Collected(package.name, package.of, problem=_reason(error))


def command(package: Package, folder: Path, python: str) -> list[str]:
    """pip's, by this Python, with the versions that tests run with."""
    pip, pinned = [sys.executable, "-m", "pip"], ["-c", str(ROOT / "ci" / "constraints.txt"), "--no-deps"]
    if package.path:
        return [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT / package.path)]
    if package.source and not (package.compiles and shutil.which("nvcc") is None):
        return [*pip, "wheel", "-q", *pinned, "--no-build-isolation", "-w", str(folder), package.name]
    if package.source:
        # Nothing to compile with: the source, which the other machine compiles.
        return [
            *pip,
            "download",
            "-q",
            *pinned,
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            "-d",
            str(folder),
            package.name,
        ]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    return [
        *pip, "download", "-q", *pinned, *target, *(f"--platform={name}" for name in PLATFORMS), "--pre",
        "-d", str(folder), package.name,
    ]  # fmt: skip


def files_of(package: Package, folder: Path) -> Iterator[Path]:
    """Wheels and archives of a package in a folder."""
    pattern = re.sub(r"[-_.]+", "[-_.]", package.name)
    return (file for file in sorted(folder.iterdir()) if re.match(rf"{pattern}-\d", file.name, re.IGNORECASE))


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, env=BUILDING | os.environ)


def _reason(error: Exception) -> str:
    """The last line that pip said."""
    if not isinstance(error, subprocess.CalledProcessError):
        return told(error)
    lines = [line for line in (error.stderr or error.stdout or "").splitlines() if "ERROR" in line or "error" in line]
    return lines[-1][:200] if lines else told(error)


def pack(cache: Path, archive: Path) -> int:
    """Put what stages have compiled into one file; the number of files in it."""
    files = [file for file in sorted(cache.rglob("*")) if file.is_file()]
    if files:
        with tarfile.open(archive, "w:gz") as packed:
            for file in files:
                packed.add(file, file.relative_to(cache))
    return len(files)


def unpack(archive: Path, cache: Path) -> None:
    """Give a machine what was compiled on another, unless it has compiled something itself."""
    if archive.exists() and not cache.exists():
        with tarfile.open(archive) as packed:
            packed.extractall(cache, filter="data")
