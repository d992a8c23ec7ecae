"""Loops of one's own with `deepspeed.initialize`: weights, losses and gradient norms are those of one process."""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import LLAMA, batch_of
from torch import Tensor, nn

import sp_attention
from sp_attention.launch import run_ranks

STEPS = 5
STAGES = (0, 1, 2, 3)


def batch(step: int, part: int, group: int) -> dict[str, Tensor]:
    """One of a group's batches of a step: all differ in length and in how many targets they have."""
    made = batch_of("left-padded", 17 + 5 * (step % 4) + 3 * part + 2 * group)
    made["labels"][1, : 2 + 4 * part + group] = -100
    return made


def targets(batches: list[dict[str, Tensor]]) -> int:
    return sum(int((F.pad(each["labels"], (0, 1), value=-100)[:, 1:] != -100).sum()) for each in batches)


# Whether enable() comes before the engine; whether each batch counts alike, or each token; what there is besides.
OFFLOADED, TILES = "optimizer offloaded", "loss and MLP in tiles"
WAYS = [
    ("before", "tokens", ""),
    ("after", "tokens", ""),
    ("before", "batches", ""),
    ("before", "tokens", OFFLOADED),
    ("before", "tokens", TILES),
    ("after", "batches", TILES),
]
CASES = [case for case in product(STAGES, (1, 3), WAYS) if case[0] or case[2][2] != OFFLOADED]


@cache
def one_process(groups: int, accumulation: int, weighs: str) -> tuple[list[float], list[float], list[Tensor]]:
    """The mean loss, gradient norm and weights of every step, in float64 without DeepSpeed."""
    model = LLAMA.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms, after = [], [], []
    for step in range(STEPS):
        batches = [batch(step, part, group) for part in range(accumulation) for group in range(groups)]
        if weighs == "tokens":
            each = [model(**one, num_items_in_batch=targets(batches)).loss for one in batches]
        else:
            each = [model(**one).loss / len(batches) for one in batches]
        loss = torch.stack(each).sum()
        loss.backward()
        losses.append(loss.item())
        norms.append(float(nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])))
        optimizer.step()
        optimizer.zero_grad()
        after.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    return losses, norms, after


def engines(sp_size: int) -> dict[Any, Any]:
    """Every case: the group's losses, gradient norms and weights of every step, and what enable() found."""
    from zero import dtype_of, launched, ranks_of_group, weights, zero

    launched()
    groups, group = ranks_of_group(sp_size)
    found = {}
    for stage, accumulation, way in CASES:
        when, weighs, besides = way
        model = LLAMA.build(dtype_of(stage))
        start = zero(stage, accumulation, **({"offload_optimizer": {"device": "cpu"}} if besides == OFFLOADED else {}))
        engine = None if when == "before" else start(model)
        tiles: dict[str, Any] = {"loss_tile": 5, "mlp_tile": 4} if besides == TILES else {}
        handle = sp_attention.enable(engine or model, backend="sdpa", sp_size=sp_size, **tiles)
        engine = engine or start(model)
        losses, norms, after = [], [], []
        for step in range(STEPS):
            batches = [batch(step, part, one) for part in range(accumulation) for one in range(groups)]
            total = 0.0
            for part in range(accumulation):
                mine = batch(step, part, group)
                if weighs == "tokens":
                    # Times the groups, over which gradients are averaged. It has to be a new tensor: in stage 0 the
                    # engine divides the model's own by the accumulation steps whatever it is told.
                    loss = engine(**mine, num_items_in_batch=targets(batches)).loss * groups
                    engine.backward(loss, scale_wrt_gas=False)
                    total += loss.item()
                else:
                    loss = engine(**mine).loss
                    engine.backward(loss)
                    total += loss.item() / accumulation
                engine.step()
            losses.append(total)
            norms.append(engine.get_global_grad_norm())
            after.append(weights(model))
        found[stage, accumulation, way] = losses, norms, after, handle.report()
        engine.destroy()
    return found


@cache
def runs(groups: int) -> list[dict[Any, Any]]:
    return run_ranks(2 * groups, engines, 2, timeout=600)


