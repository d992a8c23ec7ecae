"""Spare memory where it is proven to change no number: sharded logits, and tiles of tokens for loss and modules."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from sp_attention.distributed.consistency import attempted
from sp_attention.errors import UnsupportedError
from sp_attention.loss.causal_lm import sharded_causal_loss
from sp_attention.loss.sharded_logits import ShardedLogits
from sp_attention.loss.tiled_loss import LMHead, liger_does, tile_for
from sp_attention.region.forward import TOKENS
from sp_attention.region.hooks import Hooks
from sp_attention.region.plan import Cut
from sp_attention.region.tiled_mlp import matrices_in
from sp_attention.rehearsal.classify import EVERYTHING, Findings, LayerFindings
from sp_attention.rehearsal.dummy_inputs import DummyBatch
from sp_attention.rehearsal.lm_head import logits_of
from sp_attention.rehearsal.trace import COMPARED, require_same, same, with_gradients

# Tokens whose logits the loss makes at a time: None for all.
LossTile = int | Literal["auto"] | None


def shard_loss(
    model: PreTrainedModel,
    hooks: Hooks,
    findings: Findings,
    dummy: DummyBatch,
    undo: ExitStack,
    loss_tile: LossTile,
) -> None:
    """Let logits stay sharded in training if all that follows the last stack works with a part of the sequence."""
    before = [name for name, extent in findings.extents.items() if extent == dummy.extent]
    if model.loss_function is not ForCausalLMLoss or "labels" not in signature(model.forward).parameters or not before:
        return
    name = next((name for name in TOKENS if name in dummy.inputs), None)
    if name is None:
        return
    ids = dummy.inputs[name]
    padding = dummy.inputs.get(name.replace("input_ids", "attention_mask"))
    labels = ids if padding is None or padding.shape != ids.shape else ids.masked_fill(padding == 0, -100)
    batch = {**dummy.inputs, "labels": labels}
    _, whole = attempted(lambda: model(**batch), hooks.peers)
    if whole is None:
        return  # Such a model wants other labels.
    loss = sharded_causal_loss(ForCausalLMLoss, hooks.peers, lambda: hooks.forward.held if hooks.forward else None)
    own = vars(model).get("_loss_function")
    model.loss_function = loss
    undo.callback(lambda: delattr(model, "_loss_function") if own is None else setattr(model, "loss_function", own))
    hooks.region = replace(hooks.region, sharded_loss=loss, before_loss=before[-1])
    span = hooks.peers.span(dummy.extent.length)

    def compare() -> None:
        output = model(**batch)
        mine = {"loss": whole["loss"], "logits": whole["logits"][:, span.start : span.stop]}
        if not isinstance(output["logits"], ShardedLogits):
            raise UnsupportedError("each layer gathers what it returns")
        if not same({"loss": output["loss"], "logits": output["logits"].part}, mine):
            raise UnsupportedError("the model computes another loss from a part of the sequence")

    with hooks.for_the_loss():  # The model may be in evaluation, so that it draws no random numbers.
        reason, _ = attempted(compare, hooks.peers, model.device)
        if reason is not None:
            hooks.region = replace(hooks.region, sharded_loss=f"computed from a part of the sequence: {reason}")
            if not _cut_at_head(model, hooks, batch, loss, compare):
                return
        _tile_loss(model, hooks, batch, loss_tile)


def _cut_at_head(
    model: PreTrainedModel,
    hooks: Hooks,
    batch: Mapping[str, Any],
    loss: Callable[..., Tensor],
    compare: Callable[[], None],
) -> bool:
    """Let hidden states be whole after the last stack, and cut them before the head; False if that differs too."""
    _, logits = attempted(lambda: logits_of(model, batch), hooks.peers, model.device)
    if logits is None:
        return False
    name = next(name for name, one in model.named_modules() if one is logits.module)
    whole = replace(hooks.region, before_loss=None)
    hooks.region = replace(whole, sharded_loss=loss, cut=Cut(name, logits.module))
    hooks.hook_instead(hooks.region.stacks)
    reason, _ = attempted(compare, hooks.peers, model.device)
    if reason is not None:
        hooks.region = whole
        hooks.hook_instead(hooks.region.stacks)
    return reason is None


def _tile_loss(model: PreTrainedModel, hooks: Hooks, batch: Mapping[str, Any], tile: LossTile) -> None:
    """Let the loss make logits in tiles, if little comes between the head and it, and the numbers are the same."""
    if tile is None:
        hooks.region = replace(hooks.region, head="enable(loss_tile=None)")
        return

    def computed() -> dict[str, Tensor]:
        output, gradients = with_gradients(model, batch)
        return {"loss": output["loss"], "logits": output["logits"].part, "gradients": gradients}

    reason, found = attempted(lambda: (logits_of(model, batch), computed()), hooks.peers, model.device)
    if found is not None:
        logits, expected = found
        module, vocabulary = logits.module, logits.tensor.shape[2]
        names = {one: name for name, one in model.named_modules()}
        tokens = tile_for(vocabulary) if tile == "auto" else tile
        tiled = LMHead(module, names[module], logits.steps, vocabulary, tokens)

        def compare() -> None:
            require_same(computed(), expected, f"{type(model).__name__} with its loss in tiles")

        for liger in (True, False) if liger_does(tiled) else (False,):
            hooks.region = replace(hooks.region, head=replace(tiled, liger=liger, tile=2))
            hooks.hook_instead(hooks.region.stacks)
            with _without_large_gradients(module):
                reason, _ = attempted(compare, hooks.peers, model.device)
            hooks.region = replace(hooks.region, head=replace(tiled, liger=liger))
            if reason is None:
                break
    if reason is not None:
        hooks.region = replace(hooks.region, head=reason)
    hooks.hook_instead(hooks.region.stacks)


@contextmanager
def _without_large_gradients(module: nn.Module) -> Iterator[None]:
    """Within it only small weights of a module are given gradients, since only those are compared."""
    large = [one for one in module.parameters() if one.requires_grad and one.numel() > COMPARED]
    for parameter in large:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in large:
            parameter.requires_grad_(True)


def cut_parts(model: PreTrainedModel, hooks: Hooks, findings: Findings, dummy: DummyBatch, tile: int) -> Findings:
    """The findings with what is said of the parts that are given some tokens at a time, now that they are.

    Raises UnsupportedError where there are none, or the model gives other numbers so.
    """
    recorded = _recorded(model)
    cut: list[nn.Module] = []

    def told(found: LayerFindings) -> LayerFindings:
        kinds = dict(found.kinds)
        for name, module in found.piecewise.items() if found.gathers != EVERYTHING else ():
            if any(recorded(*one) for one in module.named_modules(prefix=name)):
                kinds[name] += ", all tokens at a time, since transformers records what its parts return"
            else:
                kinds[name] += f", {tile} tokens at a time in training"
                cut.append(module)
        return replace(found, kinds=kinds)

    stacks = {name: tuple(map(told, layers)) for name, layers in findings.stacks.items()}
    if not any(matrices_in(module) > 1 for module in cut):
        raise UnsupportedError(
            f"mlp_tile={tile}: no part of a layer of {type(model).__name__} can be given some tokens at a time: it "
            "has to be a module beside attention with several matrices, that is given hidden states and returns hidden "
            "states, and of which transformers records nothing. Leave mlp_tile out"
        )

    def compare() -> None:
        require_same(with_gradients(model, dummy.inputs), expected, f"mlp_tile={tile}: {type(model).__name__} with it")

    with hooks.for_the_loss():  # The model may be in evaluation, so that it draws no random numbers.
        expected = with_gradients(model, dummy.inputs)
        hooks.region = replace(hooks.region, pieces=tuple(cut), piece=2)
        hooks.hook_instead(hooks.region.stacks)
        reason, _ = attempted(compare, hooks.peers, model.device)
    hooks.region = replace(hooks.region, piece=tile)
    if reason is not None:
        raise UnsupportedError(reason)
    return replace(findings, stacks=stacks)


def _recorded(model: PreTrainedModel) -> Callable[[str, nn.Module], bool]:
    """Whether transformers may record what a module of that name returns, call by call, such as a router's logits."""
    kinds: list[Any] = []
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel):
            for specs in inner.can_record_outputs.values():
                for one in specs if isinstance(specs, list) else [specs]:
                    kinds += [getattr(one, "target_class", one), getattr(one, "class_name", None)]
    classes = tuple(kind for kind in kinds if isinstance(kind, type))
    endings = tuple(kind for kind in kinds if isinstance(kind, str))
    return lambda name, module: isinstance(module, classes) or name.endswith(endings)
