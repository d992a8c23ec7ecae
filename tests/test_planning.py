"""`sp-attention plan`: what is told of a step from a configuration alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import as_launched
from transformers import LlamaConfig, LlamaForCausalLM

import sp_attention
from sp_attention.cli import cli, terminal
from sp_attention.cli.benchmarks.predicted import Case, tables
from sp_attention.cli.planning import peaks
from sp_attention.cli.planning.choosing import LADDER, Model, Option, Wanted, best, options
from sp_attention.cli.planning.dry_run import Share, parts_of_step
from sp_attention.cli.planning.engines import ENGINES, held, sent
from sp_attention.cli.planning.lengths import _beyond, model_of
from sp_attention.cli.planning.lines import lines
from sp_attention.cli.planning.live import Live
from sp_attention.cli.planning.meta_model import MetaModel, NotPlannableError, meta_model
from sp_attention.cli.planning.peaks import Held, Parts, Phases, peak
from sp_attention.cli.planning.subject import configuration, size, tokens
from sp_attention.launch import run_ranks

SIZES = "hidden=64,layers=2,heads=4,kv_heads=2,intermediate=128,vocab=512"
MIB = 2**20


def phases(kept: int, most: int, gradients: int = 0) -> Phases:
    return Phases({peaks.LAYER: most}, {peaks.LAYER: kept}, {peaks.LAYER: most}, 2, gradients, {1: 3}, {1: 5})


PARTS = Parts({0: phases(10, 15, 4)}, {0: phases(2, 20, 4)}, phases(6, 30, 7), hidden=2, batch=1, embedding=9)


@pytest.mark.parametrize(
    ("checkpointing", "offload", "total", "name"),
    [
        # weights 100, batch 1; the loss' backward is 30 above hidden states and what three layers keep.
        (False, False, 100 + 1 + 2 + 3 * 10 + 30, "loss"),
        (True, False, 100 + 1 + 2 + 3 * 2 + 30, "loss"),
        # With inputs in CPU memory, gradients of all that is behind it make the first layer's backward the fullest.
        (True, True, 100 + 1 + 2 + (7 + 2 * 4) + 20, "backward of layer 0"),
    ],
)
def test_the_peak_is_that_of_the_fullest_moment(checkpointing: bool, offload: bool, total: int, name: str) -> None:
    moment = peak(Held(100, 0, 0, None), (0, 0, 0), PARTS, checkpointing=checkpointing, offload=offload)
    assert (moment.total, moment.name) == (total, name)
    assert moment.parts.get(peaks.LOGITS, 0) == (30 if name == "loss" else 0)


def test_gradients_come_with_backward_or_are_there_from_the_start() -> None:
    late = peak(Held(0, 0, 0, None), (0,) * 9, Parts({0: phases(0, 1, 50)}, {}, phases(0, 1, 7), 0, 0, 9),
                checkpointing=False, offload=False)  # fmt: skip
    assert late.name == "backward of the embedding"
    assert late.parts[peaks.GRADIENTS] == 7 + 9 * 50 + 9
    early = peak(Held(0, 0, 0, 500), (0,), PARTS, checkpointing=False, offload=False)
    assert early.parts[peaks.GRADIENTS] == 500


def test_bytes_alive_are_counted_until_nobody_holds_them() -> None:
    live = Live()
    with torch.device("meta"), live:
        live.begin()
        one = torch.empty(100, dtype=torch.uint8)
        view, two = one.view(10, 10), torch.empty(50, dtype=torch.uint8)
        live.are(peaks.ATTENTION, [view])
        del two
        three = torch.empty(20, dtype=torch.uint8)
        assert +live.now == Counter({peaks.ATTENTION: 100, peaks.LAYER: 20})
        assert live.most.total() == 150
        del one, three
        assert live.now.total() == 100
        del view
        assert live.now.total() == 0


def test_beyond_dry_runs_bytes_grow_along_a_line() -> None:
    low, high = ({"a": 10, "b": 5}, 7), ({"a": 30, "b": 5, "c": 4}, 9)
    assert _beyond(low[0], high[0], 2.0) == {"a": 70, "b": 5, "c": 12}
    assert _beyond(low[1], high[1], 0.5) == 10


@pytest.fixture(scope="module")
def meta() -> MetaModel:
    return meta_model(configuration(SIZES), torch.float32)


def test_weights_are_counted_exactly(meta: MetaModel) -> None:
    settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    real = LlamaForCausalLM(LlamaConfig(**settings, intermediate_size=128, vocab_size=512))
    assert meta.parameters == real.num_parameters()
    assert meta.kinds[0].parameters == sum(one.numel() for one in real.model.layers[0].parameters())
    assert (meta.layers, meta.stack, meta.kinds[0].heads) == ((0, 0), "model.layers", (4, 2))


def test_what_travels_is_what_ulysses_sends(meta: MetaModel) -> None:
    layer = parts_of_step(meta, Share(1, 256, 2)).layers[0]
    # Of 128 tokens, the queries, keys and values of the other's heads, and the output; float32, heads of 16.
    there = 128 * (2 + 1 + 1 + 2) * 16 * 4
    assert (dict(layer.sent), dict(layer.sent_back)) == ({1: there}, {1: there})


def test_what_a_rank_keeps_shrinks_with_ranks(meta: MetaModel) -> None:
    parts = {ranks: parts_of_step(meta, Share(1, 4096, ranks)) for ranks in (1, 2)}
    one, two = (sum(parts[ranks].layers[0].kept.values()) for ranks in (1, 2))
    assert 0.45 < two / one < 0.6
    assert sum(parts[2].again[0].kept.values()) == 2048 * 64 * 4
    # One process has all logits, in float32, more than once.
    assert sum(parts[1].end.backward.values()) > 2 * 4096 * 512 * 4


def test_tiles_take_less_than_whole_mlps(meta: MetaModel) -> None:
    whole, tiled = (parts_of_step(meta, Share(1, 8192, 2, tile)).layers[0] for tile in (None, 512))
    assert sum(tiled.kept.values()) < 0.7 * sum(whole.kept.values())


def test_hybrids_have_two_kinds_of_layers_that_exchange() -> None:
    meta = meta_model(Case("Qwen3-Next", 256, False).config(), torch.float32)
    assert meta.layers == (0, 0, 0, 1)
    assert [(bool(kind.calls), kind.heads) for kind in meta.kinds.values()] == [(True, None), (False, (4, 2))]
    parts = parts_of_step(meta, Share(1, 256, 2))
    # Of 128 tokens: queries and keys of 2 heads, values and results of 4, and two numbers for each of these.
    assert parts.layers[0].sent[1] >= 4 * 128 * (2 * 2 * 32 + 2 * 4 * 32 + 4 * 2)
    assert sum(parts.layers[1].sent.values()) == 4 * 128 * (2 + 1 + 1 + 2) * 32


def test_mixtures_of_experts_keep_their_router_whole() -> None:
    meta = meta_model(Case("Qwen3-MoE", 256, False).config(), torch.float32)
    assert [type(one).__name__ for one in meta.kinds[0].tileable] == ["Qwen3MoeRMSNorm", "Qwen3MoeRMSNorm"]
    # Norms alone are nothing that `enable(mlp_tile=…)` takes.
    assert not model_of(meta).tiles
    layer = parts_of_step(meta, Share(1, 256, 2)).layers[0]
    assert layer.gradients == 4 * meta.kinds[0].parameters


@pytest.mark.parametrize(("words", "number"), [("131072", 131072), ("128K", 131072), ("1m", 2**20)])
def test_tokens_have_units(words: str, number: int) -> None:
    assert tokens(words) == number


@pytest.mark.parametrize(("words", "number"), [("80GB", 80 * 10**9), ("40gib", 40 * 2**30), ("0.5TB", 5 * 10**11)])
def test_memory_has_units(words: str, number: int) -> None:
    assert size(words) == number


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("no_such_type", "is no folder, and no type of models of transformers"),
        ("hidden=64,wide=3", "'wide' is no size; these are: hidden, layers"),
        ("hidden=64,layers=many", "layers='many' is no number"),
        ("hidden=64,layers=2", "these sizes are missing: heads, intermediate, vocab"),
    ],
)
def test_what_is_no_configuration_is_refused(words: str, reason: str) -> None:
    with pytest.raises(NotPlannableError, match=reason):
        configuration(words)


def test_a_folder_needs_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(NotPlannableError, match=r"has no config\.json"):
        configuration(str(tmp_path))
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path)
    assert configuration(str(tmp_path)).hidden_size == 64


def test_a_model_without_a_causal_head_is_refused() -> None:
    with pytest.raises(NotPlannableError, match="no causal language model of type 'vit'"):
        meta_model(configuration("vit"), torch.float32)


def test_engines_cut_what_they_say() -> None:
    whole, cut = (held(ENGINES[name], 1000, (100,) * 8, 4) for name in ("ddp", "fsdp2"))
    assert (whole.weights, whole.gradients, whole.optimizer) == (2000, 2000, 4000)
    assert (cut.weights, cut.gradients, cut.optimizer) == (1000, 1000, 2000)
    # Two layers and the 200 parameters of none in bfloat16, and gradients of the 200 in float32.
    assert cut.engine == 2 * (2 * 100 + 200) + 4 * 200
    assert sent(ENGINES["fsdp2"], 1000, 4) == (2 + 2 + 4) * 750


def choose(
    memory: int, engine: str = "fsdp2", heads: tuple[int, int] = (4, 2), per_machine: int = 4
) -> dict[int, Option]:
    """Of a model whose activations are 4 MiB a layer, by checkpointing 1."""
    wanted = Wanted(1024, 1, 8, per_machine, memory, ENGINES[engine])
    model = Model("Any", "model.layers", 1000, (0,) * 8, (100,) * 8, heads, 512)

    def parts_of(length: int, ranks: int, mlp_tile: int | None) -> Parts:
        each = length * 1024 // ranks
        tiled = each if mlp_tile is None else each // 2
        layers = {0: phases(4 * each, 4 * each)}
        return Parts(layers, {0: phases(each, 4 * tiled)}, phases(0, each), each, 0, 0)

    return dict(options(wanted, model, parts_of))


def test_the_fewest_savers_on_fewest_ranks_of_a_machine_are_taken() -> None:
    roomy = best(choose(64 * MIB))
    assert (roomy.sp_size, roomy.savers) == (1, LADDER[0])
    small = best(choose(12 * MIB))
    assert (small.sp_size, small.savers) == (4, LADDER[0])
    # Within a machine with savers, rather than across machines without.
    tight = choose(6 * MIB)
    assert tight[8].savers == LADDER[0]
    assert (best(tight).sp_size, best(tight).savers) == (1, LADDER[1])
    assert not best(choose(MIB // 4)).fits


def test_what_fits_is_as_long_as_is_told() -> None:
    option = best(choose(12 * MIB))
    assert option.peak(option.longest).total <= option.wanted.usable < option.peak(option.longest + 1024).total


def test_the_exchange_is_told_within_and_across_machines() -> None:
    found = choose(64 * MIB, per_machine=1)
    assert found[2].exchange() == type(found[2].exchange())(within=0, across=8 * (3 + 5))
    assert found[2].grid == (2, 1)
    assert found[8].grid == (4, 2)
    every = found[2].of_engine()
    assert (every.within, every.across) == (0, sent(ENGINES["fsdp2"], 1000, 8))


def _paste(engine: str) -> float:
    as_launched()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         intermediate_size=128, vocab_size=512))  # fmt: skip
    ids = torch.randint(512, (1, 33), generator=torch.Generator().manual_seed(0))
    option = choose(6 * MIB, engine)[2]
    assert option.savers.checkpointing
    names: dict[str, Any] = {
        "torch": torch, "sp_attention": sp_attention, "model": model, "batch": {"input_ids": ids, "labels": ids}
    }  # fmt: skip
    code = "\n".join(lines(option)).replace(", offload=True", "")  # which is refused on a CPU
    exec(code, names)
    with torch.no_grad():
        return float(names["model"](input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_the_lines_to_paste_train(engine: str) -> None:
    losses = run_ranks(2, _paste, engine)
    assert losses[0] == losses[1] > 0


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["plan", *arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def small() -> tuple[str, ...]:
    return SIZES, "--length", "2K", "--devices", "2", "--memory", "40MB"


def test_a_plan_fits_two_screens_and_a_pipe(small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for columns in (80, 120, None):
        monkeypatch.setattr(terminal, "width", lambda columns=columns: columns)
        ran = run(*small)
        assert ran.exception is None
        shown[columns] = ran.stdout
    for columns in (80, 120):
        found = shown[columns].splitlines()
        assert max(map(len, found)) <= columns
        assert len(found) <= 48
        assert set(shown[columns].replace("─", "").split()) == set(shown[None].replace("─", "").split())
    assert "sp_attention.enable(model, sp_size=" in shown[None]


def test_a_plan_is_json_and_a_plot(small: tuple[str, ...], tmp_path: Path) -> None:
    ran = run(*small, "--json", "--plot", str(tmp_path / "plan.png"))
    told = json.loads(ran.stdout)
    assert ran.return_value == 0
    assert told["peak"]["bytes"] == sum(told["peak"]["parts"].values()) <= told["wanted"]["usable"]
    assert [one["sp_size"] for one in told["sp_sizes"]] == [1, 2]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_predicted_is_told_over_what_is_measured() -> None:
    case = {"model": "Llama", "length": 4096, "ranks": 2, "checkpointing": True, "measured": 200 * MIB, "each": []}
    (table,) = tables({"cases": [{**case, "predicted": 190 * MIB, "when": "loss"}]})
    assert table.rows == (("Llama", "4,096", "2", "yes", "200 MiB", "190 MiB", "0.95", "loss"),)


def test_what_does_not_fit_has_its_exit_status() -> None:
    assert run(SIZES, "--length", "2K", "--devices", "1", "--memory", "1MB").return_value == 1


def test_what_cannot_be_planned_says_why() -> None:
    ran = run("no_such_type", "--length", "2K", "--devices", "1", "--memory", "1GB")
    assert ran.return_value == 2
    assert "no_such_type cannot be planned: 'no_such_type' is no folder" in ran.stderr
    ran = run("bert", "--length", "2K", "--devices", "1", "--memory", "80GB")
    assert (ran.return_value, "BertLMHeadModel does not run on 2048 tokens: " in ran.stderr) == (2, True)
