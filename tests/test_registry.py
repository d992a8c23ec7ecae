"""Plugins: found by entry point, and no plugin can break another."""

from collections.abc import Callable
from time import monotonic

import pytest
import torch
from helpers import THIRD_PARTY, train_on
from models import MODELS

import sp_attention
from sp_attention.errors import BackendError
from sp_attention.kernels.registry import candidates, find, load
from sp_attention.launch import run_ranks

Install = Callable[..., None]


def kernels() -> dict[str, str | None]:
    """What is offered on the CPU, by kernel and plugin, and what speaks against each."""
    return {f"{entry.backend.kernel} from {entry.plugin}": entry.problem for entry in load().backends}


def test_our_own_kernels_come_through_the_hook() -> None:
    ours = {name.split(" from ")[0] for name in kernels()}
    assert {"sdpa", "transformers:eager", "transformers:sdpa"} <= ours
    assert load().broken == ()
    assert find("cpu", "sdpa").kernel == "sdpa"


def test_auto_takes_the_highest_priority_of_the_device() -> None:
    for device in ("cpu", "npu"):
        found = candidates(device, "auto")
        assert found[0].kernel == "sdpa"
        priorities = [backend.priority for backend in found]
        assert priorities == sorted(priorities, reverse=True)


def test_an_unknown_kernel_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(BackendError, match=r"unknown backend 'flsh' on cpu\. Installed kernels that can be used: sdpa"):
        find("cpu", "flsh")


def test_a_kernel_that_is_unavailable_is_refused_with_its_reason() -> None:
    with pytest.raises(BackendError, match=r"'transformers:flex_attention' on cpu cannot be used: its mask does not"):
        find("cpu", "transformers:flex_attention")


def test_a_third_party_kernel_is_found_by_its_entry_point_and_trains(install: Install) -> None:
    source = (THIRD_PARTY / "good" / "third_party_good.py").read_text()
    assert len(source.splitlines()) < 40
    install("good")
    for loss_error, gradient_error, report in run_ranks(2, train_on, "written-out"):
        assert loss_error < 1e-6
        assert gradient_error < 1e-5
        assert "kernel 'written-out'" in report


@pytest.mark.parametrize("kernel", ["transformers:eager", "transformers:sdpa"])
def test_transformers_own_functions_train(kernel: str) -> None:
    for loss_error, gradient_error, _ in run_ranks(2, train_on, kernel):
        assert loss_error < 1e-6
        assert gradient_error < 1e-5


def test_broken_plugins_are_recorded_and_break_nothing(install: Install) -> None:
    install("good", "broken_import", "broken_hook", "broken_answer")
    assert kernels()["written-out from third-party-good 1.0 (good)"] is None
    reasons = {str(broken.plugin): broken.reason for broken in load().broken}
    assert reasons == {
        "third-party-broken-import 1.0 (broken_import)": "ModuleNotFoundError: No module named "
        "'package_that_does_not_exist'",
        "third-party-broken-hook 1.0 (broken_hook)": reasons["third-party-broken-hook 1.0 (broken_hook)"],
        "third-party-broken-answer 1.0 (broken_answer)": "TypeError: third_party_broken_answer returned 'cuda' "
        "among its backends",
    }
    assert "unknown hook 'sp_attention_backend'" in reasons["third-party-broken-hook 1.0 (broken_hook)"]
    assert find("cpu", "sdpa").kernel == "sdpa"
    with pytest.raises(BackendError, match=r"unknown backend 'x'.*broken_import\) is broken: ModuleNotFoundError"):
        find("cpu", "x")


