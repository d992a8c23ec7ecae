"""`sp-attention bench` as a user runs it, in small; no time is asserted."""

import json
from pathlib import Path

import pytest
from contenders import require_step_of_one_process
from helpers import run_command

from sp_attention.cli.benchmarks import exchange, memory, training
from sp_attention.cli.benchmarks.record import markdown

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [training.OURS, training.OURS_LONG])
def test_a_training_step_of_ours_is_that_of_one_process(name: str) -> None:
    require_step_of_one_process(name)


def test_exchange_measures_ours_over_the_limit(tmp_path: Path) -> None:
    ran = run_command("bench", "exchange", "--quick", "--ranks", "2", "--rounds", "3", "--out", str(tmp_path), "--json")
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)
    assert record == json.loads((tmp_path / "exchange.json").read_text())
    (case,) = record["cases"]
    assert case["case"] == {"ranks": 2, "dtype": "bfloat16", "length": 2048, "kv_heads": 4}
    assert {"all-to-all", "sp-attention"} <= set(case["seconds"])
    assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in case["seconds"].values())
    assert set(case["seconds"]) | set(record["absent"]) == {
        "all-to-all", "sp-attention", "veomni", "ms-swift", "yunchang", "deepspeed", "verl",
    }  # fmt: skip
    assert (tmp_path / "exchange.png").read_bytes().startswith(b"\x89PNG")


def test_memory_measures_each_rank_and_one_process() -> None:
    ran = run_command("bench", "memory", "--model", "1M", "--length", "1024", "--ranks", "2", "--json")
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)
    peaks = {(one["name"], one["ranks"]): one["each"] for one in record["peaks"]}
    assert {("one process", 1), ("sp-attention", 2)} <= set(peaks)
    assert all(len(each) == ranks for (_, ranks), each in peaks.items())
    assert all(0 < one["start"] < one["peak"] for each in peaks.values() for one in each)
    (table,) = memory.tables(record)
    assert table.title == "Peak resident memory of training, a Llama of 1M parameters, float32"
    assert table.rows[0][4] == "1.00"


def test_memory_can_be_measured_with_an_attention_that_computes_nothing() -> None:
    ran = run_command("bench", "memory", "--model", "1M", "--length", "1024", "--no-attention", "--json")
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)
    assert {one["name"] for one in record["peaks"]} >= {"one process", "sp-attention"}
    (table,) = memory.tables(record)
    assert table.title.endswith("a Llama of 1M parameters, float32, with an attention that computes nothing")


def test_scale_tells_what_a_layer_costs_one_of_many_ranks() -> None:
    ran = run_command("bench", "scale", "--ranks", "8", "--rounds", "1", "--json")
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)
    for one, heads in zip(record["cases"], ((1024, 1024, 8), (128, 8, 128)), strict=True):
        query, kv, size = heads
        # All that is exchanged but the eighth that stays, in float32; queries, keys, values and output, and gradients.
        assert one["sent"] == one["received"] == 2 * 2 * (query + kv) * size * 4 * 7 / 8
        assert one["collectives"] == ["alltoall_base"] * 4


def test_the_table_shows_ratios_and_who_is_absent() -> None:
    record = {
        "rounds": 3,
        "absent": {"verl": "not installed: pip install verl"},
        "cases": [
            {
                "case": {"ranks": 2, "dtype": "bfloat16", "length": 2048, "kv_heads": kv_heads},
                "seconds": {"all-to-all": [0.1, 0.2, 0.3], "sp-attention": [0.2, 0.4, 0.6]},
            }
            for kv_heads in (4, 16)
        ],
    }
    means, each = exchange.tables(record)
    assert means.rows == (("sp-attention", "2.00", "2.00 to 2.00"),)
    assert means.notes == ("verl: not installed: pip install verl",)
    assert each.rows[0] == ("P 2, bfloat16, S 2048, Hkv 4", "200.0 ms", "2.00 (1.50 to 2.50)")
    assert markdown(each).splitlines()[2:4] == ["|  | all-to-all | sp-attention |", "| --- | --- | --- |"]


def test_memory_finds_the_longest_sequence_within_a_limit() -> None:
    # A torch that is built for CUDA takes half a GiB by itself.
    far = 2**22
    lengths = [argument for length in (256, 1024, far) for argument in ("--length", str(length))]
    ran = run_command("bench", "memory", "--model", "1M", *lengths, "--limit", "1.2", "--json")
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)
    ours = record["longest"][0]
    assert (ours["name"], ours["ranks"], ours["length"]) == ("sp-attention, checkpointing", 2, 1024)
    peaks = {one["length"]: one["peak"] for one in ours["trials"]}
    assert peaks.keys() == {1024, far}
    assert 2**27 < peaks[1024] < 1.2 * 2**30
    assert peaks[far] is None
    (table,) = memory.tables(record)
    assert table.rows[0][2] == "1024"
    assert table.rows[0][3].endswith(f" MiB, {far}: more")
