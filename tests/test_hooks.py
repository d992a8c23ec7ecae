"""What happens around and inside the region, beyond plain loss and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MODELS, VOCABULARY, Tiny, batch_of
from test_parity import relative_error
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks

Step = Callable[[PreTrainedModel], Any]


def compare_steps(
    tiny: Tiny,
    step: Step,
    prepare: Callable[[PreTrainedModel], Any] = lambda model: None,
    backend: str = "sdpa",
) -> float:
    """The largest relative error of what `step` returns, and of the gradients it leaves, sharded against whole.

    `step` returns tensors to compare; `prepare` is applied to both models, to the sharded one before enable().
    """
    reference, model = tiny.build(), tiny.build()
    prepare(reference)
    prepare(model)
    sp_attention.enable(model, backend=backend)
    return compare_built(reference, model, step)


def compare_built(reference: PreTrainedModel, model: PreTrainedModel, step: Step) -> float:
    results = step(reference), step(model)
    sp_attention.average_gradients(model)
    pairs = list(zip(*results, strict=True))
    for theirs, ours in zip(reference.parameters(), model.parameters(), strict=True):
        assert (theirs.grad is None) == (ours.grad is None)
        if theirs.grad is not None:
            pairs.append((theirs.grad, ours.grad))
    assert all(theirs.shape == ours.shape for theirs, ours in pairs)
    return max(relative_error(ours, theirs) for theirs, ours in pairs)


def loss_step(model: PreTrainedModel, **changes: Any) -> list[torch.Tensor]:
    loss = model(**batch_of("left-padded", 33) | changes).loss
    loss.backward()
    return [loss.detach()]


def two_forwards_step(model: PreTrainedModel) -> list[torch.Tensor]:
    losses = [model(**batch_of(kind, length)).loss for kind, length in (("plain", 33), ("packed", 14))]
    (losses[0] + 2 * losses[1]).backward()
    return [loss.detach() for loss in losses]


def hidden_states_step(model: PreTrainedModel, batch: dict[str, Any] | None = None) -> list[torch.Tensor]:
    output = model(**batch or batch_of("plain", 33), output_hidden_states=True)
    (output.loss + sum((state**2).mean() for state in output.hidden_states)).backward()
    return [output.loss.detach(), *(state.detach() for state in output.hidden_states)]


def embeddings_step(model: PreTrainedModel) -> list[torch.Tensor]:
    torch.manual_seed(3)
    # A parameter, so that its gradient is averaged and compared as the others are.
    model.given = nn.Parameter(torch.randn(2, 33, 48, dtype=torch.float64))
    batch = batch_of("right-padded", 33)
    del batch["input_ids"]
    loss = model(inputs_embeds=model.given, **batch).loss
    loss.backward()
    return [loss.detach()]


def own_loss_step(model: PreTrainedModel) -> list[torch.Tensor]:
    """The user's own loss on whole logits, as they come without labels."""
    logits = model(batch_of("plain", 33)["input_ids"]).logits
    torch.nn.functional.cross_entropy(logits[:, -2:].flatten(0, 1), torch.arange(4)).backward()
    return [logits.detach()]


def evaluation_step(model: PreTrainedModel) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        output = model(**batch_of("left-padded", 33))
    return [output.loss, output.logits]


def accumulation_step(model: PreTrainedModel) -> list[torch.Tensor]:
    losses = []
    for kind in ("plain", "prompt-masked"):
        loss = model(**batch_of(kind, 33), num_items_in_batch=torch.tensor(75)).loss
        loss.backward()
        losses.append(loss.detach())
    return losses


def shifted_labels_step(model: PreTrainedModel) -> list[torch.Tensor]:
    batch = batch_of("plain", 33)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    loss = model(**batch, shift_labels=shifted).loss
    loss.backward()
    return [loss.detach()]


