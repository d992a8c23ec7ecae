"""`sp-attention doctor` and what `backends` says of kernels: on machines where things are missing, broken or wrong."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import run_command

from sp_attention import testing
from sp_attention.cli import cli, machine
from sp_attention.cli.kernels import ask
from sp_attention.kernels import registry
from sp_attention.kernels.request import Backend, Request

LONGEST = "padding on both sides, 4096 tokens"
WritePlugin = Callable[[str, str], None]

# Third-party kernels: one for a device that is nowhere, one that takes one dtype, one that cannot be asked.
PICKY = """
import sp_attention, torch
from sp_attention import testing

print("hello from a plugin")


def narrow(request):
    return None if request.query.dtype == torch.bfloat16 else f"it takes bfloat16 only, [b] not {request.query.dtype}"


def mute(request):
    raise LookupError("no table")


@sp_attention.hookimpl
def sp_attention_backends():
    return [
        sp_attention.Backend("moon", "far", testing.attend),
        sp_attention.Backend("cpu", "narrow", testing.attend, refuses=narrow),
        sp_attention.Backend("cpu", "mute", testing.attend, refuses=mute),
    ]
"""


def rows(text: str) -> dict[str, str]:
    """The block that doctor writes, by name; what belongs to a name in one."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if not line:
            break
        key, value = line[:14].strip(), line[14:].strip()
        name = key or name
        found[name] = f"{found[name]}\n{value}" if name in found else value
    return found


def installed_but_broken(site: Path, name: str, error: str, points: str = "") -> None:
    info = site / f"{name}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    (info / "entry_points.txt").write_text(points)
    (site / f"{name}.py").write_text(f"raise ImportError({error!r})")


def test_doctor_says_what_is_installed_in_one_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_plugin: WritePlugin
) -> None:
    write_plugin("broken_exit", "import sys; sys.exit('no GPU here')")
    installed_but_broken(tmp_path / "site", "flash_attn", "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetD")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    ran = run_command("doctor")
    assert ran.returncode == 0, ran.stderr
    found = rows(ran.stdout)
    for package in ("sp-attention", "transformers", "accelerate"):
        assert found[package] == version(package)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda is not None else "neither CUDA nor ROCm"
    assert found["torch"] == f"{version('torch')}\nbuilt with {built}"
    assert found["deepspeed"] == found["torch-npu"] == "not installed"
    assert found["flash-attn"] == "9.9"
    assert "gloo" in found["process groups"].split(", ")
    assert found["environment"] == "WORLD_SIZE=4"
    assert "10.0.0.7" not in ran.stdout
    available, unusable = found["backends"].splitlines()
    ours = f" on any, of sp-attention {version('sp-attention')}: "
    assert available == f"sdpa, transformers:eager, transformers:sdpa{ours}available"
    assert unusable.startswith("transformers:flash_attention_2, transformers:flash_attention_3, ")
    assert f"transformers:flex_attention{ours}its mask does not travel as a tensor: use sdpa, " in unusable
    assert found["broken plugin"] == "broken_exit 1.0: SystemExit: no GPU here"


def test_doctor_writes_the_same_as_json_whatever_plugins_print(write_plugin: WritePlugin) -> None:
    write_plugin("picky", PICKY)
    ran = run_command("doctor", "--json")
    assert "hello from a plugin" in ran.stderr
    found = json.loads(ran.stdout)
    assert found["packages"]["torch"] == version("torch")
    assert "gloo" in found["torch"]["process_groups"]
    assert found["torch"]["problem"] is None
    assert {
        "device": "cpu", "kernel": "narrow", "priority": 0, "available": True, "reason": None,
        "distribution": "picky", "version": "1.0", "entry_point": "picky",
    } in found["plugins"]["backends"]  # fmt: skip


