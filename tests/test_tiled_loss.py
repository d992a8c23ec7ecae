"""Losses in tiles of logits, parts of layers in pieces, inputs saved elsewhere: the numbers of one process, by less."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import MODELS, Tiny, batch_of
from test_parity import relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sp_attention
from sp_attention.launch import run_ranks
from sp_attention.region import activation_checkpoint

TILE = 5
SOFTCAP = Tiny("Gemma2ForCausalLM", {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0})
GRANITE = Tiny("GraniteForCausalLM", {"logits_scaling": 3.0})
LLAMA = MODELS["llama-6q3kv"]
Batch = Mapping[str, Any]


def sizes_given(module: nn.Module) -> set[int]:
    """The numbers of tokens that a module is given, filled in as it is called."""
    found: set[int] = set()
    module.register_forward_pre_hook(lambda module, args: found.add(args[0].shape[:-1].numel()))
    return found


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def losses_of_two(model: nn.Module, batch: Batch) -> Tensor:
    """Of two forwards before a backward, with other lengths and so with other tiles."""
    return model(**batch).loss + 2 * model(**batch_of("packed", 20)).loss


def counted(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch, num_items_in_batch=torch.tensor(7)).loss


def shifted(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch["labels"]
    return model(**batch, shift_labels=F.pad(labels, (0, 2), value=-100)[:, 2:].contiguous()).loss


def with_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's loss, and one of all logits, which are made when they are asked for."""
    output = model(**batch)
    logits = output.logits if isinstance(output.logits, Tensor) else output.logits.whole()
    return output.loss + F.cross_entropy(logits[:, 16], torch.arange(2))


def classified(model: nn.Module, batch: Batch) -> Tensor:
    return model(input_ids=batch["input_ids"], labels=torch.tensor([0, 1])).loss


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def frozen_head(model: nn.Module) -> nn.Module:
    model.lm_head.requires_grad_(False)
    return model