def mask_tensor_step(model: PreTrainedModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(2, 1, 33, 33, generator=generator) < 0.5
    allowed |= torch.eye(33, dtype=torch.bool)
    additive = torch.zeros(2, 1, 33, 33, dtype=torch.float64).masked_fill_(~allowed, torch.finfo(torch.float64).min)
    losses = [model(**batch_of("plain", 33), attention_mask=mask).loss for mask in (allowed, additive)]
    sum(losses).backward()
    return [loss.detach() for loss in losses]


def holes_step(model: PreTrainedModel) -> list[torch.Tensor]:
    mask = torch.ones(2, 33, dtype=torch.int64)
    mask[0, 9:15] = 0
    mask[1, ::4] = 0
    return loss_step(model, attention_mask=mask)


def documents_step(model: PreTrainedModel) -> list[torch.Tensor]:
    """As collators without padding give them: where documents begin, in all ways that kernels know."""
    positions = torch.cat([torch.arange(9), torch.arange(24)])[None]
    starts = torch.tensor([0, 9, 33], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 24, "max_length_k": 24}
    documents = torch.repeat_interleave(torch.tensor([[0, 1]]), torch.tensor([9, 24]), dim=1)
    batch = {name: value[:1] for name, value in batch_of("plain", 33).items()}
    output = model(**batch, **lengths, position_ids=positions, seq_idx=documents, use_cache=False)
    output.loss.backward()
    return [output.loss.detach()]


def short_mask_step(model: PreTrainedModel) -> list[torch.Tensor]:
    """A mask that does not reach the last keys hides them."""
    return loss_step(model, attention_mask=torch.ones(2, 25, dtype=torch.int64))


def short_step(model: PreTrainedModel) -> list[torch.Tensor]:
    """Fewer tokens than ranks: every rank does all of it."""
    return two_lengths(model, 1, 2)


def two_lengths(model: PreTrainedModel, *lengths: int) -> list[torch.Tensor]:
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


def run_steps() -> dict[str, float]:
    return {name: compare_steps(MODELS["llama-6q3kv"], step) for name, step in STEPS.items()}


@pytest.mark.parametrize("ranks", [2, 3], ids="P{}".format)
def test_outputs_and_gradients_are_those_of_one_process(ranks: int) -> None:
    for errors in run_ranks(ranks, run_steps, timeout=120):
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def other_heads() -> dict[str, float]:
    """Losses that need all of the sequence: pooled on the last token, and over start and end positions."""

    def classified(model: PreTrainedModel) -> list[torch.Tensor]:
        loss = model(**batch_of("right-padded", 33) | {"labels": torch.tensor([0, 1])}).loss
        loss.backward()
        return [loss.detach()]

    def answered(model: PreTrainedModel) -> list[torch.Tensor]:
        batch = batch_of("left-padded", 33) | {"start_positions": torch.tensor([12, 20])}
        del batch["labels"]
        loss = model(**batch, end_positions=torch.tensor([15, 32])).loss
        loss.backward()
        return [loss.detach()]

    def no_rounding(model: PreTrainedModel) -> None:
        # A bias of all keys changes nothing, so its gradient is nothing but rounding.
        for layer in model.wav2vec2.encoder.layers:
            layer.attention.k_proj.bias.requires_grad_(False)

    def heard(model: PreTrainedModel) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        sound = torch.randn(2, 2000, generator=generator, dtype=torch.float64)
        loss = model(input_values=sound, labels=torch.randint(1, VOCABULARY, (2, 9), generator=generator)).loss
        loss.backward()
        return [loss.detach()]

    return {
        "connectionist temporal classification of sound": compare_steps(WAV2VEC2, heard, no_rounding),
        "sequence classification": compare_steps(Tiny("LlamaForSequenceClassification"), classified),
        "question answering": compare_steps(Tiny("LlamaForQuestionAnswering"), answered),
        "reshapes to the global length": compare_steps(GPT2, loss_step),
    }


GPT2 = Tiny("GPT2LMHeadModel", {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0})
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


@pytest.mark.parametrize("ranks", [2, 3], ids="P{}".format)
def test_heads_that_need_all_of_the_sequence_get_it(ranks: int) -> None:
    for errors in run_ranks(ranks, other_heads):
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def wrong_batches() -> dict[str, list[str]]:
    """What one process and the ranks raise for batches that are wrong in a place that one rank alone would see."""
    plain = batch_of("plain", 33)
    far = plain | {"labels": plain["labels"].clone()}
    far["labels"][0, 3] = VOCABULARY + 3
    batches = {
        "target out of range": far,
        "labels too short": plain | {"labels": plain["labels"][:, :-1]},
        "positions of one span": plain | {"position_ids": torch.arange(17)[None]},
        "positions of every span": batch_of("plain", 32) | {"position_ids": torch.arange(16)[None]},
        "no tokens": {"labels": plain["labels"]},
        "integer mask": plain | {"attention_mask": torch.ones(2, 1, 33, 33, dtype=torch.int64)},
    }
    models = [MODELS["llama-6q3kv"].build() for _ in range(2)]
    sp_attention.enable(models[1], backend="sdpa")
    errors = {}
    for name, batch in batches.items():
        errors[name] = []
        for model in models:
            with pytest.raises((RuntimeError, ValueError, IndexError)) as error:
                model(**batch)
            errors[name].append(f"{error.type.__name__}: {error.value}")
    return errors


def test_a_wrong_batch_is_an_error_on_every_rank_as_in_one_process() -> None:
    first, second = run_ranks(2, wrong_batches, timeout=30)
    assert first == second
    assert first["target out of range"] == ["IndexError: Target 100 is out of bounds."] * 2
    assert [error.split(":")[0] for error in first["labels too short"]] == ["ValueError"] * 2
    assert first["no tokens"][0] == first["no tokens"][1]
    for name, length in (("positions of one span", 33), ("positions of every span", 32)):
        assert f"is not what enable() saw in its rehearsal; it is not of {length} tokens" in first[name][1]
    assert "the attention mask is a tensor torch.int64 [2, 1, 33, 33]" in first["integer mask"][1]


GEMMA3N = Tiny(
    "Gemma3nForCausalLM",
    {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 5,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
)


def hidden_states_of_four_dims() -> float:
    """As many rows as this rank has tokens, which [N, B, s, E] could be mistaken for [B, s, …] by."""
    batch = batch_of("plain", 22, rows=11)
    return compare_steps(GEMMA3N, lambda model: hidden_states_step(model, batch))


def test_hidden_states_of_other_dims_are_whole() -> None:
    assert max(run_ranks(2, hidden_states_of_four_dims)) < GEMMA3N.tolerance


def interrupted() -> tuple[int, ...]:
    """The shape of logits after a forward that the user interrupted, which torch's hooks are not told of."""
    model = MODELS["llama-6q3kv"].build()
    sp_attention.enable(model, backend="sdpa")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch_of("plain", 33))
    hook.remove()
    model.eval()
    return tuple(model(batch_of("plain", 20)["input_ids"]).logits.shape)


def test_a_forward_after_an_interrupted_one_is_a_new_one() -> None:
    assert run_ranks(2, interrupted) == [(2, 20, VOCABULARY)] * 2


def checkpointed(reentrant: bool) -> Callable[[PreTrainedModel], None]:
    def prepare(model: PreTrainedModel) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    return prepare


def run_checkpointed(reentrant: bool) -> dict[str, float]:
    steps = {"one forward": loss_step, "two forwards": two_forwards_step, "hidden states": hidden_states_step}
    return {
        name: compare_steps(MODELS["mistral-window5"], step, checkpointed(reentrant)) for name, step in steps.items()
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_layers_that_are_recomputed_in_backward_find_their_own_forward(reentrant: bool) -> None:
    for errors in run_ranks(2, run_checkpointed, reentrant):
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


class Extra(LlamaForCausalLM):
    """Takes numbers for every token, which it adds between its layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra: torch.Tensor | None = None
        self.model.layers[1].register_forward_pre_hook(self.add)

    def add(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self.extra is None else (args[0] + self.extra, *args[1:])

    def forward(self, input_ids: Any = None, extra: torch.Tensor | None = None, **kwargs: Any) -> Any:
        self.extra = extra
        return super().forward(input_ids, **kwargs)


class Gated(LlamaDecoderLayer):
    """Takes numbers for every token, or row, which transformers hands down to it unread."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, gate: Any = None, **kwargs: Any) -> torch.Tensor:
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        return hidden_states if gate is None else hidden_states * gate


def extra(cls: type[PreTrainedModel] = LlamaForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls(MODELS["llama-6q3kv"].build().config).double().train()
    for layer in model.model.layers:
        layer.__class__ = Gated
    return model


def unseen_arguments() -> dict[str, Any]:
    """Errors of tensors that the rehearsal did not show, and the text of a refusal."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(2, 33, 48, generator=generator, dtype=torch.float64)
    positions = torch.arange(33).flip(0).expand(2, -1)

    def loss(model: PreTrainedModel, **more: Any) -> list[torch.Tensor]:
        loss = model(**batch_of("plain", 33), **more).loss
        loss.backward()
        return [loss.detach()]

    def errors(step: Step) -> float:
        reference, model = extra(Extra), extra(Extra)
        sp_attention.enable(model, backend="sdpa")
        return compare_built(reference, model, step)

    found: dict[str, Any] = {
        "between the layers": errors(lambda model: loss(model, extra=numbers)),
        "by row": errors(lambda model: loss(model, gate=numbers[:, :1, :1])),
        "positions": errors(lambda model: loss(model, position_ids=positions)),
        "to no effect": errors(lambda model: loss(model, cu_seq_lens_q=torch.tensor([0, 33]))),
    }
    model = extra()
    sp_attention.enable(model, backend="sdpa")
    with pytest.raises(UnsupportedError) as refusal:
        loss(model, gate=numbers[:, :, :1])
    found["refusal"] = str(refusal.value)
    with pytest.raises(UnsupportedError, match="cu_seq_lens_q and max_length_q without position_ids"):
        loss(model, cu_seq_lens_q=torch.tensor([0, 9, 33]), max_length_q=24)
    # And nothing is left behind.
    model.zero_grad()
    found["after"] = compare_built(extra(), model, loss)
    return found


def test_what_the_rehearsal_did_not_see_is_exact_or_refused() -> None:
    first, second = run_ranks(2, unseen_arguments)
    assert first["refusal"] == second["refusal"]
    assert first["refusal"] == (
        "model.layers.0: the argument gate [2, 33, 1] is not what enable() saw in its rehearsal; it is not of 33 "
        "tokens and cannot be cut"
    )
    for errors in (first, second):
        del errors["refusal"]
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def skipped_layers() -> list[str]:
    """Refusals of forwards that leave out the last layer, or the first one; and the next forward is exact."""
    texts = []
    for labels in (True, False):
        for left_out in (slice(0, 2), slice(1, 3)):
            tiny = Tiny("LlamaForCausalLM", {"num_hidden_layers": 3})
            reference, model = tiny.build(), tiny.build()
            sp_attention.enable(model, backend="sdpa")
            layers = model.model.layers
            model.model.layers = layers[left_out]
            batch = batch_of("plain", 33)
            if not labels:
                del batch["labels"]
            with pytest.raises(UnsupportedError) as refusal:
                model(**batch)
            texts.append(str(refusal.value))
            model.model.layers = layers
            assert compare_built(reference, model, loss_step) < 1e-5
    return texts


def test_a_forward_that_skips_layers_is_refused() -> None:
    first, second = run_ranks(2, skipped_layers)
    assert first == second
    assert first == 2 * [
        "model.layers: the last layer was not called, unlike in the rehearsal of enable(): a model that skips layers "
        "(layerdrop, early exit) is not covered",
        "model.layers.1 is called before the first layer of its stack, unlike in the rehearsal of enable(): a model "
        "that skips layers is not covered",
    ]


def recorded_by_layers() -> dict[str, float]:
    def attentions(model: PreTrainedModel) -> list[torch.Tensor]:
        # Where queries see nothing, as on the left of padding, eager attention of transformers is not finite.
        output = model(**batch_of("right-padded", 33), output_attentions=True, output_hidden_states=True)
        (output.loss + sum((weights**2).mean() for weights in output.attentions)).backward()
        return [output.loss.detach(), *(weights.detach() for weights in output.attentions)]

    def routers(model: PreTrainedModel) -> list[torch.Tensor]:
        output = model(**batch_of("left-padded", 33), output_router_logits=True)
        (output.loss + sum((logits**2).mean() for logits in output.router_logits)).backward()
        return [output.loss.detach(), output.aux_loss.detach(), *(one.detach() for one in output.router_logits)]

    def prepare(model: PreTrainedModel) -> None:
        model.set_attn_implementation("eager")

    eager = "transformers:eager"
    return {
        "attentions": compare_steps(MODELS["llama-5q1kv"], attentions, prepare, eager),
        "attentions, more ranks than heads": compare_steps(MODELS["llama-2q1kv"], attentions, prepare, eager),
        "routers": compare_steps(MODELS["mixtral"], routers) / 100,  # compute in float32
    }


def test_attention_weights_and_router_logits_are_whole() -> None:
    for errors in run_ranks(3, recorded_by_layers):
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
