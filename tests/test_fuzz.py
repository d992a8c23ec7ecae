"""The fuzzer: cases that can be repeated, that it finds what is wrong, and how it makes a case simpler."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch import Tensor
from transformers import PreTrainedModel

import sp_attention
from sp_attention import Backend, Request, api
from sp_attention.launch import run_ranks
from sweep import fuzz
from sweep.fuzzing.case import Case, case_in, case_of, drawn, fits, shrunk
from sweep.fuzzing.page import counts, faults, page
from sweep.fuzzing.running import of_errors
from sweep.running import append, read

EXACT = [
    Case(
        "qwen2", heads=6, kv_heads=3, layers=2, rows=3, length=31, mask="left", labels="some",
        checkpointing="reentrant",
        calls=("update", "late-logits", "two-forwards", "cache", "disable", "step", "enable", "hidden-states"),
    ),
    Case("bart", heads=3, layers=1, rows=2, length=9, mask="right", calls=("interrupted", "accumulate", "generate")),
    Case("gpt2", ranks=4, groups=2, dropout=0.3, labels="none", calls=("step", "evaluate", "suspended", "interrupted")),
]  # fmt: skip
# What is wrong only beyond the lengths of the rehearsal.
WRONG = Case(rows=2, length=29, mask="left", calls=("evaluate", "step"))


def test_cases_are_the_same_for_a_seed_and_can_be_written_down() -> None:
    cases = [drawn(3, number) for number in range(300)]
    assert cases == [drawn(3, number) for number in range(300)]
    assert cases != [drawn(4, number) for number in range(300)]
    for case in cases:
        assert fits(case)
        assert case_of(str(case)) == case == case_in({"case": asdict(case)})
    assert {case.ranks for case in cases} == {2, 3, 4}
    assert {len(case.calls) for case in cases} >= {1, 2, 3, 4, 5}
    for text in ('{"modell": "llama"}', "7", "llama"):
        with pytest.raises(ValueError, match=r"no case|Expecting value"):
            case_of(text)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", [2, 4])
def test_cases_are_exact(ranks: int, tmp_path: Path) -> None:
    cases = [case for case in EXACT if case.ranks == ranks]
    run_ranks(ranks, fuzz.run_chunk, cases, tmp_path / "results", timeout=200)
    records = read(tmp_path / "results")
    assert [case_in(record) for record in records] == cases
    for case, record in zip(cases, records, strict=True):
        told = {called["call"]: called["outcome"] for called in record["calls"]}
        assert list(told) == list(dict.fromkeys(["enable", *case.calls]))
        assert told == dict.fromkeys(told, "exact") | ({"step": "ranks alike"} if case.dropout else {}), record


def with_wrong_masks(cases: list[Case], results: Path) -> None:
    """On every rank: cases with kernels that take the padding of long sequences for tokens."""

    def wrong(backend: Backend) -> Backend:
        def attend(request: Request) -> Tensor:
            is_long = request.mask.key_length > 20
            return backend.attend(replace(request, mask=replace(request.mask, padding=None)) if is_long else request)

        return replace(backend, attend=attend)

    candidates = api.candidates
    with patch.object(api, "candidates", lambda *args: tuple(map(wrong, candidates(*args)))):
        fuzz.run_chunk(cases, results)


@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    cases = [replace(WRONG, length=19), replace(WRONG, mask="none"), WRONG]
    run_ranks(2, with_wrong_masks, cases, tmp_path / "results", timeout=200)
    records = read(tmp_path / "results")
    assert [record["outcome"] for record in records] == ["exact", "exact", "wrong"]
    # What comes behind a fault says nothing.
    assert [called["call"] for called in faults(records)[0]["calls"]] == ["enable", "evaluate"]


def with_another_weight_on_a_rank(cases: list[Case], results: Path) -> None:
    enable = sp_attention.enable

    def wrong(model: PreTrainedModel, *args: object, **options: object) -> sp_attention.Handle:
        handle = enable(model, *args, **options)
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.lm_head.weight[40] *= 1.1
        return handle

    with patch.object(sp_attention, "enable", wrong):
        fuzz.run_chunk(cases, results)


@pytest.mark.filterwarnings("ignore")
def test_ranks_that_part_are_found(tmp_path: Path) -> None:
    run_ranks(2, with_another_weight_on_a_rank, [WRONG], tmp_path / "results", timeout=200)
    (record,) = read(tmp_path / "results")
    assert record["outcome"] == "ranks disagree"
    assert "loss on rank 1" in record["calls"][-1]["reason"]


def test_a_fault_is_made_simpler_as_long_as_it_is_one() -> None:
    options = {"mlp_tile": 3, "whole_logits": True, "checkpointing": "reentrant", "frozen": True, "training": False}
    calls = ("evaluate", "update", "disable", "step")
    case = Case("mistral", 6, 3, 3, "float32", 0.3, 4, 2, 3, 200, "left", "some", calls=calls, seed=7, **options)
    tried = []

    def is_faulty(other: Case) -> bool:
        tried.append(other)
        return other.mask == "left" and other.length > 25 and "update" in other.calls

    simple = shrunk(case, is_faulty, tries=80)
    assert simple == Case(mask="left", length=26, calls=("update",))
    assert shrunk(case, is_faulty, tries=0) == case
    assert all(map(fits, tried))


def test_errors_that_all_ranks_have_alike_are_refusals_if_they_are_the_librarys() -> None:
    ours, other = (True, "UnsupportedError: no"), (False, "IndexError: oh")
    for errors, outcome in (
        ([ours, ours], "refused"),
        ([other, other], "other error"),
        ([ours, None], "ranks disagree"),
        ([ours, other], "ranks disagree"),
        ([ours, ours, None, None], "refused"),
        ([ours, None, None, None], "ranks disagree"),
        ([(False, "RuntimeError: Timed out waiting")] * 2, "hang"),
    ):
        assert of_errors("step", errors, 2).outcome == outcome, errors


def dying_chunk(cases: list[Case], results: Path) -> None:
    """In place of a chunk: rank 1 dies in some cases, and in others it is rank 0 that does not go on."""
    for case in cases:
        if case.seed == 3:
            os._exit(1)
        if dist.get_rank() == 0:
            called = [{"call": "step", "outcome": "exact", "error": 0.0, "reason": ""}]
            append(results, {"case": asdict(case), "outcome": "exact", "calls": called, "seconds": 1.0})
        dist.barrier()


def test_a_case_that_ends_its_ranks_costs_only_itself(tmp_path: Path) -> None:
    cases = [Case(seed=seed) for seed in range(5)]
    with patch.object(fuzz, "run_chunk", dying_chunk):
        fuzz.run_cases(cases, tmp_path / "results", 5)
    records = read(tmp_path / "results")
    assert [record["outcome"] for record in records] == ["exact", "exact", "exact", "other error", "exact"]
    assert [case_in(record) for record in records] == cases
    assert counts(records).startswith("5 cases, ")
    text = page(records, 1, 0)
    assert "| llama | 4 |" in text
    assert """other error: python -m sweep.fuzz --case '{"seed": 3}'""" in text


def test_results_are_not_run_again(tmp_path: Path) -> None:
    results = tmp_path / "results"
    called = [{"call": "enable", "outcome": "exact", "error": None, "reason": ""}]
    for number in range(3):
        record = {"case": asdict(drawn(9, number)), "outcome": "exact", "calls": called, "seconds": 1.0}
        append(results, record)
    options = ["--cases", "3", "--seed", "9", "--results", str(results), "--table", str(tmp_path / "page.md")]
    with patch.object(fuzz, "start_quickly"):
        ran = CliRunner().invoke(fuzz.main, options)
    assert ran.exit_code == 0, ran.output
    assert "3 cases, 0 calls: 3 exact, " in ran.output
    assert "Seed 9, cases 0 to 2; torch" in (tmp_path / "page.md").read_text()
