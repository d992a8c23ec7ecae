"""What happens around and inside the region, beyond plain loss and gradients."""

from typing import Any

import pytest
import torch
from helpers import (
    TWO_AND_THREE,
    Selected,
    Step,
    hidden_states_step,
    largest_error,
    loss_step,
    pair,
    relative_error,
    run_once,
    two_forwards_step,
)  # fmt: skip
from models import LLAMA, MODELS, VOCABULARY, Tiny, batch_of
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.launch import run_ranks


def embeddings_step(model: PreTrainedModel) -> list[Tensor]:
    torch.manual_seed(3)
    # A parameter, so that its gradient is averaged and compared as the others are.
    model.given = nn.Parameter(torch.randn(2, 33, 48, dtype=torch.float64))
    batch = batch_of("right-padded", 33)
    del batch["input_ids"]
    loss = model(inputs_embeds=model.given, **batch).loss
    loss.backward()
    return [loss.detach()]


def own_loss_step(model: PreTrainedModel) -> list[Tensor]:
    """The user's own loss on whole logits, as they come without labels."""
    logits = model(batch_of("plain", 33)["input_ids"]).logits
    torch.nn.functional.cross_entropy(logits[:, -2:].flatten(0, 1), torch.arange(4)).backward()
    return [logits.detach()]


def evaluation_step(model: PreTrainedModel) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        output = model(**batch_of("left-padded", 33))
    return [output.loss, output.logits]


def accumulation_step(model: PreTrainedModel) -> list[Tensor]:
    losses = []
    for kind in ("plain", "prompt-masked"):
        loss = model(**batch_of(kind, 33), num_items_in_batch=torch.tensor(75)).loss
        loss.backward()
        losses.append(loss.detach())
    return losses


def shifted_labels_step(model: PreTrainedModel) -> list[Tensor]:
    batch = batch_of("plain", 33)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    return loss_step(model, "plain", shift_labels=shifted)


