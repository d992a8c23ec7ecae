"""A model while it is enabled: beside other models, copied, saved."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import LLAMA, MODELS, batch_of
from torch import Tensor
from transformers import PreTrainedModel

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks


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
    # What the copy attends through is gone, and no other model's attention takes its place.
    sp_attention.enable(LLAMA.build(), backend="sdpa")
    with pytest.raises((KeyError, UnsupportedError)):
        logits_of(copied, 33)
    return same


def test_a_copy_of_an_enabled_model_is_exact_too() -> None:
    assert all(run_ranks(2, copies))


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
