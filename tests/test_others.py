"""What others put into an enabled model: their hooks and modules see and edit whole tensors, or it is refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import TWO_AND_THREE, Selected, largest_error, loss_step, run_once
from models import LLAMA, batch_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

import sp_attention
from sp_attention.errors import BatchError, UnsupportedError
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations

LENGTH = 33


def edited(hidden: Tensor) -> Tensor:
    """[B, S, E] with an edit of one token, and another one that moves numbers between tokens."""
    require_whole(hidden)
    hidden = hidden.clone()
    hidden[:, 10:11] = -2 * hidden[:, 10:11].flip(-1)
    return hidden + 0.1 * hidden.cumsum(1).roll(3, 1)


def require_whole(hidden: Tensor) -> None:
    # The rehearsal has fewer tokens, of which these are all as well.
    assert hidden.shape[1] in (5, 7, 8, 11, LENGTH), f"a hook sees {list(hidden.shape)}"


def edit_result(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, dict):
        output["last_hidden_state"] = edited(output["last_hidden_state"])
        return output
    return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)


def edit_argument(module: nn.Module, args: Any, kwargs: Any) -> Any:
    if args:
        return (edited(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": edited(kwargs["hidden_states"])}


class Mix(nn.Module):
    """In place of an MLP; mixes tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.cumsum(1) * 0.1


def hook_results(*names: str, **options: Any) -> Callable[[PreTrainedModel], None]:
    def put(model: PreTrainedModel) -> None:
        for name in names:
            model.get_submodule(name).register_forward_hook(edit_result, **options)

    return put


def hook_arguments(name: str, **options: Any) -> Callable[[PreTrainedModel], None]:
    def put(model: PreTrainedModel) -> None:
        model.get_submodule(name).register_forward_pre_hook(edit_argument, with_kwargs=True, **options)

    return put


