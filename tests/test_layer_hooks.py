"""What goes into layers and comes out: what is cut, what is gathered, and with how many collectives."""

from typing import Any

import pytest
import torch
from helpers import Selected, Step, hidden_states_step, largest_error, loss_step, pair, run_once, too_large
from models import LLAMA, MODELS, VOCABULARY, Tiny, batch_of
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks

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
    return largest_error(*pair(GEMMA3N), lambda model: hidden_states_step(model, rows=11, length=22))


def test_hidden_states_of_other_dims_are_whole() -> None:
    assert max(run_ranks(2, hidden_states_of_four_dims)) < GEMMA3N.tolerance


class Extra(LlamaForCausalLM):
    """Takes numbers for every token, which it adds between its layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra: Tensor | None = None
        self.model.layers[1].register_forward_pre_hook(self.add)

    def add(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self.extra is None else (args[0] + self.extra, *args[1:])

    def forward(self, input_ids: Any = None, extra: Tensor | None = None, **kwargs: Any) -> Any:
        self.extra = extra
        return super().forward(input_ids, **kwargs)


class Gated(LlamaDecoderLayer):
    """Takes numbers for every token, or row, which transformers hands down to it unread."""

    def forward(self, hidden_states: Tensor, *args: Any, gate: Any = None, **kwargs: Any) -> Tensor:
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        return hidden_states if gate is None else hidden_states * gate


def extra(cls: type[PreTrainedModel] = LlamaForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls(LLAMA.build().config).double().train()
    for layer in model.model.layers:
        layer.__class__ = Gated
    return model


def unseen_arguments() -> dict[str, Any]:
    """Errors of tensors that the rehearsal did not show, and the text of a refusal."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(2, 33, 48, generator=generator, dtype=torch.float64)
    positions = torch.arange(33).flip(0).expand(2, -1)

    def loss(model: PreTrainedModel, **more: Any) -> list[Tensor]:
        return loss_step(model, "plain", **more)

    def errors(step: Step) -> float:
        reference, model = extra(Extra), extra(Extra)
        sp_attention.enable(model, backend="sdpa")
        return largest_error(reference, model, step)

    found: dict[str, Any] = {
        "between the layers": errors(lambda model: loss(model, extra=numbers)),
        "by row": errors(lambda model: loss(model, gate=numbers[:, :1, :1])),
        "positions": errors(lambda model: loss(model, position_ids=positions)),
        "of each token, of new width": errors(lambda model: loss(model, gate=numbers[:, :, :1])),
        "to no effect": errors(lambda model: loss(model, cu_seq_lens_q=torch.tensor([0, 33]))),
    }
    model = extra()
    sp_attention.enable(model, backend="sdpa")
    with pytest.raises(UnsupportedError, match="cu_seq_lens_q and max_length_q without position_ids"):
        loss(model, cu_seq_lens_q=torch.tensor([0, 9, 33]), max_length_q=24)
    # And nothing is left behind.
    model.zero_grad()
    found["after"] = largest_error(extra(), model, loss)
    return found


def test_what_the_rehearsal_did_not_see_is_exact_or_refused() -> None:
    for errors in run_ranks(2, unseen_arguments):
        assert not too_large(errors)


def skipped_layers() -> list[str]:
    """Refusals of forwards that leave out the last layer, or the first one; and the next forward is exact."""
    texts = []
    for labels in (True, False):
        for left_out in (slice(0, 2), slice(1, 3)):
            reference, model = pair(Tiny("LlamaForCausalLM", {"num_hidden_layers": 3}))
            layers = model.model.layers
            model.model.layers = layers[left_out]
            batch = batch_of("plain", 33)
            if not labels:
                del batch["labels"]
            with pytest.raises(UnsupportedError) as refusal:
                model(**batch)
            texts.append(str(refusal.value))
            model.model.layers = layers
            assert largest_error(reference, model, loss_step) < 1e-5
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


def attentions(model: PreTrainedModel) -> list[Tensor]:
    # Where queries see nothing, as on the left of padding, eager attention of transformers is not finite.
    output = model(**batch_of("right-padded", 33), output_attentions=True, output_hidden_states=True)
    (output.loss + sum((weights**2).mean() for weights in output.attentions)).backward()
    return [output.loss.detach(), *(weights.detach() for weights in output.attentions)]


def routers(model: PreTrainedModel) -> list[Tensor]:
    output = model(**batch_of("left-padded", 33), output_router_logits=True)
    (output.loss + sum((logits**2).mean() for logits in output.router_logits)).backward()
    return [output.loss.detach(), output.aux_loss.detach(), *(one.detach() for one in output.router_logits)]


# What layers record, of which models, by which kernel.
RECORDED: dict[str, tuple[Tiny, Step, str]] = {
    "llama, attentions": (MODELS["llama-5q1kv"], attentions, "transformers:eager"),
    "llama, attentions, more ranks than heads": (MODELS["llama-2q1kv"], attentions, "transformers:eager"),
    "mixtral, routers": (MODELS["mixtral"], routers, "sdpa"),
}


def record(names: tuple[str, ...]) -> dict[str, float]:
    errors = {}
    for name in names:
        tiny, step, kernel = RECORDED[name]
        reference, model = tiny.build(), tiny.build()
        if step is attentions:
            reference.set_attn_implementation("eager")
            model.set_attn_implementation("eager")
        sp_attention.enable(model, backend=kernel)
        errors[name] = largest_error(reference, model, step)
    return errors


@pytest.mark.parametrize("name", RECORDED)
def test_attention_weights_and_router_logits_are_whole(name: str, selected: Selected) -> None:
    for errors in run_once(3, record, selected("name")):
        assert errors[name] < RECORDED[name][0].tolerance


def count_collectives() -> tuple[dict[str, int], dict[str, int]]:
    model = Tiny("LlamaForCausalLM", {"num_hidden_layers": 3}).build()
    sp_attention.enable(model, backend="sdpa")

    def counted(step: Any) -> tuple[Any, dict[str, int]]:
        with CommDebugMode() as mode:
            result = step()
        return result, {str(op): count for op, count in mode.get_comm_counts().items() if count}

    loss, forward = counted(lambda: model(**batch_of("left-padded", 33)).loss)
    _, backward = counted(loss.backward)
    return forward, backward


def test_a_layer_has_two_collectives_in_forward_and_two_in_backward() -> None:
    for forward, backward in run_ranks(2, count_collectives):
        # Three layers; then the agreement on the batch, and the sum of the loss as the way out.
        assert forward == {"c10d.alltoall_base_": 6, "c10d.allgather_": 1, "c10d.allreduce_": 1}
        assert backward == {"c10d.alltoall_base_": 6}
