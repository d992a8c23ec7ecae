"""What others fell into: numbers that look fine and are wrong. Each is a relation that holds in one process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Selected, be_quiet, pair, relative_error, run_once, too_large, world
from models import LLAMA, Tiny, batch_of
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.cli.reduced import build
from sp_attention.distributed.partition import spans

LENGTH = 33


def enabled(model: PreTrainedModel, backend: str = "sdpa") -> PreTrainedModel:
    sp_attention.enable(model, backend=backend)
    return model


def ids_of(seed: int = 0) -> Tensor:
    return torch.randint(40, 97, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def losses_and_gradients(model: PreTrainedModel, batch: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    sp_attention.average_gradients(model)
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def few_targets() -> dict[str, float]:
    """Errors of batches with targets in few places: around the cuts, in one span, one and many."""
    reference, model = pair(LLAMA)
    ids = ids_of()
    cuts = [span.start for span in spans(LENGTH, world().size)[1:]]
    places = {f"at {cut + off}": [cut + off] for cut in cuts for off in (-1, 0, 1)}
    places |= {"first half": list(range(1, 9)), "1 and 15": [3, *range(18, LENGTH)], "last": [LENGTH - 1]}
    errors = {}
    for name, chosen in places.items():
        labels = torch.full_like(ids, -100)
        labels[:, chosen] = ids[:, chosen]
        both = [losses_and_gradients(each, {"input_ids": ids, "labels": labels}) for each in (model, reference)]
        errors[name] = max(relative_error(*pair) for pair in zip(*both, strict=True))
    nothing = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    assert all(each(**nothing).loss.isnan() for each in (reference, model))
    # The mean of one batch, and of two that are accumulated, with 5 and 60 targets.
    both = []
    for each in (model, reference):
        each.zero_grad()
        for targets in (5, 60):
            labels = torch.full_like(ids, -100)
            labels.view(-1)[1 : 1 + targets] = ids.view(-1)[1 : 1 + targets]
            count = (labels[:, 1:] != -100).sum() * 2
            each(input_ids=ids, labels=labels, num_items_in_batch=count).loss.backward()
        sp_attention.average_gradients(each)
        both.append([p.grad.clone() for p in each.parameters()])
    errors["accumulated"] = max(relative_error(*pair) for pair in zip(*both, strict=True))
    return errors


def shifted_labels(name: str) -> float:
    """Labels that are shifted already are not shifted again, whatever stands between the layers and the loss."""
    ids = ids_of()
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    reference, model = build(name, "causal-lm"), enabled(build(name, "causal-lm"))
    expected = reference(input_ids=ids, labels=ids).loss
    return relative_error(model(input_ids=ids, labels=ids, shift_labels=shifted).loss, expected)


def changed(model: PreTrainedModel, ids: Tensor, place: int, **more: Any) -> list[int]:
    """The tokens whose logits in row 0 are not the same bits after the token at a place has changed."""
    other = ids.clone()
    other[0, place] = 32 + (other[0, place] - 31) % 60
    with torch.no_grad():
        before, after = model(input_ids=ids, **more).logits, model(input_ids=other, **more).logits
    return (before[0] != after[0]).any(-1).nonzero().flatten().tolist()


def of_one_layer(name: str) -> PreTrainedModel:
    model = build(name, "causal-lm").eval()
    model.config.num_hidden_layers = 1
    del model.model.layers[1:]
    return enabled(model)


def window() -> list[int]:
    settings = {"num_hidden_layers": 1, "sliding_window": 5}
    return changed(enabled(Tiny("MistralForCausalLM", settings).build().eval()), ids_of(), 14)


def window_with_sinks() -> list[int]:
    return changed(of_one_layer("gpt_oss"), ids_of(), 14)


def chunk() -> list[int]:
    return changed(of_one_layer("llama4_text"), ids_of(), 12)


def causal() -> list[int]:
    return changed(enabled(LLAMA.build().eval()), ids_of(), 14)


def document(place: int) -> list[int]:
    positions = torch.cat([torch.arange(9), torch.arange(12), torch.arange(12)]).expand(2, -1)
    return changed(enabled(LLAMA.build().eval()), ids_of(), place, position_ids=positions, use_cache=False)


def left_padding() -> list[int]:
    padding = torch.ones(2, LENGTH, dtype=torch.int64)
    padding[0, :11] = 0
    found = changed(enabled(LLAMA.build().eval()), ids_of(), 4, attention_mask=padding)
    return [one for one in found if one >= 11]


def right_padding() -> list[int]:
    padding = torch.ones(2, LENGTH, dtype=torch.int64)
    padding[0, 20:] = 0
    found = changed(enabled(build("bert", "masked-lm").eval()), ids_of(), 25, attention_mask=padding)
    return [one for one in found if one < 20]


# Which tokens see a token: through windows, chunks, documents and padding.
REACH: dict[str, tuple[Callable[[], list[int]], list[int]]] = {
    "mistral, window": (window, [14, 15, 16, 17, 18]),
    "gpt_oss, window with sinks": (window_with_sinks, [14, 15, 16, 17, 18]),
    "llama4, chunk": (chunk, [12, 13, 14]),
    "llama, causal": (causal, list(range(14, LENGTH))),
    "llama, document": (partial(document, 4), list(range(4, 9))),
    "llama, document across the cut": (partial(document, 10), list(range(10, 21))),
    "llama, left padding": (left_padding, []),
    "bert, right padding": (right_padding, []),
}


def documents_alone(name: str) -> float:
    """How far the logits of every document of a packed row are from those of the document by itself."""
    ids, lengths = ids_of()[:1], (9, 12, 12)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    reference, model = build(name, "causal-lm").eval(), enabled(build(name, "causal-lm").eval())
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits.split(lengths, 1)
        alone = [reference(input_ids=document).logits for document in ids.split(lengths, 1)]
    return max(relative_error(*pair) for pair in zip(packed, alone, strict=True))


def heads_in_another_order() -> dict[str, float]:
    """Heads of another order are the same model if their sinks go with them, and another if those stay."""
    ids, order = ids_of(), torch.tensor([2, 0, 1])
    errors = {}
    with torch.no_grad():
        expected = build("gpt_oss", "causal-lm").eval()(input_ids=ids).logits
        for name, with_sinks in (("with their sinks", True), ("without", False)):
            model = build("gpt_oss", "causal-lm").eval()
            for layer in model.model.layers:
                attention = layer.self_attn
                size = attention.head_dim
                kv_heads = attention.k_proj.out_features // size
                # Groups of query heads move with their KV head; each KV head has as many of them.
                groups = order if kv_heads == 3 else torch.arange(kv_heads).flip(0)
                per_group = attention.q_proj.out_features // size // kv_heads
                heads = (groups[:, None] * per_group + torch.arange(per_group)).flatten()
                for projection, places in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
                    for weight in getattr(attention, projection).parameters():
                        weight.copy_(weight.unflatten(0, (-1, size))[places].flatten(0, 1))
                output = attention.o_proj.weight
                output.copy_(output.unflatten(1, (-1, size))[:, heads].flatten(1))
                if with_sinks:
                    attention.sinks.copy_(attention.sinks[heads])
            errors[name] = relative_error(enabled(model)(input_ids=ids).logits, expected)
    return errors


def cut_already() -> str:
    """What is said of a batch of which every rank was given its own span, as other libraries want it."""
    model = enabled(LLAMA.build())
    here = world().span(LENGTH - 1)
    mine = {name: each[:, here.start : here.stop] for name, each in batch_of("plain", LENGTH - 1).items()}
    with pytest.raises(sp_attention.BatchError) as error:
        model(**mine)
    return str(error.value)


def padding_is_not_trained() -> float:
    """The largest gradient of the embedding of a token that is only padding."""
    batch = batch_of("left-padded", LENGTH)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)
    model = enabled(LLAMA.build())
    model(**batch).loss.backward()
    sp_attention.average_gradients(model)
    return model.model.embed_tokens.weight.grad[1].abs().max().item()


def recurrences(name: str) -> float:
    """How far the change of the last token's logits by the first token is off, and the gradient that leads back."""
    ids, other = ids_of(), ids_of()
    other[:, 0] = 34
    ids[:, 0] = 33
    last = torch.full_like(ids, -100)
    last[:, -1] = ids[:, -1]
    reference, model = build(name, "causal-lm"), enabled(build(name, "causal-lm"))
    with torch.no_grad():
        changes = [each.eval()(ids).logits[:, -1] - each(other).logits[:, -1] for each in (model, reference)]
    assert changes[1].abs().max() > 0
    gradients = []
    for each in (model, reference):
        each.train().zero_grad()
        each(input_ids=ids, labels=last).loss.backward()
        sp_attention.average_gradients(each)
        gradients.append(each.get_input_embeddings().weight.grad[33])
    assert gradients[1].abs().max() > 0
    return max(relative_error(*changes), relative_error(*gradients))


