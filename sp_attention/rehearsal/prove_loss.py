"""Prove that the loss can be computed from this rank's span of the logits, a tile of tokens at a time."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from sp_attention.distributed.consistency import attempted
from sp_attention.errors import Refused, UnsupportedError
from sp_attention.loss.causal_lm import sharded_causal_loss
from sp_attention.loss.sharded_logits import ShardedLogits
from sp_attention.loss.tiled_loss import LMHead, LMHeadInput, liger_does, tile_for
from sp_attention.region.forward import TOKENS
from sp_attention.region.hooks import Hooks
from sp_attention.region.other_hooks import watched_by_others
from sp_attention.region.plan import NamedModule, RegionPlan, names_taken
from sp_attention.rehearsal.dummy_inputs import DummyBatch
from sp_attention.rehearsal.findings import Findings
from sp_attention.rehearsal.lm_head import Logits, logits_of
from sp_attention.rehearsal.options import LossTile
from sp_attention.rehearsal.trace import COMPARED, require_same, same, with_gradients


def shard_loss(
    model: PreTrainedModel,
    hooks: Hooks,
    plan: RegionPlan,
    findings: Findings,
    dummy: DummyBatch,
    undo: ExitStack,
    loss_tile: LossTile,
) -> RegionPlan:
    """The plan with logits that stay sharded in training, if all that follows the last stack works with a span.

    The model is given a loss function for it, which `undo` takes back.
    """
    before = [name for name, extent in findings.extents.items() if extent == dummy.extent]
    batch = _with_labels(model, dummy)
    if batch is None or not before:
        return plan
    head = model.get_output_embeddings()
    if head is not None and watched_by_others(head):
        return replace(plan, sharded_loss=Refused("hooks that are not sp_attention's see them, on the LM head"))
    whole = attempted(lambda: model(**batch), hooks.peers)
    if isinstance(whole, Refused):
        return plan  # Such a model wants other labels.
    loss = sharded_causal_loss(ForCausalLMLoss, hooks.peers, lambda: _lm_head_input(hooks))
    own = vars(model).get("_loss_function")
    model.loss_function = loss
    undo.callback(lambda: delattr(model, "_loss_function") if own is None else setattr(model, "loss_function", own))
    span = hooks.peers.span(dummy.extent.length)

    def compare() -> None:
        output = model(**batch)
        mine = {"loss": whole["loss"], "logits": whole["logits"][:, span.start : span.stop]}
        if not isinstance(output["logits"], ShardedLogits):
            raise UnsupportedError("each layer gathers what it returns")
        if not same({"loss": output["loss"], "logits": output["logits"].part}, mine):
            raise UnsupportedError("the model computes another loss from a part of the sequence")

    def tried(plan: RegionPlan) -> Refused | None:
        with hooks.trying(plan):
            return attempted(compare, hooks.peers, model.device)

    with hooks.for_the_loss():  # The model may be in evaluation, so that it draws no random numbers.
        sharded = replace(plan, sharded_loss=loss, before_loss=before[-1])
        refused = tried(sharded)
        if refused is not None:
            why = Refused(f"computed from a part of the sequence: {refused.reason}")
            found = _cut_before_head(model, hooks, replace(plan, sharded_loss=loss), batch)
            if found is None or tried(found) is not None:
                return replace(plan, sharded_loss=why)
            sharded = found
        return _with_tiled_loss(model, hooks, sharded, batch, loss_tile)


def _with_labels(model: PreTrainedModel, dummy: DummyBatch) -> dict[str, Any] | None:
    """A dummy batch with labels for the causal loss; None for a model that has another, or no tokens."""
    name = next((name for name in TOKENS if name in dummy.inputs), None)
    if model.loss_function is not ForCausalLMLoss or "labels" not in names_taken(model):
        return None
    if name is None:
        return None
    ids = dummy.inputs[name]
    padding = dummy.inputs.get(name.replace("input_ids", "attention_mask"))
    labels = ids if padding is None or padding.shape != ids.shape else ids.masked_fill(padding == 0, -100)
    return {**dummy.inputs, "labels": labels}


def _lm_head_input(hooks: Hooks) -> LMHeadInput | None:
    return hooks.forward.lm_head_input if hooks.forward else None


def _cut_before_head(
    model: PreTrainedModel, hooks: Hooks, plan: RegionPlan, batch: Mapping[str, Any]
) -> RegionPlan | None:
    """The plan with hidden states that are whole after the last stack, and cut before the LM head; None without one."""
    with hooks.trying(plan):
        logits = attempted(lambda: logits_of(model, batch), hooks.peers, model.device)
    if isinstance(logits, Refused):
        return None
    return replace(plan, cut_before=NamedModule(_name_in(model, logits.module), logits.module))


def _with_tiled_loss(
    model: PreTrainedModel, hooks: Hooks, plan: RegionPlan, batch: Mapping[str, Any], tile: LossTile
) -> RegionPlan:
    """The plan with a loss that makes logits in tiles, if little comes between the LM head and it."""
    if tile is None:
        return replace(plan, lm_head=Refused("enable(loss_tile=None)"))

    def computed() -> dict[str, Tensor]:
        output, gradients = with_gradients(model, batch)
        return {"loss": output["loss"], "logits": output["logits"].part, "gradients": gradients}

    with hooks.trying(plan):
        found = attempted(lambda: (logits_of(model, batch), computed()), hooks.peers, model.device)
    if isinstance(found, Refused):
        return replace(plan, lm_head=found)
    logits, expected = found
    lm_head = _lm_head(model, logits, tile)
    refused = None
    for liger in (True, False) if liger_does(lm_head) else (False,):

        def compare() -> None:
            require_same(computed(), expected, f"{type(model).__name__} with its loss in tiles")

        tiled = replace(lm_head, liger=liger)
        with hooks.trying(replace(plan, lm_head=replace(tiled, tile=2))), _without_large_gradients(lm_head.module):
            refused = attempted(compare, hooks.peers, model.device)
        if refused is None:
            return replace(plan, lm_head=tiled)
    assert refused is not None
    return replace(plan, lm_head=refused)


def _lm_head(model: PreTrainedModel, logits: Logits, tile: int | str) -> LMHead:
    vocabulary = logits.tensor.shape[2]
    tokens = tile_for(vocabulary) if isinstance(tile, str) else tile
    return LMHead(logits.module, _name_in(model, logits.module), logits.steps, vocabulary, tokens)


def _name_in(model: Any, module: nn.Module) -> str:
    names: dict[nn.Module, str] = {one: name for name, one in model.named_modules()}
    return names[module]


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
