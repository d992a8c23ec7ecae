"""`ci/gpu`: its arguments, its result files, what a stage that is killed leaves, and from results to refusals."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from documents import ROOT
from gpu_stages import collect, masks, nccl, plan, running, verdicts
from gpu_stages.command import main, parser
from gpu_stages.results import Results, load, page, peek

from sp_attention.kernels.seen_on_devices import SEEN, Seen

SCRIPT = ROOT / "ci" / "gpu"


def sh_of_the_page() -> list[str]:
    """The lines that docs/devices.md has for a shell."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "devices.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line.split("#")[0].strip() for line in "\n".join(blocks).splitlines()]


def refused_arguments(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main([*arguments])
    return capsys.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_says_so_and_fails() -> None:
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "torch finds no accelerator here" in run.stdout


def test_what_it_does_not_know_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'mask'" in refused_arguments(capsys, "--stage", "mask")
    assert main(["--collect", "--only", "torch"]) == 2
    assert "not collected: torch." in capsys.readouterr().out


# Result files.


def keyed(results: Results, name: str, outcome: str = "right") -> dict[str, Any]:
    return results.row("Rows", {"name": name}, lambda: {"outcome": outcome})


def test_each_row_is_in_the_files_as_soon_as_it_is_done_and_is_tried_once(tmp_path: Path) -> None:
    results = Results(tmp_path, "masks", {"device": "CPU"})
    keyed(results, "first")
    assert [row["name"] for row in peek(results.file).tables["Rows"]] == ["first"]
    assert "| first | right |" in results.file.with_suffix(".md").read_text()
    assert "It has not come to its end" in results.file.with_suffix(".md").read_text()
    again = load(results.file)
    assert keyed(again, "first", "another") == {"name": "first", "outcome": "right"}
    keyed(again, "second", "wrong: by far")
    assert [*again.bad()] == ["Rows: second: outcome: wrong: by far"]
    assert "| second | **wrong: by far** |" in page(again)


def test_what_a_row_raises_is_told_and_the_next_goes_on(tmp_path: Path) -> None:
    results = Results(tmp_path, "masks")

    def fails() -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    results.row("Rows", {"name": "first"}, fails)
    keyed(results, "second")
    assert [row["outcome"] for row in peek(results.file).tables["Rows"]] == [
        "failed: RuntimeError: no such kernel",
        "right",
    ]


def test_what_takes_longer_than_is_left_is_not_begun(tmp_path: Path) -> None:
    results = Results(tmp_path, "long", {"until": 0.0})
    row = results.row("Rows", {"name": "first"}, lambda: pytest.fail("begun"), needs=5.0)
    assert row["outcome"].startswith("not run: it takes 5 s")


def test_pages_say_what_was_a_stand_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path, "nccl", {"device": "CPU", "date": "today", "stand_in": "the group is gloo's"})
    results.write()
    assert "**Stand-ins, and nothing about a device:** the group is gloo's" in page(results)
    results.file.with_suffix(".md").unlink()
    assert main(["--pages", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(results.file.with_suffix(".md"))
    assert results.file.with_suffix(".md").read_text() == page(results)


# Stages that end early: a module of a test stands in for one, by a name of `plan.STAGES`.

STAGE = """
import os, signal
def run(results, device):
    row = lambda name, measure: results.row("Rows", {"name": name}, measure)
    def breaks():
        raise RuntimeError("CUDA error: an illegal memory access")
    row("first", lambda: {"outcome": "right"})
    row("dies", lambda: os.kill(os.getpid(), signal.SIGKILL))
    row("breaks", breaks)
    row("last", lambda: {"outcome": "right"})
"""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of stage nccl in a folder in the place of `gpu_stages`, for a test to write."""
    package = tmp_path / "ci" / "gpu_stages"
    package.mkdir(parents=True)
    for file in ("__init__", "plan", "results", "work"):
        (package / f"{file}.py").write_text((SCRIPT.parent / "gpu_stages" / f"{file}.py").read_text())
    monkeypatch.setattr(running, "__file__", str(package / "running.py"))
    return package / "nccl.py"


def test_rows_that_end_the_process_are_told_and_the_rest_is_run_by_others(stage: Path, tmp_path: Path) -> None:
    stage.write_text(STAGE)
    results = running.run("nccl", torch.device("cpu"), tmp_path / "to", 500.0)
    assert [f"{row['name']}: {row['outcome']}" for row in results.tables["Rows"]] == [
        "first: right",
        "dies: the process ended in it",
        "breaks: failed: RuntimeError: CUDA error: an illegal memory access",
        "last: right",
    ]
    assert (results.ended or "").startswith("It came to its end")
    assert len([*results.bad()]) == 2


def test_a_stage_that_cannot_begin_says_why(stage: Path, tmp_path: Path) -> None:
    stage.write_text("import no_such_module")
    results = running.run("nccl", torch.device("cpu"), tmp_path / "to", 500.0)
    assert (results.ended or "").startswith("failed")
    assert "No module named 'no_such_module'" in (results.ended or "")


def test_a_process_is_ended_at_its_deadline_with_what_it_has_started(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run(['sleep', '300'])"
    start = monotonic()
    assert running.process([sys.executable, "-c", code], tmp_path / "log", 1.0) is None
    assert monotonic() - start < 100
    assert running.process([sys.executable, "-c", "raise SystemExit(7)"], tmp_path / "log", 100.0) == 7


def test_a_stage_that_is_killed_leaves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(command: list[str], log: Path, seconds: float) -> None:
        results = load(Path(command[-1]))
        keyed(results, "first")
        results.under_way = {"table": "Rows", "key": {"name": "second"}}
        results.write()

    monkeypatch.setattr(running, "process", ended)
    results = peek(running.run("nccl", torch.device("cpu"), tmp_path, 240.0).file)
    assert [row["outcome"] for row in results.tables["Rows"]] == ["right", "the process ended in it"]
    assert (results.ended or "").startswith("It was ended at its deadline of 240 s")
    assert "| first | right |" in results.file.with_suffix(".md").read_text()


# From results to refusals.


def seen_rows(kind: str = "window", outcome: str = "right", case: str = "window", **backends: str) -> Results:
    """As of a device, where all of one case has this outcome in bfloat16, at two lengths."""
    facts = {"device": "NVIDIA H200", "compute capability": "9.0", "torch": "2.13.0+cu130", "date": "2026-12-01 10:00"}
    results = Results(Path(), "masks", {**facts, "lengths of masks": 2})
    row = {"kernel": "sdpa", "dtype": "bfloat16", "case": case, "kind": kind}
    without = {"chosen": outcome, "flash": "cannot: torch has no such kernel for it", "efficient": "right"} | backends
    results.tables = {
        masks.WITHOUT: [{**row, "tokens": tokens, "math": "right", **without} for tokens in ("137", "600")],
        masks.WITH: [{**row, "tokens": tokens, "cudnn": "wrong: far off", "any": "right"} for tokens in ("137", "600")],
    }
    return results


def found(results: Results) -> dict[str, bool]:
    return {seen.backend: seen.right for seen in verdicts.seen_in(results)}


def test_a_verdict_is_what_all_rows_of_a_kind_are() -> None:
    everything = {"chosen": True, "efficient": True, "math": True, "cudnn": False, "any": True}
    assert found(seen_rows()) == everything
    assert verdicts.seen_in(seen_rows())[0] == Seen(
        "sdpa", "2.13", "9.0", "chosen", "window", "bfloat16", True, "2026-12-01", "NVIDIA H200"
    )
    wrong = seen_rows()
    wrong.tables[masks.WITHOUT][1]["chosen"] = "wrong: gradient of query is off by 2.1e-01"
    assert found(wrong) == everything | {"chosen": False}


def test_what_was_not_run_to_its_end_gives_no_verdict_but_what_is_wrong_does() -> None:
    results = seen_rows()
    results.tables[masks.WITHOUT].pop()
    assert found(results) == {"cudnn": False, "any": True}
    results = seen_rows(outcome="failed: RuntimeError: no")
    assert found(results)["chosen"] is False
    results = seen_rows()
    results.tables[masks.WITHOUT][0] = {
        "kernel": "sdpa", "dtype": "bfloat16", "case": "window", "tokens": "137", "outcome": "the process ended in it"
    }  # fmt: skip
    assert found(results)["chosen"] is False
    assert found(seen_rows(kind="none", case="causal")) == {}


def test_one_command_makes_a_result_the_table_of_refusals(tmp_path: Path) -> None:
    file, table = tmp_path / "masks.json", tmp_path / "seen_on_devices.py"
    table.write_text(verdicts.TABLE.read_text())
    results = seen_rows()
    results.folder = tmp_path
    results.write()
    assert verdicts.main(file, table) == 0
    space: dict[str, Any] = {}
    exec(compile(table.read_text(), str(table), "exec"), space)
    rows = {tuple(one) for one in space["SEEN"]}
    assert rows == {tuple(one) for one in [*SEEN, *verdicts.seen_in(results)]}
    assert table.read_text().startswith(verdicts.TABLE.read_text().split("SEEN:")[0])


def test_the_table_is_as_the_command_writes_it() -> None:
    assert verdicts.text(verdicts.merged(SEEN, []), verdicts.TABLE.read_text()) == verdicts.TABLE.read_text()


def test_stand_ins_give_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = seen_rows()
    results.folder, results.facts["stand_in"] = tmp_path, "torch's attention is that of the CPU"
    results.write()
    before = verdicts.TABLE.read_text()
    assert main(["--verdicts", str(results.file)]) == 1
    assert verdicts.TABLE.read_text() == before
    assert "it is of stand-ins" in capsys.readouterr().out
    assert verdicts.why_not(Results(tmp_path, "models")) == "it is of stage models"


# What stages run.


def test_cases_are_of_the_kinds_that_kernels_refuse_by() -> None:
    kinds = set()
    for case in masks.CASES:
        asked, *_ = masks._asked(case, masks.REHEARSED[0], torch.bfloat16, torch.device("cpu"))
        kinds.add(masks.sdpa.kind(asked))
    plain = {"window", "mask", "bias", "later queries"}
    assert kinds == {None, *plain, "window, sinks", "mask, sinks", "later queries, sinks"}


def test_a_kernel_that_is_wrong_is_found_wrong_in_stage_masks() -> None:
    asked, expected, allowed = masks._asked("window", masks.REHEARSED[0], torch.bfloat16, torch.device("cpu"))

    def off(request: Any) -> torch.Tensor:
        return masks.sdpa.attend(request) + request.query * 1e-2

    assert masks._outcome(masks.sdpa.attend, asked, expected, allowed) == "right"
    assert masks._outcome(off, asked, expected, allowed).startswith("wrong: output is off by")


@pytest.mark.parametrize("name", nccl.OURS)
def test_functions_of_stage_nccl_call_a_collective_each_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for collective in ("all_to_all_single", "all_gather", "all_reduce"):
        function = getattr(dist, collective)
        monkeypatch.setattr(
            dist, collective, lambda *args, to=function, **options: (called.append(to), to(*args, **options))
        )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert nccl._ours(nccl.OURS[name], torch.float32, torch.device("cpu")) == {"outcome": "right"}
    finally:
        dist.destroy_process_group()
    assert len(called) >= (1 if name in ("sum over ranks", "average_gradients") else 2)


def test_stage_nccl_has_every_collective_that_the_library_calls() -> None:
    called = set()
    for file in (ROOT / "sp_attention").rglob("*.py"):
        if "cli" not in file.parts:
            called |= set(
                re.findall(r"\bdist\.((?:all_|broadcast|reduce|scatter|gather|barrier|new_)\w*)\(", file.read_text())
            )
    names = {name.split(",")[0] for name in nccl.CALLS} | set(re.split(r" and ", " and ".join(nccl.OTHERS)))
    assert called - {"all_gather_object"} <= names
    assert "all_gather_object" in names


# Collecting.


def test_the_wheel_of_this_checkout_is_built_installed_and_used_without_a_network(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    assert main(["--collect", str(wheels), "--only", "sp-attention"]) == 0
    (wheel,) = wheels.glob("*.whl")
    assert json.loads((wheels / "collected.json").read_text()) == [
        {"package": "sp-attention", "of": "all", "file": wheel.name, "problem": ""}
    ]
    (line,) = (line for line in sh_of_the_page() if "--no-index" in line)
    command = line.replace("build/gpu/site", str(site)).replace("build/gpu/wheels/*.whl", str(wheel))
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    assert (site / "sp_attention" / "kernels" / "seen_on_devices.py").exists()


def test_pip_is_asked_for_wheels_of_the_other_machine_with_the_versions_of_the_tests() -> None:
    by_name = {package.name: package for package in collect.PACKAGES}
    asked = collect.command(by_name["liger-kernel"], Path("to"), "3.12")
    assert {"--only-binary=:all:", "3.12", "--platform=manylinux_2_28_x86_64", "--no-deps", "-c"} <= set(asked)
    assert collect.command(by_name["sp-attention-flash"], Path("to"), "3.12")[-1] == str(ROOT / "backends" / "flash")


def test_what_cannot_be_fetched_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str]) -> None:
        if command[-1] == "kernels":
            raise subprocess.CalledProcessError(1, command, stderr="x\nERROR: No matching distribution found")
        (tmp_path / f"{command[-1]}-1.0-py3-none-any.whl").touch()

    monkeypatch.setattr(collect, "_run", run)
    assert collect.main(tmp_path, only=["kernels", "hjson", "fla-core"]) == 0
    out = capsys.readouterr().out
    assert "| kernels | flash | none: ERROR: No matching distribution found |" in out
    assert "| hjson | long | hjson-1.0-py3-none-any.whl |" in out


def test_what_was_compiled_travels(tmp_path: Path) -> None:
    (tmp_path / "cache" / "triton").mkdir(parents=True)
    (tmp_path / "cache" / "triton" / "kernel.so").write_text("code")
    assert collect.pack(tmp_path / "cache", tmp_path / "compiled.tar.gz") == 1
    collect.unpack(tmp_path / "compiled.tar.gz", tmp_path / "there")
    assert (tmp_path / "there" / "triton" / "kernel.so").read_text() == "code"


# The page, and all of it from start to end.


def commands() -> list[list[str]]:
    """The calls of `ci/gpu` on the page, as arguments."""
    return [shlex.split(line)[1:] for line in sh_of_the_page() if line.startswith("ci/gpu")]


def test_the_commands_of_the_page_are_of_the_command_line() -> None:
    asked = [parser().parse_args(arguments) for arguments in commands()]
    assert {name for one in asked for name in one.stage or ()} <= set(plan.STAGES)
    assert any(one.device == "cpu" for one in asked)
    for field in ("collect", "verdicts", "pages"):
        assert any(getattr(one, field) is not None for one in asked), field
    page = (ROOT / "docs" / "devices.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [*plan.STAGES]


@pytest.mark.slow
@pytest.mark.parametrize("name", plan.STAGES)
def test_a_stage_runs_to_its_end_on_the_cpu_with_stand_ins(name: str, tmp_path: Path) -> None:
    code = main(["--device", "cpu", "--stage", name, "--to", str(tmp_path)])
    results = peek(tmp_path / f"{name}.json")
    assert (results.ended or "").startswith("It came to its end")
    assert results.facts["stand_in"] == plan.STAGES[name].stand_in
    assert sum(map(len, results.tables.values())) > 5
    assert (code, [*results.bad()]) == (0, [])