class Seen(nn.SiLU):
    """An activation that notes how many tokens it is given; a hook would be given all of them."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden.shape[1])
        return super().forward(hidden)


def lengths_in_layers() -> list[int]:
    model, seen = LLAMA.build(), list[int]()
    for layer in model.model.layers:
        layer.mlp.act_fn = Seen(seen)
    enabled(model)
    seen.clear()
    model(**batch_of("plain", LENGTH)).loss.backward()
    return seen


TRAPS: dict[str, Callable[[], Any]] = {
    "few targets": few_targets,
    "heads": heads_in_another_order,
    "padding": padding_is_not_trained,
    "lengths": lengths_in_layers,
    "cut already": cut_already,
}


def traps() -> dict[str, Any]:
    be_quiet()
    return {name: trap() for name, trap in TRAPS.items()}


def errors_of(trap: Callable[[str], float], models: tuple[str, ...]) -> dict[str, float]:
    be_quiet()
    return {name: trap(name) for name in models}


def reach(names: tuple[str, ...]) -> dict[str, list[int]]:
    be_quiet()
    return {name: REACH[name][0]() for name in names}


def found(trap: str) -> list[Any]:
    return [one[trap] for one in run_once(2, traps, timeout=120)]


def test_every_target_counts_once_wherever_the_cuts_are() -> None:
    assert not any(too_large(errors) for errors in found("few targets"))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2", "gpt_oss", "granite", "cohere2"])
def test_shifted_labels_are_not_shifted_again(name: str, selected: Selected) -> None:
    for errors in run_once(2, errors_of, shifted_labels, selected("name")):
        assert errors[name] < 1e-5


@pytest.mark.parametrize("name", REACH)
def test_no_token_sees_what_it_may_not(name: str, selected: Selected) -> None:
    for reached in run_once(2, reach, selected("name"), timeout=120):
        assert reached[name] == REACH[name][1]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_documents_are_as_if_alone(name: str, selected: Selected) -> None:
    for errors in run_once(2, errors_of, documents_alone, selected("name")):
        assert errors[name] < 1e-5


def test_sinks_belong_to_their_heads() -> None:
    for errors in found("heads"):
        assert too_large(errors).keys() == {"without"}


def test_a_batch_that_is_cut_already_is_an_error() -> None:
    for text in found("cut already"):
        assert "input_ids differs on rank 1 from rank 0:" in text
        assert text.endswith("do not cut the sequence yourself.")


def test_padding_is_not_trained() -> None:
    assert found("padding") == [0, 0]


@pytest.mark.parametrize("name", ["mamba2", "rwkv", "lfm2", "bamba", "qwen3_next"])
def test_recurrent_layers_do_not_begin_anew_on_every_rank(name: str, selected: Selected) -> None:
    for errors in run_once(2, errors_of, recurrences, selected("name")):
        assert errors[name] < 1e-5


def test_every_layer_works_on_a_part() -> None:
    assert found("lengths") == [[17, 17], [16, 16]]
