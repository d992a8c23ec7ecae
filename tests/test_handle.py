"""A model while it is enabled: beside other models, copied, saved."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import largest_error, loss_step, relative_error
from models import LLAMA, MODELS, batch_of
from tiled import checkpointed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

import sp_attention
from sp_attention.api import handle_of
from sp_attention.launch import run_ranks
from sp_attention.region.attn_implementation import configs
from sp_attention.region.versions import checkpoint_activations


def logits_of(model: PreTrainedModel, length: int) -> Tensor:
    with torch.no_grad():
        return model(batch_of("plain", length)["input_ids"]).logits


def several_models() -> bool:
    """Three models at once: two enabled with different kernels and groups, one not; called in turns."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    tinies = [LLAMA, MODELS["mistral-window5"], MODELS["qwen3"]]
    references, models = [tiny.build() for tiny in tinies], [tiny.build() for tiny in tinies]
    first = sp_attention.enable(models[0], backend="sdpa")
    second = sp_attention.enable(models[1], backend="transformers:eager", group=pairs[rank // 2])
    for length in (33, 20):
        for model, reference in zip(models, references, strict=True):
            torch.testing.assert_close(logits_of(model, length), logits_of(reference, length), rtol=1e-5, atol=1e-5)
    first.disable()
    for model, reference in zip(models, references, strict=True):
        torch.testing.assert_close(logits_of(model, 17), logits_of(reference, 17), rtol=1e-5, atol=1e-5)
    second.disable()
    return all(torch.equal(logits_of(m, 9), logits_of(r, 9)) for m, r in zip(models, references, strict=True))


def test_models_in_one_process_do_not_disturb_each_other() -> None:
    assert all(run_ranks(4, several_models))


def copies() -> bool:
    model, reference = LLAMA.build(), LLAMA.build()
    handle = sp_attention.enable(model, backend="sdpa")
    copied = copy.deepcopy(model)
    same = torch.allclose(logits_of(copied, 33), logits_of(reference, 33))
    handle.disable()
    # Another model's attention takes nothing's place.
    sp_attention.enable(LLAMA.build(), backend="sdpa")
    return same and torch.allclose(logits_of(copied, 33), logits_of(reference, 33))


def test_a_copy_of_an_enabled_model_is_exact_too() -> None:
    assert all(run_ranks(2, copies))


def traces_of(model: nn.Module) -> list[str]:
    """What `enable` has left in a model."""
    places = (
        "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    )  # fmt: skip
    found = [name for name in places for module in model.modules() for _ in getattr(module, name)]
    found += [name for module in model.modules() for name in vars(module) if "sp_attention" in name or "_loss" in name]
    return found + [name for config in configs(model) if (name := str(config._attn_implementation)) != "sdpa"]


def copied_and_trained(kind: str) -> dict[str, Any]:
    """A copy while the model is enabled, after that was disabled, and once it is disabled or enabled itself."""
    prepared = {
        "plain": lambda model: None,
        "checkpointing": lambda model: checkpoint_activations(model, {"use_reentrant": False}),
        "re-entrant": lambda model: checkpointed(model, reentrant=True),
    }[kind]
    reference, model = LLAMA.build(), LLAMA.build()
    prepared(model)
    before = traces_of(model)
    handle = sp_attention.enable(model, backend="sdpa", loss_tile=4)
    copied, other, third = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))
    found: dict[str, Any] = {}

    def check(name: str, each: nn.Module) -> None:
        for one in (reference, each):
            one.zero_grad()
        found[name] = largest_error(reference, each, loss_step)

    check("beside", copied)
    check("the model beside it", model)
    keys = {config._attn_implementation for config in configs(model)}
    handle.disable()
    check("alone", copied)
    mine = handle_of(other)
    with mine.suspended():
        found["suspended"] = float(not torch.equal(logits_of(other, 9), logits_of(reference, 9)))
    check("after it was suspended", other)
    mine.disable()
    found["traces"] = traces_of(other) != before
    check("enabled again", (sp_attention.enable(other, backend="sdpa"), other)[1])
    check("enabled as it is", (sp_attention.enable(third, backend="sdpa"), third)[1])
    handle_of(third).disable()
    found["traces of the other"] = traces_of(third) != before
    found["known"] = [key in AttentionInterface._global_mapping for key in keys]
    del copied
    gc.collect()
    found["forgotten"] = [key not in AttentionInterface._global_mapping for key in keys]
    return found


@pytest.mark.parametrize("kind", ["plain", "checkpointing", "re-entrant"])
def test_a_copy_goes_on_alone(kind: str) -> None:
    for found in run_ranks(2, copied_and_trained, kind, timeout=200):
        assert found.pop("known") == found.pop("forgotten") == [True]
        assert max(found.values()) < 1e-5


def averaged() -> float:
    """An exponential moving average, whose model is a copy."""
    model, reference = LLAMA.build(), LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    averages = [AveragedModel(one, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for one in (model, reference)]
    for one, average in zip((model, reference), averages, strict=True):
        for _ in range(2):
            one(**batch_of("plain", 33)).loss.backward()
            if one is model:
                sp_attention.average_gradients(model)
            torch.optim.SGD(one.parameters(), 0.1).step()
            one.zero_grad()
            average.update_parameters(one)
    handle_of(model).disable()
    return relative_error(*(logits_of(average.module, 20) for average in averages))


def test_an_average_of_an_enabled_model_outlives_it() -> None:
    assert max(run_ranks(2, averaged, timeout=100)) < 1e-5


def states() -> bool:
    model = LLAMA.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sp_attention.enable(model, backend="sdpa")
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_the_state_dict_is_that_of_the_model_never_enabled() -> None:
    assert all(run_ranks(2, states))


def saved(folder: Path) -> bool:
    """Files, and an optimizer's state after a step: those of a model that was never enabled, byte for byte."""
    before, after = folder / "before", folder / "after"
    model = LLAMA.build()
    model.save_pretrained(before)
    optimizer = torch.optim.AdamW(model.parameters())
    sp_attention.enable(model, backend="sdpa")
    model.save_pretrained(after)
    dist.barrier()  # The first rank writes.
    names = sorted(file.name for file in before.iterdir())
    same = names == sorted(file.name for file in after.iterdir())
    same &= all((before / name).read_bytes() == (after / name).read_bytes() for name in names)
    batch = batch_of("left-padded", 33)
    plain = type(model).from_pretrained(after)
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-9, atol=1e-9)
    model.train()(**batch).loss.backward()
    optimizer.step()
    reference = LLAMA.build()
    expected = torch.optim.AdamW(reference.parameters())
    reference(**batch).loss.backward()
    expected.step()
    ours, theirs = optimizer.state_dict(), expected.state_dict()
    same &= ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    return same and all(ours["state"][key].keys() == theirs["state"][key].keys() for key in ours["state"])


def test_what_is_saved_is_that_of_the_model_never_enabled(tmp_path: Path) -> None:
    assert all(run_ranks(2, saved, tmp_path))
