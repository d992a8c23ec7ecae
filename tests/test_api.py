"""What enable() puts in place, what disable() takes away, and what is refused."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import LLAMA, MODELS, Tiny, batch_of
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks


def registries() -> list[dict[str, Any]]:
    return [dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)]


def state(model: PreTrainedModel) -> list[Any]:
    """All that enable() may have touched: attributes and hooks of every module, configurations, modes."""
    found: list[Any] = []
    for module in model.modules():
        attributes = dict(vars(module))
        hooks = {name: dict(value) for name, value in attributes.items() if "hooks" in name and value}
        plain = {name: value for name, value in attributes.items() if not isinstance(value, dict)}
        found.append((sorted(attributes), hooks, {name: id(value) for name, value in plain.items()}, module.training))
    return [*found, dict(vars(model.config)), model.config.to_dict(), model.loss_function]


def enable_and_disable() -> bool:
    model, whole = LLAMA.build(), registries()
    model.lm_head.eval()
    ids, random = batch_of("plain", 33)["input_ids"], torch.get_rng_state()
    logits, before = model(ids).logits, state(model)
    handle = sp_attention.enable(model, backend="sdpa")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == [entry[3] for entry in before[:-3]]
    assert state(model) != before
    model(**batch_of("plain", 33)).loss.backward()
    handle.disable()
    assert state(model) == before
    for now, then in zip(registries(), whole, strict=True):
        assert now.keys() == then.keys()
        assert all(now[key] is then[key] for key in then)
    assert torch.equal(model(ids).logits, logits)
    handle.disable()
    with sp_attention.enable(model, backend="sdpa"):
        assert state(model) != before
    return state(model) == before


def test_disable_leaves_no_trace() -> None:
    assert all(run_ranks(2, enable_and_disable))


def suspend() -> tuple[bool, bool]:
    """Whether it generates what the whole model does, and whether the model computes with others again after that."""
    model, reference = LLAMA.build(), LLAMA.build()
    batch, before = batch_of("left-padded", 33), state(model)
    handle = sp_attention.enable(model, backend="sdpa")
    enabled = state(model)[-3:]

    def generated(each: PreTrainedModel) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return each.eval().generate(**inputs, max_new_tokens=8, do_sample=False)

    with handle.suspended():
        texts = generated(model)
    assert state(model)[-3:] == enabled
    with pytest.raises(ZeroDivisionError), handle.suspended():
        raise ZeroDivisionError
    losses = [each.train()(**batch) for each in (model, reference)]
    torch.testing.assert_close(losses[0].loss, losses[1].loss)
    is_shared = isinstance(losses[0].logits, sp_attention.ShardedLogits)
    with handle.suspended():
        with pytest.raises(ValueError, match="is already enabled"):
            sp_attention.enable(model, backend="sdpa")
        handle.disable()
        assert state(model) == before
    assert state(model) == before
    with handle.suspended():
        pass
    assert state(model) == before
    return torch.equal(texts, generated(reference)), is_shared


@pytest.mark.filterwarnings("ignore")
def test_a_suspended_model_generates_alone_and_goes_on_with_others() -> None:
    assert run_ranks(2, suspend) == [(True, True)] * 2


REFUSED = {
    "gemma2, soft cap": (
        Tiny("Gemma2ForCausalLM"),
        r"model\.layers\.0\.self_attn: kernel 'sdpa' on cpu cannot do this: .* has no softcap\. "
        r'Use enable\(model, backend="transformers:eager"\)',
    ),
    "resnet, no stack": (
        Tiny("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}),
        r"ResNetForImageClassification has no stack of layers that hand on a sequence, so there is nothing to share",
    ),
}


def fail_to_enable(name: str) -> str:
    tiny, text = REFUSED[name]
    model, whole = tiny.build(torch.float32), registries()
    before = state(model)
    with pytest.raises(UnsupportedError, match=text) as refusal:
        sp_attention.enable(model, backend="sdpa")
    assert state(model) == before
    assert registries() == whole
    return str(refusal.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_that_of_every_rank_and_leaves_no_trace(name: str) -> None:
    first, second = run_ranks(2, fail_to_enable, name)
    assert first == second


def refusals() -> dict[str, str]:
    """The text of every refusal of a model that was enabled."""
    model = LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    ids = batch_of("plain", 33)["input_ids"]
    with pytest.raises(ValueError, match="already enabled") as enabled:
        sp_attention.enable(model, backend="sdpa")
    texts = {"enabled": str(enabled.value)}
    shares = LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match="shares its configuration object") as shared:
        sp_attention.enable(shares, backend="sdpa")
    texts["shared"] = str(shared.value)
    attempts = {
        "cache": lambda: model(ids, past_key_values=((ids, ids),)),
        "attentions": lambda: model(ids, output_attentions=True),
        "tuple": lambda: model(ids, output_hidden_states=True, return_dict=False),
    }
    for name, attempt in attempts.items():
        with pytest.raises(UnsupportedError) as refusal:
            attempt()
        texts[name] = str(refusal.value)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError) as refusal:
        model(ids)
    texts["changed"] = str(refusal.value)
    return texts


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_covered_is_refused_on_every_rank_and_says_what_to_do() -> None:
    first, second = run_ranks(2, refusals)
    assert first == second
    assert "this LlamaForCausalLM is already enabled" in first["enabled"]
    assert "call disable() on the handle first" in first["enabled"]
    assert "copy.deepcopy(config)" in first["shared"]
    assert first["cache"] == "past_key_values is a tuple, and no Cache of transformers"
    assert first["attentions"] == (
        "model.layers.0.self_attn: kernel 'sdpa' on cpu cannot do this: it has no attention weights to return "
        '(output_attentions=True). Use enable(model, backend="transformers:eager"). Installed kernels that can: '
        "transformers:eager."
    )
    assert first["tuple"] == "output_hidden_states needs return_dict=True under sequence parallelism"
    assert first["changed"].startswith("the attention implementation was changed after enable()")


def report() -> str:
    return sp_attention.enable(MODELS["mixtral"].build(), backend="sdpa").report()


def test_the_report_says_what_each_part_does() -> None:
    assert run_ranks(2, report)[0].splitlines() == [
        "sp_attention: 2 processes = 1 group x 2 ranks, each sequence shared by its group, kernel 'sdpa'",
        "  model.embed_tokens: looks up this rank's tokens",
        "  model.layers, layers 0 to 1: self_attn: head-parallel; all else: position-wise",
        "  layers do the same in sequences of up to 516 tokens; longer ones are tried",
        "  logits stay sharded in training with labels, else whole",
        f"  the loss makes those of {2**24 // 97} tokens at a time",
        "  key/value caches hold this rank's heads; ranks hold some key heads alike: 4 for 3",
    ]


def not_a_model() -> str:
    with pytest.raises(ValueError, match="Linear is not a transformers model") as refusal:
        sp_attention.enable(nn.Linear(2, 2), backend="sdpa")
    return str(refusal.value)


def test_modules_that_hold_no_transformers_model_are_refused() -> None:
    assert not_a_model() == "Linear is not a transformers model, nor does it contain one"


def without_rehearsal() -> str:
    """The text of a refusal; a model that is enabled without proof, materialised or not yet, is exact."""
    reference, model = LLAMA.build(), LLAMA.build()
    handle = sp_attention.enable(model, backend="sdpa", rehearse=False)
    assert "logits are whole: enable(rehearse=False) did not prove that" in handle.report()
    with torch.device("meta"):
        empty = LlamaForCausalLM(copy.deepcopy(reference.config)).double().train()
    with pytest.raises(UnsupportedError) as refusal:
        sp_attention.enable(empty, backend="sdpa")
    sp_attention.enable(empty, backend="sdpa", rehearse=False)
    empty.to_empty(device="cpu")
    empty.load_state_dict(reference.state_dict())
    for name, buffer in reference.named_buffers():
        empty.get_buffer(name).copy_(buffer)
    for kind in ("left-padded", "packed"):
        results = []
        for each in (reference, model, empty):
            each.zero_grad()
            output = each(**batch_of(kind, 33))
            output.loss.backward()
            sp_attention.average_gradients(each)
            results.append([output.loss.detach(), output.logits.detach(), *(p.grad for p in each.parameters())])
        visible = batch_of(kind, 33).get("attention_mask", torch.ones(2, 33))[:, :, None]
        for expected, *others in zip(*results, strict=True):
            for other in others:
                if expected.shape[:2] == (2, 33):
                    expected, other = expected * visible, other * visible
                torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    return str(refusal.value)


def test_models_can_be_enabled_without_a_rehearsal_and_without_weights() -> None:
    first, second = run_ranks(2, without_rehearsal)
    assert first == second
    assert first.startswith("the model's weights are not materialised (meta device), so nothing can be proven: load ")
    assert first.endswith(" or pass rehearse=False")


def chosen_kernels() -> dict[str, str]:
    """What "auto" takes for a model, and what is said of ranks that ask for different kernels."""
    handle = sp_attention.enable(Tiny("Gemma2ForCausalLM").build())
    found = {"soft cap": handle.backend.kernel, "report": handle.report().splitlines()[1]}
    found["plain"] = sp_attention.enable(LLAMA.build()).backend.kernel
    with pytest.raises(ValueError, match="are to use different kernels") as error:
        sp_attention.enable(LLAMA.build(), backend=["sdpa", "transformers:eager"][dist.get_rank()])
    found["different"] = str(error.value)
    return found


def different_options() -> list[str]:
    texts = []
    for name, values in {"loss_tile": ("auto", 5), "mlp_tile": (None, 4), "rehearse": (True, False)}.items():
        model = LLAMA.build()
        with pytest.raises(ValueError, match="give every rank the same") as error:
            sp_attention.enable(model, backend="sdpa", **{name: values[dist.get_rank()]})
        sp_attention.enable(model, backend="sdpa").disable()
        texts.append(str(error.value))
    return texts


def test_different_options_are_an_error_on_every_rank() -> None:
    for texts in run_ranks(2, different_options):
        assert texts[0] == (
            "the ranks of this group call enable() with loss_tile='auto' on rank 0, loss_tile=5 on rank 1: give every "
            "rank the same"
        )
        assert "mlp_tile=None on rank 0, mlp_tile=4 on rank 1" in texts[1]
        assert "rehearse=True on rank 0, rehearse=False on rank 1" in texts[2]


def test_auto_is_the_best_kernel_that_does_what_the_model_asks() -> None:
    first, second = run_ranks(2, chosen_kernels)
    assert first == second
    assert first["plain"] == "sdpa"
    assert first["soft cap"] == "transformers:eager"
    assert first["report"].startswith("  kernel 'sdpa' was passed over: model.layers.0.self_attn: ")
    assert "torch's scaled_dot_product_attention has no softcap" in first["report"]
    assert first["different"].endswith("rank 0: sdpa; rank 1: transformers:eager")
