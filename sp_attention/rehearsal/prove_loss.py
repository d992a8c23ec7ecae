"""Prove that the loss can be computed from this rank's span of the logits, a tile of tokens at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from sp_attention.distributed.collectives import mean_over_ranks
from sp_attention.distributed.consistency import attempted
from sp_attention.errors import Refused, UnsupportedError
from sp_attention.loss.causal_lm import LogitsInProgress, sharded_causal_loss
from sp_attention.loss.sharded_logits import ShardedLogits
from sp_attention.loss.tiled_loss import LMHead, liger_does, tile_for
from sp_attention.region.hooks import Hooks
from sp_attention.region.other_hooks import watched_by_others
from sp_attention.region.plan import NamedModule, RegionPlan, names_taken
from sp_attention.rehearsal.dummy_inputs import DummyBatch
from sp_attention.rehearsal.dummy_labels import token_labels
from sp_attention.rehearsal.findings import Findings
from sp_attention.rehearsal.lm_head import Logits, logits_of
from sp_attention.rehearsal.options import LossTile
from sp_attention.rehearsal.trace import COMPARED, require_same, same, with_gradients


@dataclass(frozen=True)
class _Computed:
    """What a model gives for a batch with labels: its loss, logits [B, S | s, V], and gradients of the loss."""

    loss: Tensor
    logits: Any
    gradients: Tensor

    @property
    def parts(self) -> list[Tensor]:
        """Of this rank, where logits stay sharded."""
        return [self.loss, self.logits.part, self.gradients]


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

    def computed() -> _Computed:
        output, gradients = with_gradients(model, batch, of="loss")
        return _Computed(output["loss"], output["logits"], gradients)

    whole = attempted(computed, hooks.peers)
    if isinstance(whole, Refused):
        # Such a model wants other labels.
        return replace(plan, sharded_loss=Refused(f"with labels of every token, {whole.reason}"))
    loss = sharded_causal_loss(ForCausalLMLoss, hooks.peers, lambda: _in_progress(hooks))
    own = vars(model).get("_loss_function")
    model.loss_function = loss
    undo.callback(lambda: delattr(model, "_loss_function") if own is None else setattr(model, "loss_function", own))
    span = hooks.peers.span(dummy.extent.length)
    expected = replace(whole, logits=whole.logits[:, span.start : span.stop])

    def compared() -> _Computed:
        mine = computed()
        if not isinstance(mine.logits, ShardedLogits):
            raise UnsupportedError("each layer gathers what it returns")
        gradients = mean_over_ranks(mine.gradients, hooks.peers)
        if not same([mine.loss, mine.logits.part, gradients], [expected.loss, expected.logits, expected.gradients]):
            raise UnsupportedError("the model computes another loss from a part of the sequence")
        return mine

    def tried(plan: RegionPlan) -> _Computed | Refused:
        with hooks.trying(plan):
            return attempted(compared, hooks.peers, model.device)

    sharded = replace(plan, sharded_loss=loss, before_loss=before[-1])
    found = tried(sharded)
    if isinstance(found, Refused):
        why = Refused(f"computed from a part of the sequence: {found.reason}")
        cut = _cut_before_head(model, hooks, replace(plan, sharded_loss=loss), batch)
        if cut is None or isinstance(found := tried(cut), Refused):
            return replace(plan, sharded_loss=why)
        sharded = cut
    return _with_tiled_loss(model, hooks, sharded, batch, loss_tile, computed, found)


def give_back_loss(model: PreTrainedModel, plan: RegionPlan) -> None:
    """Let a copy of a model that was given our loss function have its own."""
    if vars(model).get("_loss_function") is plan.sharded_loss:
        del model._loss_function
        if model.loss_function is not ForCausalLMLoss:  # It was set, and not that of its class.
            model.loss_function = ForCausalLMLoss


def _with_labels(model: PreTrainedModel, dummy: DummyBatch) -> dict[str, Any] | None:
    """A dummy batch with labels for the causal loss; None for a model that has another, or no tokens."""
    if model.loss_function is not ForCausalLMLoss or "labels" not in names_taken(model):
        return None
    labels = token_labels(dummy)
    return None if labels is None else {**dummy.inputs, "labels": labels}


def _in_progress(hooks: Hooks) -> LogitsInProgress:
    forward = hooks.forward
    if forward is None:  # Called by the user, with whole logits.
        return LogitsInProgress(False, None)
    return LogitsInProgress(forward.sharded(hooks.plan) is not None, forward.lm_head_input)


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
    model: PreTrainedModel,
    hooks: Hooks,
    plan: RegionPlan,
    batch: Mapping[str, Any],
    tile: LossTile,
    computed: Callable[[], _Computed],
    expected: _Computed,
) -> RegionPlan:
    """The plan with a loss that makes logits in tiles, if little comes between the LM head and it.

    `computed`: what the model gives for the batch, `expected` of all logits at once.
    """
    if tile is None:
        return replace(plan, lm_head=Refused("enable(loss_tile=None)"))
    with hooks.trying(plan):
        logits = attempted(lambda: logits_of(model, batch), hooks.peers, model.device)
    if isinstance(logits, Refused):
        return replace(plan, lm_head=logits)
    lm_head = _lm_head(model, logits, tile)
    refused = None

    def compare() -> None:
        require_same(computed().parts, expected.parts, f"{type(model).__name__} with its loss in tiles")

    for liger in (True, False) if liger_does(lm_head) else (False,):
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