def test_doctor_answers_where_torch_npu_keeps_torch_from_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cannot = "libhccl.so: cannot open shared object file"
    installed_but_broken(tmp_path, "torch_npu", cannot, "[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ran = run_command("doctor")
    assert ran.returncode == 0, ran.stderr
    found = rows(ran.stdout)
    assert found["torch-npu"] == "9.9"
    assert "cannot be imported: RuntimeError: Failed to load the backend extension: torch_npu." in found["torch"]
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found["torch"]
    assert f"Because of ImportError: {cannot}" in found["torch"]
    assert found["backends"] == "not asked, for want of torch"
    ran = run_command("doctor", "--run", "--json")
    assert ran.returncode == 2
    assert ran.stderr == "sp-attention: kernels cannot be checked, for torch cannot be imported\n"
    assert json.loads(ran.stdout)["plugins"] is None
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    found = rows(run_command("doctor").stdout)
    assert found["backends"].startswith("sdpa")
    assert found["environment"] == "TORCH_DEVICE_BACKEND_AUTOLOAD=0"


def test_the_version_of_cann_is_what_its_installation_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.facts()["cann"] is None
    (tmp_path / "aarch64-linux").mkdir()
    file = tmp_path / "aarch64-linux" / "ascend_toolkit_install.info"
    file.write_text("package_name=Ascend-cann-toolkit\nversion=8.3.RC1\ninnerversion=V100R001\narch=aarch64\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert machine.facts()["cann"] == {"version": "8.3.RC1", "home": str(tmp_path)}
    assert doctor()["CANN"] == f"8.3.RC1 in {tmp_path}"


def test_the_devices_of_an_accelerator_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(name="Big", total_memory=80 * 2**30, major=9, minor=0)
    module = SimpleNamespace(get_device_properties=lambda index: known)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = doctor()
    assert found["torch"].endswith("built with CUDA 12.8")
    assert found["devices"].splitlines()[1:] == [
        "cuda:0, Big, 80 GiB, compute capability 9.0",
        "cuda:1, Big, 80 GiB, compute capability 9.0",
    ]
    # One that tells nothing of itself, as mps does.
    del module.get_device_properties
    assert doctor()["devices"].splitlines()[1:] == ["cuda:0", "cuda:1"]


def test_a_build_for_cuda_without_a_device_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", without_driver)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert "no others: RuntimeError: Found no NVIDIA driver on your system." in doctor()["devices"]


def doctor() -> dict[str, str]:
    """Its block, of this process."""
    ran = CliRunner().invoke(cli, ["doctor"], standalone_mode=False)
    assert ran.exception is None
    return rows(ran.stdout)


def forgetful(request: Request) -> torch.Tensor:
    """Its window and its padding end with its mask of 512 tokens, as of a kernel that users met on NPUs."""
    if request.mask.key_length <= 512:
        return testing.attend(request)
    return testing.attend(Request(request.query, request.key, request.value, plain(request), request.scale))


def plain(request: Request) -> Any:
    mask = request.mask
    return type(mask)(mask.batch, mask.query_length, mask.key_length, mask.device)


def refuses_dropout(request: Request) -> str | None:
    return "no dropout [at all]" if request.dropout else None


def raises_on_softcap(request: Request) -> torch.Tensor:
    if request.softcap is not None:
        raise RuntimeError("illegal instruction")
    return testing.attend(request)


def check_kernels(monkeypatch: pytest.MonkeyPatch, *options: str, backends: tuple[Backend, ...]) -> Any:
    """doctor --run on these kernels, up to 600 tokens and with a few features."""
    few = ("causal", "softcap", "dropout")
    monkeypatch.setattr(testing, "FEATURES", {name: testing.FEATURES[name] for name in few})
    monkeypatch.setattr(testing, "LONG", {name: build for name, build in testing.LONG.items() if "4096" not in name})
    monkeypatch.setattr(registry, "usable", lambda device: backends)
    return CliRunner().invoke(cli, ["doctor", "--run", *options], standalone_mode=False)


def test_doctor_tells_right_kernels_from_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Backend("cpu", "good", testing.attend, refuses=refuses_dropout)
    forgets = Backend("cpu", "forgetful", forgetful, refuses=refuses_dropout)
    raises = Backend("cpu", "raises", raises_on_softcap, refuses=refuses_dropout)
    ran = check_kernels(monkeypatch, "--json", backends=(good, forgets, raises))
    assert ran.exception is None
    assert ran.return_value == 1
    found = {each["kernel"]: each for each in json.loads(ran.stdout)["checked"]}
    every = [*testing.FEATURES, *testing.LONG]
    assert len(testing.LONG) == 6
    assert found["good"] == {
        "kernel": "good", "device": "cpu", "dtype": "float64",
        "right": [feature for feature in every if feature != "dropout"],
        "refused": {"dropout": "no dropout [at all]"},
        "wrong": {},
    }  # fmt: skip
    wrong = found["forgetful"]["wrong"]
    assert wrong.keys() == {"padding on both sides, 600 tokens", "sliding window, 600 tokens"}
    assert all(reason.startswith("output is off by ") for reason in wrong.values())
    assert found["raises"]["wrong"] == {"softcap": "RuntimeError: illegal instruction"}
    ran = check_kernels(monkeypatch, backends=(good, forgets))
    assert ran.return_value == 1
    lines = ran.stdout.split("\n\n")[1].splitlines()
    right = len(every) - 1
    assert lines[0].split() == ["kernel", "device", "dtype", "right", "refused", "WRONG"]
    assert lines[2].split() == ["good", "cpu", "float64", str(right), "1", "0"]
    assert lines[3].split() == ["forgetful", "cpu", "float64", str(right - 2), "1", "2"]
    assert lines[4] == "good on cpu: refused: dropout: no dropout [at all]"
    assert lines[6].startswith("forgetful on cpu: WRONG: padding on both sides, 600 tokens: output is off by ")


def test_doctor_is_content_with_kernels_that_are_right_or_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    unwilling = Backend("cpu", "unwilling", testing.attend, refuses=lambda request: "never")
    ran = check_kernels(monkeypatch, backends=(unwilling,))
    assert ran.exception is None
    assert ran.return_value == 0


@pytest.mark.parametrize("feature", [*(feature for feature in testing.LONG if "600" in feature), LONGEST])
def test_sdpa_is_right_in_thousands_of_tokens(feature: str) -> None:
    assert testing.check(registry.find("cpu", "sdpa"), feature, tolerance=1e-9) is None


def test_doctor_checks_lengths_at_which_kernels_go_other_ways() -> None:
    lengths = {testing.request_for(feature, dtype=torch.float32).query.shape[1] for feature in testing.LONG}
    assert lengths == {137, 600, 4096}


def test_kernels_are_asked_in_a_dtype_that_they_take() -> None:
    def refuses(request: Request) -> str | None:
        if request.query.dtype not in (torch.bfloat16, torch.float16):
            return f"not {request.query.dtype}"
        return "no softcap" if request.softcap else None

    answers = ask(Backend("cpu", "narrow", testing.attend, refuses=refuses), "cpu")
    assert (answers.device, answers.dtype) == ("cpu", "bfloat16")
    assert answers.refused == {
        "float64": "not torch.float64", "float32": "not torch.float32", "softcap": "no softcap",
    }  # fmt: skip


def test_kernels_of_other_devices_are_asked_in_narrow_dtypes_first() -> None:
    assert ask(Backend("meta", "any-dtype", testing.attend), "meta").dtype == "bfloat16"


def test_backends_says_what_each_kernel_refuses(write_plugin: WritePlugin) -> None:
    write_plugin("picky", PICKY)
    ran = run_command("backends", "--json")
    assert ran.returncode == 0, ran.stderr
    assert "hello from a plugin" in ran.stderr
    found = {each["kernel"]: each for each in json.loads(ran.stdout)["backends"]}
    assert found["sdpa"]["refuses"] == {"softcap": "torch's scaled_dot_product_attention has no softcap"}
    assert found["sdpa"]["distribution"] == "sp-attention"
    assert found["transformers:eager"]["refuses"] == {}
    assert found["transformers:sdpa"]["refuses"].keys() == {
        feature for feature in testing.FEATURES if feature == "softcap" or "sinks" in feature
    }
    assert found["transformers:flash_attention_2"]["refuses"] is None
    assert found["narrow"]["asked"] == {"device": "cpu", "dtype": "bfloat16"}
    assert found["narrow"]["refuses"].keys() == {"float64", "float32", "float16"}
    assert found["mute"]["refuses"].keys() == testing.FEATURES.keys() | {"float32", "bfloat16", "float16"}
    assert found["mute"]["refuses"]["causal"] == "asking it raised LookupError: no table"
    assert found["far"]["asked"] is None
    text = run_command("backends").stdout
    assert "  sdpa: softcap: torch's" in text
    assert "  mute on cpu: everything: asking it raised LookupError" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines()[2:] if line and not line.startswith(" ")}
    assert rows["far"] == ["far", "moon", "0", "no", "moon", "here"]
    assert rows["narrow"] == ["narrow", "cpu", "0", "yes", "3"]
    # What a plugin writes is text, and no markup.
    assert "it takes bfloat16 only, [b] not" in text
