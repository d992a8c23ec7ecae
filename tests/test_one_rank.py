"""A process alone, with what takes less memory in training: the numbers of transformers alone, proven or refused."""

from typing import Any

import pytest
import torch.distributed as dist
from generating import MODELS as GENERATING
from generating import distance, generated, prompt
from helpers import ddp, largest_error, loss_step, slow_but
from models import LLAMA, MODELS, Tiny, batch_of
from test_mixers import MODELS as MIXERS
from test_offload import Elsewhere
from test_tiled_mlp import MLPS, is_in_tiles
from tiled import CASES, CHECKPOINTED, TILE, Case, error_of

import sp_attention
from sp_attention.launch import run_ranks
from sp_attention.loss.sharded_logits import ShardedLogits
from sp_attention.region import activation_checkpoint

# Without an engine, which needs a process group.
PLAIN = [name for name, case in CASES.items() if case.wrapped is not ddp and "ddp" not in name and "fsdp2" not in name]
QUICK = ("padded", "tied", "logits", "cut at the head", "checkpointed")


@pytest.mark.parametrize("name", slow_but(PLAIN, *QUICK))
def test_loss_and_mlps_in_tiles_give_the_gradients_of_transformers_alone(name: str) -> None:
    has_mlps = name != "experts"
    error, tokens, report = error_of(CASES[name], loss_tile=TILE, mlp_tile=4 if has_mlps else None)
    assert error < 1
    assert tokens <= (33 if CASES[name].computed.__name__ == "with_logits" else TILE) * 2
    assert report.startswith("sp_attention: one rank, which has whole sequences, kernel 'sdpa'")
    assert "logits are a ShardedLogits in training with labels, else whole" in report
    assert f"the loss makes those of {TILE} tokens at a time" in report
    assert ("4 tokens at a time in training" in report) == has_mlps
    assert not dist.is_initialized()


@pytest.mark.slow
def test_an_mlp_is_given_a_tile_of_tokens_at_a_time() -> None:
    error, tokens, report = error_of(MLPS["dense and experts"], mlp_tile=4, measured="act_fn")
    assert error < 1
    assert tokens <= 4
    assert is_in_tiles("mlp", report)


@pytest.mark.parametrize("name", CHECKPOINTED[:2])
def test_inputs_of_checkpointed_layers_are_saved_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_checkpoint, "save_on_cpu", Elsewhere)
    Elsewhere.saved.clear()
    error, *_ = error_of(CASES[name], loss_tile=TILE, mlp_tile=4, offloads=True)
    assert error < 1
    # Those of two layers in two forwards, of whole sequences.
    assert Elsewhere.saved == [(2, 33, 48)] * 2 + [(2, 20, 48)] * 2


HYBRID = {name: Case(tiny) for name, tiny in MIXERS.items() if name != "qwen3_next-2v1k"}


@pytest.mark.parametrize("name", slow_but(HYBRID, "lfm2"))
def test_mixers_are_left_to_the_model(name: str) -> None:
    tiled = {"mlp_tile": 4} if name == "lfm2" else {}
    error, *_ = error_of(HYBRID[name], loss_tile=TILE, **tiled)
    assert error < 1


@pytest.mark.slow
def test_an_encoder_and_a_decoder() -> None:
    tiny = GENERATING["t5"]
    case = Case(Tiny(tiny.cls, tiny.settings | {"dropout_rate": 0.0}))
    error, tokens, _ = error_of(case, mlp_tile=4, measured=".act")
    assert error < 1
    assert tokens <= 4


@pytest.mark.parametrize("name", slow_but(["llama-6q3kv", "gemma3-window5", "lfm2"], "llama-6q3kv"))
def test_it_generates_what_transformers_alone_does(name: str) -> None:
    reference, model = GENERATING[name].build().eval(), GENERATING[name].build().eval()
    sp_attention.enable(model, backend="sdpa", mlp_tile=4)
    ours, theirs = (generated(one, {"input_ids": prompt(one)}, do_sample=False) for one in (model, reference))
    assert distance(ours, theirs) < 1e-5


def test_disable_leaves_no_trace() -> None:
    model = LLAMA.build()
    before = dict(vars(model))
    with sp_attention.enable(model, backend="sdpa", loss_tile=TILE, mlp_tile=4) as handle:
        assert handle.peers is None
        assert (handle.data_parallel_size, handle.data_parallel_rank) == (1, 0)
        output = model(**batch_of("plain", 33))
        assert isinstance(output.logits, ShardedLogits)
        assert output.logits.whole().shape == (2, 33, 97)
    assert vars(model) == before
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(sp_attention.UnsupportedError, match="mlp_tile=4: no part of a layer of MixtralForCausalLM"):
        sp_attention.enable(MODELS["mixtral"].build(), mlp_tile=4)
    with pytest.raises(
        sp_attention.UnsupportedError, match="loss_tile=4: logits are whole: the model has no causal loss"
    ):
        sp_attention.enable(Tiny("LlamaForSequenceClassification").build(), loss_tile=4)
    with pytest.raises(ValueError, match="offload=True keeps tensors of a device in CPU memory"):
        sp_attention.enable(LLAMA.build(), offload=True)


def errors_of_ranks_alone() -> dict[str, Any]:
    """Of two ranks, each of which has whole sequences, with DDP."""
    reference, model = LLAMA.build(), LLAMA.build()
    handle = sp_attention.enable(model, backend="sdpa", sp_size=1, loss_tile=TILE, mlp_tile=4)
    place = handle.data_parallel_size, handle.data_parallel_rank
    return {"error": largest_error(reference, ddp(model), loss_step), "place": place, "report": handle.report()}


def test_each_rank_may_be_alone() -> None:
    for rank, found in enumerate(run_ranks(2, errors_of_ranks_alone)):
        assert found["error"] < LLAMA.tolerance
        assert found["place"] == (2, rank)
        assert found["report"].startswith("sp_attention: one rank, which has whole sequences")