def mask_tensor_step(model: PreTrainedModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(2, 1, 33, 33, generator=generator) < 0.5
    allowed |= torch.eye(33, dtype=torch.bool)
    additive = torch.zeros(2, 1, 33, 33, dtype=torch.float64).masked_fill_(~allowed, torch.finfo(torch.float64).min)
    losses = [model(**batch_of("plain", 33), attention_mask=mask).loss for mask in (allowed, additive)]
    sum(losses).backward()
    return [loss.detach() for loss in losses]


def holes_step(model: PreTrainedModel) -> list[Tensor]:
    mask = torch.ones(2, 33, dtype=torch.int64)
    mask[0, 9:15] = 0
    mask[1, ::4] = 0
    return loss_step(model, attention_mask=mask)


def documents_step(model: PreTrainedModel) -> list[Tensor]:
    """As collators without padding give them: where documents begin, in all ways that kernels know."""
    positions = torch.cat([torch.arange(9), torch.arange(24)])[None]
    starts = torch.tensor([0, 9, 33], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 24, "max_length_k": 24}
    documents = torch.repeat_interleave(torch.tensor([[0, 1]]), torch.tensor([9, 24]), dim=1)
    batch = {name: value[:1] for name, value in batch_of("plain", 33).items()}
    output = model(**batch, **lengths, position_ids=positions, seq_idx=documents, use_cache=False)
    output.loss.backward()
    return [output.loss.detach()]


def short_mask_step(model: PreTrainedModel) -> list[Tensor]:
    """A mask that does not reach the last keys hides them."""
    return loss_step(model, attention_mask=torch.ones(2, 25, dtype=torch.int64))


def short_step(model: PreTrainedModel) -> list[Tensor]:
    """Fewer tokens than ranks: every rank does all of it."""
    return two_lengths(model, 1, 2)


def two_lengths(model: PreTrainedModel, *lengths: int) -> list[Tensor]:
    outputs = [model(batch_of("plain", length)["input_ids"]).logits for length in lengths]
    sum(output.sum() for output in outputs).backward()
    return [output.detach() for output in outputs]


STEPS = {
    step.__name__.removesuffix("_step"): step
    for step in (
        loss_step, two_forwards_step, hidden_states_step, embeddings_step, own_loss_step, evaluation_step,
        accumulation_step, shifted_labels_step, mask_tensor_step, holes_step, documents_step, short_mask_step,
        short_step,
    )
}  # fmt: skip


def run_steps(names: tuple[str, ...]) -> dict[str, float]:
    return {name: largest_error(*pair(LLAMA), STEPS[name]) for name in names}


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
@pytest.mark.parametrize("name", STEPS, ids="llama-{}".format)
def test_outputs_and_gradients_are_those_of_one_process(name: str, ranks: int, selected: Selected) -> None:
    for errors in run_once(ranks, run_steps, selected("name", ranks=ranks), timeout=120):
        assert errors[name] < 1e-5


def classified(model: PreTrainedModel) -> list[Tensor]:
    """A loss that is pooled on the last token."""
    return loss_step(model, "right-padded", labels=torch.tensor([0, 1]))


def answered(model: PreTrainedModel) -> list[Tensor]:
    """A loss over start and end positions."""
    batch = batch_of("left-padded", 33) | {"start_positions": torch.tensor([12, 20])}
    del batch["labels"]
    loss = model(**batch, end_positions=torch.tensor([15, 32])).loss
    loss.backward()
    return [loss.detach()]


def heard(model: PreTrainedModel) -> list[Tensor]:
    """Connectionist temporal classification of sound."""
    # A bias of all keys changes nothing, so its gradient is nothing but rounding.
    for layer in model.wav2vec2.encoder.layers:
        layer.attention.k_proj.bias.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    sound = torch.randn(2, 2000, generator=generator, dtype=torch.float64)
    loss = model(input_values=sound, labels=torch.randint(1, VOCABULARY, (2, 9), generator=generator)).loss
    loss.backward()
    return [loss.detach()]


WAV2VEC2 = Tiny(
    "Wav2Vec2ForCTC",
    {
        "conv_dim": (16, 16, 16),
        "conv_stride": (5, 2, 2),
        "conv_kernel": (10, 3, 3),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "apply_spec_augment": False,
        "ctc_loss_reduction": "mean",
    }
    | {name: 0.0 for name in ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")}
    | {name: 0.0 for name in ("layerdrop", "final_dropout")},
)


HEADS: dict[str, tuple[Tiny, Step]] = {
    "wav2vec2, sound": (WAV2VEC2, heard),
    "llama, sequence classification": (Tiny("LlamaForSequenceClassification"), classified),
    "llama, question answering": (Tiny("LlamaForQuestionAnswering"), answered),
    "gpt2, reshapes to the global length": (MODELS["gpt2"], loss_step),
}


def run_heads(names: tuple[str, ...]) -> dict[str, float]:
    return {name: largest_error(*pair(tiny), step) for name, (tiny, step) in HEADS.items() if name in names}


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
@pytest.mark.parametrize("name", HEADS)
def test_heads_that_need_all_of_the_sequence_get_it(name: str, ranks: int, selected: Selected) -> None:
    for errors in run_once(ranks, run_heads, selected("name", ranks=ranks)):
        assert errors[name] < 1e-5


def interrupted() -> dict[str, float]:
    """How far models are from one process, after forwards that the user interrupted, of which hooks are not told."""
    model, reference = LLAMA.build(), LLAMA.build()
    handle = sp_attention.enable(model, backend="sdpa")
    ids = batch_of("plain", 20)["input_ids"]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def interrupted(module: nn.Module, called: Any) -> None:
        hook = module.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt) as error:
            called(**batch_of("plain", 33))
        hook.remove()
        held.append(error)  # As a notebook does: what was called is not forgotten.

    calls = {
        "base": lambda model: model.model(ids).last_hidden_state,
        "whole": lambda model: model(ids).logits,
        "loss": lambda model: model.train()(**batch_of("plain", 33)).loss,
    }
    held: list[Any] = []
    errors = {}
    for place in ("model.layers.0.mlp", "model.layers.1", "model.norm"):
        for called in (model, model.model):
            for name, call in calls.items():
                model.train()
                if called is model:
                    interrupted(model.get_submodule(place), model)
                else:
                    interrupted(model.get_submodule(place), lambda labels, input_ids: model.model(input_ids))
                model.eval()
                reference.eval()
                errors[f"{place}, {type(called).__name__}, {name}"] = relative_error(call(model), call(reference))
                assert handle.hooks.forward is None
    # What is outside of a forward is not taken to be in the one that was interrupted.
    interrupted(model.model.norm, model)
    with pytest.raises(sp_attention.UnsupportedError, match="outside of a forward"):
        model.model.layers[0](torch.zeros(2, 20, 48, dtype=torch.float64))
    return errors


def test_what_follows_an_interrupted_forward_is_exact() -> None:
    for errors in run_ranks(2, interrupted, timeout=120):
        assert max(errors.values()) < 1e-5
