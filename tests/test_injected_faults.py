"""Faults of one rank on purpose: how the others end, and that what they should not do is noticed."""

import subprocess
import sys
from typing import Any

import pytest

from sweep.faulting.fault import DIFFERENCES, KINDS, POINTS, Fault, drawn, fault_of
from sweep.faulting.page import page
from sweep.faults import _processes, record_of, run

pytestmark = pytest.mark.slow

ENDED = {"error": "RuntimeError", "text": "rank 1 is ill", "at": 12.0}
FIRED = {"at": 10.0, "pid": 1}


def test_faults_are_the_same_for_a_seed_and_can_be_written_down() -> None:
    faults = [drawn(3, number) for number in range(300)]
    assert faults == [drawn(3, number) for number in range(300)]
    assert [fault_of(str(fault)) for fault in faults] == faults
    assert {(fault.kind, fault.point) for fault in faults} == {
        (kind, point) for kind in KINDS for point in POINTS if kind != "differ" or point in DIFFERENCES
    }
    for text in ('{"kind": "raise"}', '{"kind": "sleep", "point": "forward"}'):
        with pytest.raises(ValueError, match=r"no fault|kinds are"):
            fault_of(text)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (Fault("differ", "forward", what="tokens", step=1), True),
        (Fault("raise", "rehearsal", rank=0, ranks=3, occasion=2), True),
        (Fault("die", "exchange", what="exit", occasion=6), False),
    ],
    ids=lambda value: f"{value.kind}-{value.point}" if isinstance(value, Fault) else "",
)
def test_the_others_end_with_an_error_and_nothing_is_left_behind(fault: Fault, named: bool) -> None:
    record = run(fault)
    assert record["outcome"] == "ended", record
    assert record["named"] == named
    assert len(record["endings"]) == fault.ranks - 1
    assert record["seconds"] < 8


@pytest.mark.parametrize(
    ("outcome", "changes"),
    [
        ("ended", {}),
        ("not reached", {"fired": None}),
        ("not named", {"endings": {0: ENDED, 2: ENDED | {"text": "rank 10 is ill"}}}),
        ("late", {"endings": {0: ENDED, 2: ENDED | {"at": 40.0}}}),
        ("no error", {"endings": {0: ENDED, 2: ENDED | {"error": ""}}}),
        ("hang", {"endings": {0: ENDED, 2: None}}),
        ("left behind", {"left": ["process 7"]}),
    ],
)
def test_what_others_should_not_do_is_noticed(outcome: str, changes: dict[str, Any]) -> None:
    given = {"fired": FIRED, "endings": {0: ENDED, 2: ENDED}, "left": []} | changes
    record = record_of(Fault("differ", "forward", ranks=3), **given)
    assert record["outcome"] == outcome
    text = page([record], 1)
    assert f"1 {outcome}" in text
    assert ("## What is not as it should be" in text) == (outcome not in ("ended", "not reached"))


def test_processes_of_a_session_are_found_as_long_as_they_live() -> None:
    code = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as parent:
        parent.stdout.readline()
        child, *rest = [one for one in _processes({parent.pid}) if one != str(parent.pid)]
        parent.stdin.close()
        parent.wait()
        assert rest == []
        # An orphan.
        assert _processes({parent.pid}) == [child]
        subprocess.run(["kill", child], check=True)