def only_head(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


def hooked(model: nn.Module) -> nn.Module:
    """With a hook of the user's on the gradient of the head's weights."""
    model.lm_head.weight.register_hook(lambda grad: 3 * grad)
    return model


def hooked_inside(model: nn.Module) -> nn.Module:
    """With hooks of the user's on gradients of weights of an MLP and of a norm."""
    for weight in (model.model.layers[1].mlp.up_proj.weight, model.model.layers[1].input_layernorm.weight):
        weight.register_hook(lambda grad: 3 * grad)
    return model


def frozen_inside(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.requires_grad_(False)
    return model


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def ddp(model: nn.Module, **options: bool) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fsdp(model: nn.Module, apart: str = "") -> nn.Module:
    """`apart`: modules that are units of their own, whose weights are there only while they are called."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    units = [module for name, module in model.named_modules() if apart and name.endswith(apart)]
    for module in (*units, *model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


# A model, what is done to it and to the reference, what is done to it alone, its batch and what is computed.
Case = tuple[Tiny, Callable[..., nn.Module], Callable[..., nn.Module], str, Callable[..., Tensor]]
CASES: dict[str, Case] = {
    "plain": (LLAMA, as_it_is, as_it_is, "plain", loss_of),
    "padded": (LLAMA, as_it_is, as_it_is, "left-padded", loss_of),
    "packed": (LLAMA, as_it_is, as_it_is, "packed", loss_of),
    "a rank without targets": (LLAMA, as_it_is, as_it_is, "prompt-masked", loss_of),
    "tied": (MODELS["llama-tied"], as_it_is, as_it_is, "plain", loss_of),
    "a bias in the head": (Tiny("PhiForCausalLM"), as_it_is, as_it_is, "plain", loss_of),
    "experts": (MODELS["mixtral"], as_it_is, as_it_is, "plain", loss_of),
    "logits capped": (SOFTCAP, as_it_is, as_it_is, "plain", with_logits),
    "cut at the head": (MODELS["gpt2"], as_it_is, as_it_is, "left-padded", with_logits),
    "cut at the head, two forwards": (MODELS["gpt2"], as_it_is, as_it_is, "plain", losses_of_two),
    "cut at the head, a rank without targets": (MODELS["gpt2"], as_it_is, ddp, "prompt-masked", loss_of),
    "cut at the head, a region around every layer": (
        Tiny("GraniteSWAForCausalLM", {"sliding_window": 5, "logits_scaling": 3.0}),
        as_it_is,
        as_it_is,
        "plain",
        with_logits,
    ),
    "logits scaled": (GRANITE, as_it_is, as_it_is, "left-padded", loss_of),
    "logits scaled, fsdp2": (GRANITE, as_it_is, partial(fsdp, apart="lm_head"), "plain", loss_of),
    "num_items_in_batch": (LLAMA, as_it_is, as_it_is, "right-padded", counted),
    "shift_labels": (LLAMA, as_it_is, as_it_is, "plain", shifted),
    "logits": (LLAMA, as_it_is, as_it_is, "plain", with_logits),
    "two forwards": (LLAMA, as_it_is, as_it_is, "plain", losses_of_two),
    "frozen head": (LLAMA, frozen_head, as_it_is, "plain", loss_of),
    "only the head": (LLAMA, only_head, as_it_is, "plain", loss_of),
    "hook on a weight": (LLAMA, hooked, as_it_is, "plain", loss_of),
    "checkpointed": (LLAMA, as_it_is, partial(checkpointed, reentrant=False), "plain", losses_of_two),
    "checkpointed, re-entrant": (LLAMA, as_it_is, partial(checkpointed, reentrant=True), "plain", losses_of_two),
    "ddp": (LLAMA, as_it_is, ddp, "plain", loss_of),
    "ddp, static graph": (LLAMA, as_it_is, partial(ddp, static_graph=True), "plain", loss_of),
    "ddp, unused parameters": (LLAMA, as_it_is, partial(ddp, find_unused_parameters=True), "plain", loss_of),
    "fsdp2": (LLAMA, as_it_is, fsdp, "plain", with_logits),
    "fsdp2, head apart": (LLAMA, as_it_is, partial(fsdp, apart="lm_head"), "plain", loss_of),
    "fsdp2, checkpointed": (
        LLAMA,
        as_it_is,
        lambda model: fsdp(checkpointed(model, reentrant=False), apart="lm_head"),
        "plain",
        losses_of_two,
    ),
}


def error_of(
    case: Case, measured: str | tuple[str, ...] = "lm_head", offloads: bool = False, **options: Any
) -> tuple[float, int, str]:
    """The largest relative error of loss and gradients, to what may be; the most tokens that a module was given; the
    report. `measured`: the name of that module."""
    tiny, prepared, wrapped, kind, computed = case
    reference, model = prepared(tiny.build()), prepared(tiny.build())
    handle = sp_attention.enable(model, backend="sdpa", **options)
    handle.hooks.plan = replace(handle.hooks.plan, offloads=offloads)
    sizes = sizes_given(next(module for name, module in model.named_modules() if name.endswith(measured)))
    whole = wrapped(model)
    losses = []
    for each in (reference, whole):
        loss = computed(each, batch_of(kind, 33))
        loss.backward()
        losses.append(loss.detach())
    if not isinstance(whole, DistributedDataParallel) and not isinstance(next(model.parameters()), DTensor):
        sp_attention.average_gradients(model)
    errors = [relative_error(losses[1], losses[0])]
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert (grad is None) == (theirs[name].grad is None), name
        if grad is not None:
            errors.append(relative_error(grad, theirs[name].grad))
    return max(errors) / tiny.tolerance, max(sizes), handle.report()


def errors_of_cases() -> dict[str, tuple[float, int, str]]:
    return {name: error_of(case, loss_tile=TILE) for name, case in CASES.items()}


@cache
def in_tiles(ranks: int) -> list[dict[str, tuple[float, int, str]]]:
    return run_ranks(ranks, errors_of_cases, timeout=300)


@pytest.mark.parametrize("ranks", [2, 3], ids="P{}".format)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_one_process(name: str, ranks: int) -> None:
    for each in in_tiles(ranks):
        error, tokens, report = each[name]
        assert error < 1
        assert "the loss makes those of 5 tokens at a time" in report
        # Only the whole logits that are asked for are made at once.
        assert tokens <= TILE or CASES[name][-1] is with_logits


# With parts of layers in pieces too.
PIECES = {
    name: CASES[name]
    for name in (
        "padded",
        "two forwards",
        "only the head",
        "checkpointed",
        "checkpointed, re-entrant",
        "ddp, static graph",
        "fsdp2",
    )
} | {
    "hooks on weights": (LLAMA, hooked_inside, as_it_is, "plain", loss_of),
    "frozen MLP": (LLAMA, frozen_inside, as_it_is, "plain", loss_of),
    "phi, its MLP without a gate": (Tiny("PhiForCausalLM"), as_it_is, as_it_is, "plain", loss_of),
    "dense and experts": (
        Tiny(
            "Qwen3MoeForCausalLM",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "experts_implementation": "eager",
                "mlp_only_layers": [0],
                "moe_intermediate_size": 32,
            },
            1e-3,
        ),
        as_it_is,
        as_it_is,
        "plain",
        loss_of,
    ),
    "fsdp2, MLP apart": (LLAMA, as_it_is, partial(fsdp, apart="mlp"), "plain", loss_of),
    "fsdp2, checkpointed": CASES["fsdp2, checkpointed"],
    "labels of sequences": (Tiny("LlamaForSequenceClassification"), as_it_is, as_it_is, "plain", classified),
}


def errors_of_pieces() -> dict[str, tuple[float, int, str]]:
    return {name: error_of(case, mlp_tile=4, measured=("act_fn", "activation_fn")) for name, case in PIECES.items()}


@cache
def in_pieces(ranks: int) -> list[dict[str, tuple[float, int, str]]]:
    return run_ranks(ranks, errors_of_pieces, timeout=300)


@pytest.mark.parametrize("ranks", [2, 3], ids="P{}".format)
@pytest.mark.parametrize("name", PIECES)
def test_parts_in_pieces_give_the_gradients_of_one_process(name: str, ranks: int) -> None:
    for each in in_pieces(ranks):
        error, tokens, report = each[name]
        assert error < 1
        assert tokens <= 4
        assert "mlp: position-wise, 4 tokens at a time in training" in report
        assert "layernorm: position-wise, 4 tokens at a time in training" in report
        assert ("all tokens at a time, since transformers records" in report) == (name == "dense and experts")


def error_of_views() -> tuple[float, int, str]:
    return error_of((MODELS["gpt2"], as_it_is, as_it_is, "left-padded", loss_of), mlp_tile=4, measured=".act")


def test_an_mlp_that_makes_views_of_rows_is_given_contiguous_pieces() -> None:
    for error, tokens, report in run_ranks(2, error_of_views):
        assert error < 1
        assert tokens <= 4
        assert "ln_2: position-wise, 4 tokens at a time in training" in report


class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
    """Stands in for `save_on_cpu`, which has no other memory here to save in: in copies, which are counted."""

    saved: ClassVar[list[torch.Size]] = []

    def __init__(self, pin_memory: bool, device_type: str) -> None:
        assert (pin_memory, device_type) == (True, "cpu")

        def pack(tensor: Tensor) -> Any:
            self.saved.append(tensor.shape)
            return tensor.detach().numpy().copy()

        super().__init__(pack, torch.from_numpy)


def offloaded() -> dict[str, tuple[float, list[torch.Size]]]:
    activation_checkpoint.save_on_cpu = Elsewhere
    found = {}
    for name in ("checkpointed", "checkpointed, re-entrant", "fsdp2, checkpointed"):
        Elsewhere.saved.clear()
        error, *_ = error_of(CASES[name], loss_tile=TILE, mlp_tile=4, offloads=True)
        found[name] = error, list(Elsewhere.saved)
    model = LLAMA.build()
    handle = sp_attention.enable(model, backend="sdpa")
    handle.hooks.plan = replace(handle.hooks.plan, offloads=True)
    with pytest.raises(
        sp_attention.UnsupportedError, match=r"nothing checkpoints model.layers.0, so nothing of it can"
    ):
        model(**batch_of("plain", 33))
    with torch.no_grad():
        model(**batch_of("plain", 33))
    model.eval()(**batch_of("plain", 33))
    return found


def test_inputs_of_checkpointed_layers_are_saved_elsewhere() -> None:
    for rank, each in enumerate(run_ranks(2, offloaded, timeout=120)):
        for error, saved in each.values():
            assert error < 1
            # Those of two layers in two forwards, and nothing else.
            assert saved == [(2, 17 - rank, 48)] * 2 + [(2, 10, 48)] * 2


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
    """Two groups of two ranks in one engine, whose batches have other numbers of tiles and pieces, in turns."""
    group = dist.get_rank() // 2
    found = []
    for apart in ("mlp", "lm_head"):
        reference, model = LLAMA.build(), LLAMA.build()
        sp_attention.enable(model, backend="sdpa", sp_size=2, loss_tile=TILE, mlp_tile=4)
        sizes = sizes_given(model.model.layers[0].mlp.act_fn)
        model = fsdp(checkpointed(model, reentrant=False), apart)
        for lengths in ((33, 9), (9, 33)):
            mine = [loss_of(reference, batch_of("plain", length)) for length in lengths]
            ours = loss_of(model, batch_of("plain", lengths[group]))
            (sum(mine) / 2).backward()
            ours.backward()
            errors = [relative_error(ours.detach(), mine[group].detach())]
            for parameter, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                errors.append(relative_error(parameter.grad.full_tensor(), theirs.grad))
            model.zero_grad()
            reference.zero_grad()
            found.append((max(errors), max(sizes)))
    return found


def test_groups_of_other_lengths_share_an_engine() -> None:
    for found in run_ranks(4, groups_of_other_lengths, timeout=200):
        assert all(error < 1e-6 and tokens <= 4 for error, tokens in found)


def numbers_saved(**options: Any) -> int:
    """How many numbers a forward keeps for backward, but for parameters."""
    model, saved = LLAMA.build(), dict[int, int]()
    sp_attention.enable(model, backend="sdpa", **options)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch_of("plain", 33)).loss
    assert loss.requires_grad
    return sum(saved.values())


def dtypes_of_pieces() -> set[torch.dtype]:
    """What an MLP computes in within autocast, and in the backward that comes after it."""
    model, dtypes = LLAMA.build(torch.float32), set[torch.dtype]()
    sp_attention.enable(model, backend="sdpa", mlp_tile=4)
    act_fn = model.model.layers[0].mlp.act_fn
    act_fn.register_forward_pre_hook(lambda module, args: dtypes.add(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch_of("plain", 33)).loss
    before = len(dtypes)
    loss.backward()
    assert before == 1
    return dtypes


def test_pieces_are_computed_again_as_they_were_in_autocast() -> None:
    assert run_ranks(2, dtypes_of_pieces) == [{torch.bfloat16}] * 2


def slopes_with_dropout() -> tuple[float, float]:
    """How the loss changes along a direction of the weights of MLPs that draw: by its gradient, and by two losses."""
    model = Tiny("GPT2LMHeadModel", {"resid_pdrop": 0.3}).build()
    handle = sp_attention.enable(model, backend="sdpa", mlp_tile=4)
    assert "mlp: position-wise, 4 tokens at a time in training" in handle.report()
    weights = [parameter for name, parameter in model.named_parameters() if ".mlp." in name]
    torch.manual_seed(5)
    directions = [torch.randn_like(weight) for weight in weights]

    def loss_at(distance: float) -> Tensor:
        torch.manual_seed(7)
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += distance * direction
        loss = model(**batch_of("plain", 33)).loss
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight -= distance * direction
        return loss

    loss_at(0.0).backward()
    sp_attention.average_gradients(model)
    by_gradient = sum(
        float((weight.grad * direction).sum()) for weight, direction in zip(weights, directions, strict=True)
    )
    step = 1e-3
    return by_gradient, float(loss_at(step).detach() - loss_at(-step).detach()) / (2 * step)


def test_pieces_that_draw_random_numbers_draw_the_same_again_in_backward() -> None:
    for by_gradient, by_losses in run_ranks(2, slopes_with_dropout):
        assert by_gradient == pytest.approx(by_losses, rel=1e-2)


def saved_by_each() -> list[int]:
    return [numbers_saved(loss_tile=None, mlp_tile=tile) for tile in (None, 4)]


def test_less_is_kept_of_parts_in_pieces() -> None:
    for rank, (at_once, in_pieces) in enumerate(run_ranks(2, saved_by_each)):
        # In each of two layers, of a token, 8 x 64 numbers that an MLP computes, and 2 x 48 of each of its two norms.
        assert at_once - in_pieces >= (17 - rank) * 2 * (8 * 64 + 2 * 2 * 48)


def compiled() -> tuple[float, float]:
    reference, model = LLAMA.build(), LLAMA.build()
    sp_attention.enable(model, backend="sdpa", loss_tile=TILE, mlp_tile=4)
    losses = []
    for each in (reference, torch.compile(model, backend="eager")):
        loss = each(**batch_of("plain", 33)).loss
        loss.backward()
        losses.append(loss.detach())
    sp_attention.average_gradients(model)
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return relative_error(*losses), max(relative_error(ours.grad, theirs.grad) for ours, theirs in pairs)


def test_a_compiled_model_computes_the_same() -> None:
    for errors in run_ranks(2, compiled, timeout=200):
        assert max(errors) < 1e-6
