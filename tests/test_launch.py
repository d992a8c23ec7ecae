"""`run_ranks` returns, raises with every rank's story, and never hangs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

import pytest
import torch
import torch.distributed as dist

from sp_attention.distributed.process_groups import listen_on_this_machine
from sp_attention.launch import RanksError, run_ranks


def rank_and_sum(number: int) -> tuple[int, int, int]:
    total = torch.tensor(number)
    dist.all_reduce(total)
    return dist.get_rank(), int(total), torch.get_num_threads()


def test_every_rank_returns_in_order_and_computes_with_one_thread() -> None:
    assert run_ranks(3, rank_and_sum, 5) == [(0, 15, 1), (1, 15, 1), (2, 15, 1)]
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] != ""


def starts_a_process() -> int:
    child = get_context("spawn").Process(target=time.sleep, args=(1000,), daemon=True)
    child.start()
    assert child.pid is not None
    return child.pid


def test_what_a_rank_has_started_ends_with_it() -> None:
    for process in run_ranks(2, starts_a_process):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not want to")
    dist.barrier()


def one_is_killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def one_sleeps() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)


def one_waits_in_vain() -> None:
    if dist.get_rank() == 1:
        dist.barrier()


def failure(function: object, timeout: float) -> tuple[str, float]:
    start = monotonic()
    with pytest.raises(RanksError) as error:
        run_ranks(2, function, timeout=timeout)
    return str(error.value), monotonic() - start


def test_a_rank_that_raises_is_quoted_with_its_traceback() -> None:
    text, seconds = failure(one_raises, timeout=60)
    assert "--- rank 1: Traceback" in text
    assert "ValueError: rank 1 does not want to" in text
    assert "--- rank 0: " in text
    assert seconds < 30


def test_a_rank_that_is_killed_is_told_by_its_signal() -> None:
    text, seconds = failure(one_is_killed, timeout=60)
    assert "--- rank 1: exited with code -9 and no result" in text
    assert seconds < 30


def test_a_rank_that_sleeps_shows_its_stack() -> None:
    text, seconds = failure(one_sleeps, timeout=15)  # in which rank 0 has to begin and to return
    assert "--- rank 0: returned" in text
    assert "--- rank 1: still running; its stack:" in text
    assert "in one_sleeps" in text
    assert seconds < 27


def test_a_rank_that_waits_for_another_in_vain_times_out() -> None:
    text, seconds = failure(one_waits_in_vain, timeout=8)
    assert "one_waits_in_vain" in text
    assert seconds < 20


def returns_a_lambda() -> object:
    return lambda: None


def test_a_result_that_cannot_travel_is_an_error() -> None:
    text, _ = failure(returns_a_lambda, timeout=60)
    assert "pickle" in text


def test_ranks_that_have_not_begun_at_the_deadline_are_told_too() -> None:
    text, seconds = failure(one_sleeps, timeout=0.01)
    assert text.count("still running; its stack:") == 2
    assert seconds < 20


def addresses() -> list[str]:
    """Where this process listens, as the kernel tells."""
    dist.new_group([0, 1])
    dist.barrier()
    inodes = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists() or link.is_symlink()}
    found = []
    for line in "".join(Path("/proc/net", name).read_text() for name in ("tcp", "tcp6")).splitlines():
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in inodes:
            found.append(local.split(":")[0])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc, which only Linux has")
def test_ranks_listen_on_this_machine_only() -> None:
    for found in run_ranks(2, addresses):
        assert found
        assert set(found) == {"0100007F"}  # 127.0.0.1


def test_ranks_listen_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere")
    listen_on_this_machine()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "nowhere"


PARENT = """
import os, signal, sys, time
from pathlib import Path
from sp_attention.launch import run_ranks

def work(folder):
    Path(folder, f"{os.getpid()}").touch()
    time.sleep(1000)

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which tests that were started by nohup ignore, and so would it
    run_ranks(2, work, sys.argv[1], timeout=1000)
"""


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc, which only Linux has")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_ranks_and_their_folder_end_with_their_parent(name: str, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, tmp_path / "parent.py", tmp_path / "begun"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as parent:
        until(lambda: len([*(tmp_path / "begun").iterdir()]) == 2, 60)
        parent.send_signal(signal.Signals[name])
    ranks = [int(file.name) for file in (tmp_path / "begun").iterdir()]
    try:
        until(lambda: not any(map(is_alive, ranks)), 10)
    finally:
        for rank in filter(is_alive, ranks):
            os.kill(rank, signal.SIGKILL)
    assert not any((tmp_path / "temporary").glob("sp_attention_ranks_*"))


def until(holds: Callable[[], bool], seconds: float) -> None:
    end = monotonic() + seconds
    while not holds():
        assert monotonic() < end
        time.sleep(0.1)


def path_of_modules() -> tuple[list[str], bool]:
    return sys.path, "PYTHONSAFEPATH" in os.environ


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_ranks_have_the_module_path_of_their_parent(context: str, tmp_path: Path) -> None:
    """Modules of the current folder do not take the place of Python's own in a rank that starts."""
    (tmp_path / "here").mkdir()
    for name in ("queue", "random"):
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit('not the one of Python')")
    script = (
        "import multiprocessing, sys; from sp_attention.distributed import launch; import test_launch as t\n"
        f"launch.CONTEXT = multiprocessing.get_context({context!r})\n"
        "if __name__ == '__main__':\n"
        "    assert launch.run_ranks(2, t.path_of_modules) == [(sys.path, False)] * 2\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "../script.py"]
    ran = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