@pytest.mark.parametrize("groups", [1, 2], ids="{}-groups".format)
@pytest.mark.parametrize(("stage", "accumulation", "way"), CASES)
def test_steps_are_those_of_one_process(groups: int, stage: int, accumulation: int, way: tuple[str, str, str]) -> None:
    losses, norms, after = one_process(groups, accumulation, way[1])
    found = [ranks[stage, accumulation, way] for ranks in runs(groups)]
    of_groups = [torch.tensor(each[0], dtype=torch.float64) for each in found[::2]]
    assert torch.stack(of_groups).mean(0).tolist() == pytest.approx(losses, rel=1e-6)
    for rank, (its_losses, its_norms, its_weights, report) in enumerate(found):
        assert its_losses == found[rank // 2 * 2][0]
        # DeepSpeed has none in stage 0.
        assert its_norms == ([None] * STEPS if stage == 0 else pytest.approx(norms, rel=1e-6))
        for ours, expected in zip(its_weights, after, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
        assert torch.equal(its_weights[-1], found[0][2][-1])
        assert "logits stay sharded" in report
        assert [f"{tile} tokens at a time" in report for tile in (4, 5)] == [way[2] == TILES] * 2
        assert "cuts and gathers on its own" not in report


def partitioned(folder: Path) -> dict[str, Any]:
    """A model whose weights are cut up while it is loaded: what is said of it, and one step of it as it should be."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig
    from zero import config, dtype_of, launched, weights, zero

    launched()
    keep = HfDeepSpeedConfig(config(3))  # transformers asks for it while it loads
    found: dict[str, Any] = {}
    for when in ("within", "after"):
        model = type(LLAMA.build()).from_pretrained(folder, dtype=dtype_of(3)).train()
        assert {parameter.numel() for parameter in model.parameters()} == {0}
        engine = None
        if when == "within":
            for proof in (True, False):
                with pytest.raises(sp_attention.UnsupportedError) as error:
                    sp_attention.enable(model, backend="sdpa", rehearse=proof)
                found["refused", proof] = str(error.value)
            with deepspeed.zero.GatheredParameters(model.parameters()):
                sp_attention.enable(model, backend="sdpa")
            assert {parameter.numel() for parameter in model.parameters()} == {0}
        else:
            engine = zero(3)(model)
            sp_attention.enable(model, backend="sdpa")
        engine = engine or zero(3)(model)
        before = weights(model)
        engine.backward(engine(**batch(0, 0, 0)).loss)
        engine.step()
        found[when] = before, weights(model)
        engine.destroy()
    assert keep.is_zero3()
    return found


def test_a_partitioned_model_is_enabled_with_its_weights_gathered(tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path)
    start = torch.cat([parameter.detach().flatten() for parameter in LLAMA.build().parameters()])
    expected = one_process(1, 1, "batches")[2][0]
    first, second = run_ranks(2, partitioned, tmp_path, timeout=200)
    for found in (first, second):
        for when in ("within", "after"):
            torch.testing.assert_close(found[when][0], start, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(found[when][1], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
        for proof in (True, False):
            assert found["refused", proof] == (
                "the weights of this LlamaForCausalLM are partitioned by DeepSpeed's ZeRO-3 and no engine gathers them "
                "yet, so nothing can be proven: call enable() within "
                "deepspeed.zero.GatheredParameters(model.parameters()), which holds them whole on every rank as long, "
                "or after deepspeed.initialize()"
            )


def by_rank() -> str:
    """What is said where DeepSpeed's own loader, which cuts data by rank, feeds a group."""
    import deepspeed
    from zero import config, launched

    launched()
    model = LLAMA.build(torch.float32)
    sp_attention.enable(model, backend="sdpa")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = [{name: tensor[0] for name, tensor in batch_of("plain", 20 + 2 * row).items()} for row in range(4)]
    rows = [{name: tensor[:20] for name, tensor in row.items()} for row in rows]
    engine, _, loader, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(1), training_data=rows)
    with pytest.raises(sp_attention.errors.BatchError) as error:
        engine(**next(iter(loader)))
    return str(error.value)


def test_batches_of_deepspeeds_own_loader_are_an_error_on_every_rank() -> None:
    first, second = run_ranks(2, by_rank, timeout=120)
    assert first == second
    assert "input_ids differs on rank 1 from rank 0" in first


def saved(folder: Path, sp_size: int | None) -> dict[str, Any]:
    """What engines in every stage save after a step, and weights before and after they are loaded."""
    from zero import dtype_of, launched, weights, zero

    launched()
    found = {}
    for stage in STAGES:
        place = folder / str(stage)

        def started(stage: int = stage, enabled: bool = sp_size is not None) -> tuple[nn.Module, Any]:
            model = LLAMA.build(dtype_of(stage))
            if enabled:
                sp_attention.enable(model, backend="sdpa", sp_size=sp_size)
            return model, zero(stage, stage3_gather_16bit_weights_on_model_save=True)(model)

        model, engine = started()
        engine.backward(engine(**batch(0, 0, 0)).loss)
        engine.step()
        engine.save_checkpoint(place, tag="step")
        engine.save_16bit_model(place, "model.bin")
        dist.barrier()  # One rank writes it.
        files = sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file())
        weights_saved = torch.load(place / "model.bin")
        after = weights(model)
        engine.destroy()
        plain, engine = started(enabled=False)
        engine.load_checkpoint(place, tag="step")
        found[stage] = files, weights_saved, after, weights(plain)
        engine.destroy()
    return found


def test_what_is_saved_is_what_it_is_without_sequence_parallelism(tmp_path: Path) -> None:
    without = run_ranks(2, saved, tmp_path / "without", None, timeout=200)
    within = run_ranks(2, saved, tmp_path / "within", 2, timeout=200)
    for rank, stage in product((0, 1), STAGES):
        files, tensors, after, loaded = within[rank][stage]
        expected_files, expected, *_ = without[rank][stage]
        assert files == expected_files
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            name: tensor.dtype for name, tensor in expected.items()
        }
        torch.testing.assert_close(tensors, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(loaded, after)