def swap_mlp(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp = Mix()


def replace_mlp_forward(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.forward = Mix().forward


PUT: dict[str, Callable[[PreTrainedModel], None]] = {
    "a layer's result": hook_results("model.layers.0"),
    "the last layer's result": hook_results("model.layers.1"),
    "a layer's result, first": hook_results("model.layers.0", prepend=True),
    "the first layer's arguments": hook_arguments("model.layers.0"),
    "a layer's arguments": hook_arguments("model.layers.1"),
    "a layer's arguments, first": hook_arguments("model.layers.1", prepend=True),
    "an MLP's result": hook_results("model.layers.0.mlp"),
    "an MLP's arguments": hook_arguments("model.layers.1.mlp"),
    "an attention's result": hook_results("model.layers.0.self_attn"),
    "a projection's result": hook_results("model.layers.1.self_attn.k_proj"),
    "parts and layers": hook_results("model.layers.0.mlp.up_proj", "model.layers.1"),
    "the norm's result": hook_results("model.norm"),
    "the LM head's result": hook_results("lm_head"),
    "the inner model's result": hook_results("model"),
    "another MLP": swap_mlp,
    "another forward of an MLP": replace_mlp_forward,
}


def errors_with(names: tuple[str, ...], before: bool = False, checkpointed: bool = False) -> dict[str, float]:
    errors = {}
    for name in names:
        reference, model = LLAMA.build(), LLAMA.build()
        if before:
            PUT[name](model)
            sp_attention.enable(model, backend="sdpa")
        else:
            sp_attention.enable(model, backend="sdpa", loss_tile=4, mlp_tile=3)
            PUT[name](model)
        PUT[name](reference)
        if checkpointed:
            checkpoint_activations(model, {"use_reentrant": False})
        errors[name] = largest_error(reference, model, loss_step)
    return errors


# One each, so that all tests of it share one start of ranks.
errors_before = partial(errors_with, before=True)
errors_checkpointed = partial(errors_with, checkpointed=True)


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
@pytest.mark.parametrize("name", PUT)
def test_what_is_put_in_after_enable_gets_whole_tensors(name: str, ranks: int, selected: Selected) -> None:
    for errors in run_once(ranks, errors_with, selected("name", ranks=ranks), timeout=200):
        assert errors[name] < 1e-5


@pytest.mark.parametrize("name", PUT)
def test_what_is_there_before_enable_gets_whole_tensors(name: str, selected: Selected) -> None:
    for errors in run_once(2, errors_before, selected("name"), timeout=200):
        assert errors[name] < 1e-5


@pytest.mark.parametrize("name", ["a layer's result", "a layer's arguments", "an MLP's result", "the norm's result"])
def test_recomputation_gives_hooks_whole_tensors_too(name: str, selected: Selected) -> None:
    for errors in run_once(2, errors_checkpointed, selected("name"), timeout=100):
        assert errors[name] < 1e-5


def add_cumulated(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 0.1 * args[0].cumsum(1), *args[1:])


def errors_of_few_tokens() -> dict[int, float]:
    """By length: a span of one token is not what is alike for all tokens."""
    reference, model = LLAMA.build(), LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    for one in (reference, model):
        one.model.layers[1].mlp.down_proj.register_forward_pre_hook(add_cumulated)
    return {
        length: largest_error(reference, model, partial(loss_step, kind="plain", length=length)) for length in (3, 4, 5)
    }


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
def test_a_layer_with_a_hook_gets_all_of_very_few_tokens(ranks: int) -> None:
    for errors in run_ranks(ranks, errors_of_few_tokens, timeout=60):
        assert max(errors.values()) < 1e-5, errors


def keep(kept: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    kept.append(output)


def read() -> dict[str, float]:
    """Errors of a loss on what a hook has kept; then without the hook; and of hooks that were there before enable()."""
    reference, model = LLAMA.build(), LLAMA.build()
    found: dict[str, float] = {}
    for when in ("before enable", "after"):
        kept: dict[nn.Module, list[Tensor]] = {reference: [], model: []}

        def step(model: nn.Module, kept: dict[nn.Module, list[Tensor]] = kept) -> list[Tensor]:
            kept[model].clear()
            loss = model(**batch_of("left-padded", LENGTH)).loss + sum(one.pow(2).mean() for one in kept[model])
            loss.backward()
            return [loss.detach(), *(one.detach() for one in kept[model])]

        hooks = [
            one.model.layers[0].mlp.register_forward_hook(partial(keep, kept[one])) for one in (reference, model)
        ] + [one.model.layers[1].register_forward_hook(partial(keep, kept[one])) for one in (reference, model)]
        handle = vars(model).get("_sp_attention_handle") or sp_attention.enable(model, backend="sdpa")
        found[when] = largest_error(reference, model, step)
        assert "model.layers.0.mlp: test_others.keep" in handle.report()
        for hook in hooks:
            hook.remove()
        model.zero_grad()
        reference.zero_grad()
        found[f"{when}, removed"] = largest_error(reference, model, loss_step)
        model.zero_grad()
        reference.zero_grad()
        assert "test_others.keep" not in handle.report()
        assert not isinstance(model(**batch_of("plain", LENGTH)).logits, Tensor)  # The rank's span again.
    return found


def test_a_hook_that_reads_sees_all_until_it_is_removed() -> None:
    for found in run_ranks(2, read):
        assert max(found.values()) < 1e-5, found


def generated_with_hooks() -> list[tuple[list[int], list[int]]]:
    texts = []
    for name in ("model.layers.0", "model.layers.0.mlp", "model.norm"):
        found = []
        for enabled in (False, True):
            model = LLAMA.build().eval()
            if enabled:
                sp_attention.enable(model, backend="sdpa")
            # As steering vectors do it: the same for each token.
            model.get_submodule(name).register_forward_hook(lambda module, args, output: 1.5 * output.flip(-1))
            ids = batch_of("plain", 9)["input_ids"]
            found.append(model.generate(ids, max_new_tokens=6, do_sample=False).flatten().tolist())
        texts.append((found[0], found[1]))
    return texts


def test_generation_with_hooks_is_that_of_one_process() -> None:
    for texts in run_ranks(2, generated_with_hooks):
        for one, ours in texts:
            assert one == ours


def nothing(*_: Any) -> None:
    pass


def refusals() -> dict[str, str]:
    found = {}

    def refused(name: str, put: Callable[[PreTrainedModel], Any], error: type[Exception] = UnsupportedError) -> None:
        model = LLAMA.build()
        sp_attention.enable(model, backend="sdpa")
        undo = put(model)
        with pytest.raises(error) as refusal:
            loss_step(model)
        found[name] = str(refusal.value)
        if undo is not None:
            undo.remove()
            assert largest_error(LLAMA.build(), model, loss_step) < 1e-5

    refused("backward", lambda model: model.model.layers[0].register_full_backward_hook(nothing))
    refused("backward first", lambda model: model.model.layers[1].mlp.register_full_backward_pre_hook(nothing))
    refused("global", lambda model: register_module_forward_hook(nothing))

    def on_one_rank(model: PreTrainedModel) -> Any:
        return model.model.layers[torch.distributed.get_rank()].register_forward_hook(nothing)

    refused("other layers", on_one_rank, BatchError)

    def swap(model: PreTrainedModel) -> None:
        model.model.layers[1] = LLAMA.build().model.layers[1]

    refused("another layer", swap)

    def remove_all(model: PreTrainedModel) -> None:
        # As pyvene does.
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()

    refused("no hooks", remove_all)
    return found


def test_what_cannot_be_given_whole_tensors_is_refused_on_all_ranks() -> None:
    first, second = run_ranks(2, refusals)
    assert first == second
    assert first["backward"].startswith("model.layers.0: test_others.nothing is a backward hook")
    assert first["backward first"].startswith("model.layers.1.mlp: test_others.nothing is a backward hook")
    assert first["global"].startswith("test_others.nothing is a hook of all modules")
    assert "(hooks and modules of others) differs on rank 1 from rank 0" in first["other layers"]
    assert "rank 0: 'model.layers.0: test_others.nothing" in first["other layers"]
    assert first["another layer"].startswith("model.layers.1 (LlamaDecoderLayer) was put there after enable()")
    assert first["no hooks"].startswith("model.layers.0 (LlamaDecoderLayer) was put there after enable(), or its hooks")


def left_behind() -> bool:
    """Whether hooks of others are in their order, and nothing of ours is left, once the model is disabled."""
    model = LLAMA.build()
    order: list[int] = []
    layer = model.model.layers[0]
    hooks = [layer.register_forward_hook(lambda *_, number=number: order.append(number)) for number in range(3)]
    before = {name: dict(vars(one)) for name, one in model.named_modules()}
    with sp_attention.enable(model, backend="sdpa"):
        loss_step(model)
    order.clear()
    model(**batch_of("plain", LENGTH))
    assert [*layer._forward_hooks] == [hook.id for hook in hooks]
    return order == [0, 1, 2] and all(vars(one).keys() == before[name].keys() for name, one in model.named_modules())


def test_disable_leaves_hooks_of_others_as_they_were() -> None:
    assert all(run_ranks(2, left_behind))


def copied() -> float:
    """The error of a copy of an enabled model that has a hook, after the model itself ran without."""
    import copy

    reference, model = LLAMA.build(), LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    loss_step(model)
    other = copy.deepcopy(model)
    other.zero_grad()
    for one in (reference, other):
        hook_results("model.layers.0", "model.layers.1.mlp")(one)
    return largest_error(reference, other, loss_step)


def test_hooks_on_a_copy_of_an_enabled_model() -> None:
    assert max(run_ranks(2, copied)) < 1e-5
