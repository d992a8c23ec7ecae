"""Losses from some logits at a time: the numbers of one process, with less memory."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import TWO_AND_THREE, Selected, fsdp, gradients_of, largest_error, loss_step, relative_error, run_once
from models import LLAMA, MODELS, Tiny, batch_of
from tiled import CASES, TILE, checkpointed, error_of, ids_of, sizes_given, with_logits
from torch import Tensor, nn

import sp_attention
from sp_attention.launch import run_ranks


def in_tiles(names: tuple[str, ...]) -> dict[str, tuple[float, int, str]]:
    return {name: error_of(CASES[name], loss_tile=TILE) for name in names}


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
@pytest.mark.parametrize("name", CASES, ids=ids_of(CASES))
def test_loss_and_gradients_are_those_of_one_process(name: str, ranks: int, selected: Selected) -> None:
    for found in run_once(ranks, in_tiles, selected("name", ranks=ranks), timeout=300):
        error, tokens, report = found[name]
        assert error < 1
        assert "the loss makes those of 5 tokens at a time" in report
        # Only the whole logits that are asked for are made at once.
        assert tokens <= TILE or CASES[name].computed is with_logits


def scaled_by(scale: Any) -> nn.Module:
    model = Tiny("CohereForCausalLM").build()
    model.logit_scale = scale
    return model


class WrittenTo:
    """A scale that writes to the logits."""

    def __rmul__(self, logits: Tensor) -> Tensor:
        logits[..., 5:] = 0
        return 2 * logits


def refused() -> list[str]:
    texts = []
    for options in (
        {"loss_tile": 0},
        {"loss_tile": "many"},
        {"mlp_tile": -1},
        {"loss_tile": 5, "rehearse": False},
        {"loss_tile": 5, "whole_logits": True},
        {"offload": True},
    ):
        with pytest.raises(ValueError, match=r"leave|number") as error:
            sp_attention.enable(LLAMA.build(), backend="sdpa", **options)
        texts.append(str(error.value))
    for model, options in (
        (scaled_by(torch.tensor(3.0)), {"loss_tile": 5}),
        (scaled_by(WrittenTo()), {"loss_tile": 5}),
        (MODELS["mixtral"].build(), {"mlp_tile": 5}),
    ):
        with pytest.raises(sp_attention.UnsupportedError) as error:
            sp_attention.enable(model, **options)
        texts.append(str(error.value))
    texts += sp_attention.enable(scaled_by(torch.tensor(3.0))).report().splitlines()[-2:-1]
    texts += sp_attention.enable(LLAMA.build()).report().splitlines()[-2:-1]
    texts += sp_attention.enable(LLAMA.build(), loss_tile=None).report().splitlines()[-2:-1]
    return texts


MORE = "the model does more with what its head returns than to scale or to cap it, before the loss"


def test_what_cannot_be_done_is_refused_or_said() -> None:
    for texts in run_ranks(2, refused, timeout=120):
        assert texts == [
            "loss_tile=0 is no number of tokens",
            "loss_tile='many' is no number of tokens",
            "mlp_tile=-1 is no number of tokens",
            "loss_tile=5 has to be proven for this model, and rehearse=False proves nothing: leave one out",
            "loss_tile=5 makes logits in tiles, and whole_logits=True all at once: leave one out",
            "offload=True keeps tensors of a device in CPU memory, and this model is on the CPU: leave it out",
            f"loss_tile=5: {MORE}; leave it out",
            f"loss_tile=5: {MORE}; leave it out",
            "mlp_tile=5: no part of a layer of MixtralForCausalLM can be given some tokens at a time: it has to be a "
            "module beside attention with several matrices, that is given hidden states and returns hidden states, and "
            "of which transformers records nothing. Leave mlp_tile out",
            f"  the loss is given all of them at once: {MORE}",
            f"  the loss makes those of {2**24 // 97} tokens at a time",
            "  the loss is given all of them at once: enable(loss_tile=None)",
        ]


class Adapted(nn.Module):
    """A head with something beside it, as adapters are put in its place."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head
        self.beside = nn.Linear(head.in_features, head.out_features, bias=False, dtype=head.weight.dtype)
        nn.init.ones_(self.beside.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) + self.beside(hidden).tanh()


def adapted_later() -> float:
    errors = []
    for length in (2, 33):
        losses = []
        for enabled in (False, True):
            model = LLAMA.build()
            if enabled:
                sp_attention.enable(model, backend="sdpa", loss_tile=1)
            model.lm_head = Adapted(model.lm_head)
            losses.append(model(**batch_of("plain", length)).loss)
        errors.append(relative_error(losses[1], losses[0]))
    return max(errors)


def test_a_head_that_is_adapted_after_enable_is_given_all_tokens() -> None:
    assert max(run_ranks(2, adapted_later)) < 1e-6


def groups_of_other_lengths() -> list[tuple[float, int]]:
    """Two groups of two ranks in one engine, whose batches have other numbers of tiles, in turns."""
    group = dist.get_rank() // 2
    found = []
    for apart in ("mlp", "lm_head"):
        reference, model = LLAMA.build(), LLAMA.build()
        sp_attention.enable(model, backend="sdpa", sp_size=2, loss_tile=TILE, mlp_tile=4)
        sizes = sizes_given(model.model.layers[0].mlp.act_fn)
        model = fsdp(checkpointed(model, reentrant=False), apart)
        for lengths in ((33, 9), (9, 33)):
            theirs = [reference(**batch_of("plain", length)).loss for length in lengths]
            ours = model(**batch_of("plain", lengths[group])).loss
            (sum(theirs) / 2).backward()
            ours.backward()
            expected = gradients_of(reference)
            errors = [relative_error(grad, expected[name]) for name, grad in gradients_of(model).items()]
            found.append((max(relative_error(ours, theirs[group]), *errors), max(sizes)))
            model.zero_grad()
            reference.zero_grad()
    return found


def test_groups_of_other_lengths_share_an_engine() -> None:
    for found in run_ranks(4, groups_of_other_lengths, timeout=200):
        assert all(error < 1e-6 and tokens <= 4 for error, tokens in found)


def compiled() -> float:
    reference, model = LLAMA.build(), LLAMA.build()
    sp_attention.enable(model, backend="sdpa", loss_tile=TILE, mlp_tile=4)
    compiled = torch.compile(model, backend="eager")
    return largest_error(reference, compiled, lambda each: loss_step(each, "plain"))


def test_a_compiled_model_computes_the_same() -> None:
    assert max(run_ranks(2, compiled, timeout=200)) < 1e-6