OFFER = "import sp_attention\n@sp_attention.hookimpl\ndef sp_attention_backends():\n    return "
PANIC = "class PanicException(BaseException): pass\nraise PanicException('index out of bounds')"
# What a third-party plugin does instead of offering backends, and the reason that is kept.
FAULTS = {
    "ends_the_process": ("import sys; sys.exit('no GPU here')", "SystemExit: no GPU here"),
    "panics": (PANIC, "PanicException: index out of bounds"),
    "no_code": ("def sp_attention_backends(:", "SyntaxError: "),
    "no_hook": ("", "TypeError: no_hook does not implement the hook sp_attention_backends"),
    "nothing": (OFFER + "None", "TypeError: nothing returned None instead of backends"),
    "a_number": (OFFER + "7", "TypeError: a_number returned 7 instead of backends"),
    "no_name": (
        OFFER + "[sp_attention.Backend('cpu', None, print)]",
        "TypeError: no_name returned a backend whose kernel is None",
    ),
    "no_function": (
        OFFER + "[sp_attention.Backend('cpu', 'fast', 'fast')]",
        "TypeError: no_function returned a backend whose attend is 'fast'",
    ),
    "availability_as_a_flag": (
        OFFER + "[sp_attention.Backend('cpu', 'fast', print, unavailable=False)]",
        "TypeError: availability_as_a_flag returned a backend whose unavailable is False",
    ),
    "raises_late": (
        OFFER + "(1 // 0 for _ in range(2))",
        "ZeroDivisionError: integer division or modulo by zero",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_a_plugin_does_is_a_reason_and_the_library_works(
    fault: str, write_plugin: Callable[[str, str], None]
) -> None:
    source, reason = FAULTS[fault]
    write_plugin(fault, source)
    (broken,) = load().broken
    assert str(broken.plugin) == f"{fault} 1.0 ({fault})"
    assert broken.reason.startswith(reason)
    assert candidates("cpu", "auto")[0].kernel == "sdpa"
    assert all(problem is None for name, problem in kernels().items() if name.startswith("sdpa from"))


def test_an_interrupt_while_a_plugin_loads_is_the_users(write_plugin: Callable[[str, str], None]) -> None:
    write_plugin("interrupted", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load()


def test_a_slow_plugin_costs_its_time_once(write_plugin: Callable[[str, str], None]) -> None:
    write_plugin("slow", f"import time; time.sleep(1.5)\n{OFFER}[sp_attention.Backend('cpu', 'slow', print)]")
    start = monotonic()
    assert find("cpu", "slow").kernel == "slow"
    loaded = monotonic()
    assert find("cpu", "slow").kernel == "slow"
    assert loaded - start > 1.5 > monotonic() - loaded


def test_two_broken_plugins_and_a_duplicate_leave_the_library_as_it_was(install: Install) -> None:
    install("good", "duplicate", "broken_import", "broken_answer")
    assert len(load().broken) == 2
    assert sum("several plugins offer it" in (problem or "") for problem in kernels().values()) == 4
    for loss_error, gradient_error, report in run_ranks(2, train_on, "auto"):
        assert loss_error < 1e-6
        assert gradient_error < 1e-5
        assert "kernel 'sdpa'" in report


def test_a_reason_is_what_asking_for_the_kernel_raises(install: Install) -> None:
    install("good")
    with pytest.raises(BackendError, match=r"backend 'not-here' on cpu cannot be used: it needs a moon; wait for one"):
        find("cpu", "not-here")
    with pytest.raises(BackendError, match=r"unknown backend 'written-out' on cuda \(it exists on cpu\)"):
        find("cuda", "written-out")


def test_a_name_taken_twice_is_refused_and_our_own_cannot_be_taken(install: Install) -> None:
    install("good", "duplicate")
    both = "third-party-duplicate 1.0 (duplicate), third-party-good 1.0 (good)"
    twice = f"several plugins offer it, {both}: uninstall all but one"
    assert kernels()["written-out from third-party-duplicate 1.0 (duplicate)"] == twice
    with pytest.raises(BackendError, match=r"several plugins offer it, third-party-duplicate 1\.0"):
        find("cpu", "written-out")
    assert find("cpu", "sdpa").attend.__module__ == "sp_attention.kernels.sdpa"
    assert find("cpu", "transformers:eager").attend.__module__ == "sp_attention.kernels.transformers"


def ask_on_ranks(kernel: str) -> str:
    with pytest.raises(BackendError) as refusal:
        sp_attention.enable(MODELS["llama-tied"].build(torch.float32), backend=kernel)
    return str(refusal.value)


@pytest.mark.parametrize("kernel", ["flsh", "transformers:flash_attention_2"])
def test_every_rank_gets_the_same_refusal(kernel: str) -> None:
    first, second = run_ranks(2, ask_on_ranks, kernel)
    assert first == second
    assert kernel in first
