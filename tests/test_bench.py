"""`sp-attention bench` as a user runs it, in small; no time is asserted."""

import json
from pathlib import Path

from test_cli import run


def test_exchange_measures_ours_over_the_limit(tmp_path: Path) -> None:
    ran = run("bench", "exchange", "--quick", "--ranks", "2", "--rounds", "3", "--out", str(tmp_path), "--json")
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
