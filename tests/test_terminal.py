"""What the command line prints fits a terminal: no word is broken, nothing is cut, and a pipe gets whole lines."""

import fcntl
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Callable

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from sp_attention.cli import cli, terminal
from sp_attention.cli.benchmarks.record import Table, show
from sp_attention.cli.outcomes import Comparison, Verdict
from sp_attention.cli.verify import Verified, _show

Narrow = Callable[[int | None], None]
WIDTHS = (80, 120)
SCREENS = 2 * 24
WORDS = st.text("abc-:", min_size=1, max_size=9)
CELLS = st.lists(WORDS, max_size=6).map(" ".join)
TABLES = st.integers(1, 6).flatmap(
    lambda columns: st.lists(st.lists(CELLS, min_size=columns, max_size=columns), min_size=1, max_size=4)
)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Narrow:
    """Standard output is a terminal with so many columns, or a pipe."""
    return lambda columns: monkeypatch.setattr(terminal, "width", lambda: columns)


def words(text: str) -> set[str]:
    return set(text.replace("─", "").split())


@given(TABLES, st.integers(20, 80))
def test_a_table_keeps_every_word_and_its_width(cells: list[list[str]], limit: int) -> None:
    lines = list(terminal.table(cells, limit))
    assert words(" ".join(lines)) == words(" ".join(cell for row in cells for cell in row))
    assert max(map(len, lines)) <= limit
    whole = list(terminal.table(cells, None))
    assert len(whole) == len(cells) + 1


@given(CELLS, st.integers(12, 80), st.sampled_from(["", "  "]))
def test_a_sentence_folds_between_words(sentence: str, limit: int, indent: str) -> None:
    lines = terminal.text(sentence, limit, indent)
    assert " ".join(lines).split() == sentence.split()
    assert max(map(len, lines)) <= limit
    assert terminal.text(sentence, None, indent) == [indent + sentence]


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_width_is_that_of_the_terminal(columns: int) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    code = "from sp_attention.cli import terminal; print(terminal.width())"
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    subprocess.run([sys.executable, "-c", code], stdout=theirs, env=environment, check=True)
    assert int(os.read(ours, 100)) == columns
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert piped.stdout == "None\n"


BROKEN = "raise RuntimeError('''the driver is too old:\n  install version 7 of it, then build this anew''')"


@pytest.mark.parametrize("command", ["backends", "doctor"])
def test_kernels_and_reasons_fit_two_screens(
    command: str, narrow: Narrow, write_plugin: Callable[[str, str], None]
) -> None:
    write_plugin("broken_for_" + command, BROKEN)
    shown = {}
    for columns in (*WIDTHS, None):
        narrow(columns)
        ran = CliRunner().invoke(cli, [command], standalone_mode=False)
        assert ran.exception is None
        shown[columns] = ran.stdout
    reason = "RuntimeError: the driver is too old: install version 7 of it, then build this anew"
    assert any(reason in line for line in shown[None].splitlines())
    for columns in WIDTHS:
        lines = shown[columns].splitlines()
        assert max(map(len, lines)) <= columns
        assert len(lines) <= SCREENS
        assert words(shown[columns]) == words(shown[None])


@pytest.mark.parametrize("columns", WIDTHS)
def test_what_verify_found_fits(columns: int, narrow: Narrow, capsys: pytest.CaptureFixture[str]) -> None:
    of = "gradient of model.layers.0.self_attn.q_proj.weight"
    why = "a sentence that is longer than the terminal is wide, as reasons are, and says in the end what is to be done"
    kinds = ("plain", "left-padded", "packed", "left-padded, reentrant-checkpointing")
    verdicts = (*(Verdict(kind, "exact", 1e-8, of) for kind in kinds), Verdict("packed, frozen", "refused", reason=why))
    comparison = Comparison(verdicts, "sdpa", parts={"head-parallel": ["self_attn"]})
    narrow(columns)
    _show(Verified(comparison, "LlamaForCausalLM", "causal-lm", "float64", 42000), 2)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) <= SCREENS
    assert why in " ".join(" ".join(lines).split())


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_benchmark_beside_others_fits(columns: int, narrow: Narrow, capsys: pytest.CaptureFixture[str]) -> None:
    contenders = ("sp-attention", "veomni", "ms-swift", "yunchang", "deepspeed", "verl")
    rows = tuple((f"P 2, float32, S {2**i}, Hkv 4", "7.6 ms", *["1.51 (1.39 to 1.80)"] * 6) for i in range(8))
    narrow(columns)
    show(Table("Each case: median and quartiles", ("", "all-to-all", *contenders), rows, ("verl: not installed",)))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert len(out.splitlines()) <= SCREENS
    assert words(out) >= {"1.51", "(1.39", "to", "1.80)", "float32,", *contenders}
