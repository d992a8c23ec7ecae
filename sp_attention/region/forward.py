"""A forward in progress: what a model was given, what that asks for, and what of its output becomes the user's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import TransformersKwargs

from sp_attention.distributed.peers import Peers
from sp_attention.errors import Refused
from sp_attention.loss.logits_later import logits_later
from sp_attention.loss.sharded_logits import ShardedLogits
from sp_attention.loss.tiled_loss import LMHeadInput
from sp_attention.region.context import StackPass
from sp_attention.region.others import NOBODY, Others
from sp_attention.region.plan import FOR_THE_LOSS, RegionPlan, names_of_class
from sp_attention.region.sequence_dims import Along
from sp_attention.region.sharded_embedding import LookedUp

# The arguments that are the tokens of the stack before the loss.
TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


@dataclass
class Forward:
    """A forward in progress.

    model: the one that was called. stays_sharded: S if hidden states of this length stay sharded for the loss, or are
        cut for it. cut: then, S, once they are.
    unseen: it was given tensors that the rehearsal did not show, so that anything may happen between the layers.
    ignored: the names of arguments that nothing in the model reads.
    seed: of its random numbers, None where none are drawn. states: then, those of the generators at its beginning,
        unless it may draw some outside of the layers.
    fills_caches: key/value caches are filled. has_gradients: backward may follow.
    tile_counts: how many tiles modules of layers, and the LM head, are given by all ranks of an engine; None where
        there is none, and each group of ranks counts its own.
    lm_head_input: what the LM head was given, where the loss makes logits in tiles.
    others: what others have put into the model.
    records: the user wants hidden states. recordable: then, what layers get and give, and where the sequence is in it.
    passes: how many there were through stacks. latest: the latest by the stack's name. inside: those that have not left
        their last layer.
    embedded: my span of the embeddings, on the way to the first layer.
    """

    model: PreTrainedModel
    stays_sharded: int | None
    unseen: bool
    ignored: frozenset[str] = frozenset()
    seed: int | None = None
    states: list[Tensor] | None = None
    may_draw_outside: bool = False
    passes: int = 0
    latest: dict[str, StackPass] = field(default_factory=dict)
    inside: set[str] = field(default_factory=set)
    embedded: LookedUp | None = None
    fills_caches: bool = False
    has_gradients: bool = False
    tile_counts: tuple[int, int] | None = None
    cut: int | None = None
    lm_head_input: LMHeadInput | None = None
    records: bool = False
    others: Others = NOBODY
    # A tensor that is a key is alive, so that none other is taken for it.
    recordable: dict[Tensor, tuple[Along, StackPass]] = field(default_factory=dict)

    @property
    def as_rehearsed(self) -> bool:
        """Whether nothing but the layers sees what is between them, as far as a rehearsal can tell."""
        return not (self.unseen or self.records)

    def sharded(self, plan: RegionPlan) -> int | None:
        """S if logits are made of my span of hidden states; None if of all of them."""
        latest = self.latest.get(plan.before_loss or "")
        return latest.extent.length if latest is not None and latest.stays_sharded and latest.is_shared else self.cut

    def note(self, tensor: Any, along: Along | None, stack_pass: StackPass) -> None:
        """Remember what a layer is given or returns: transformers may record it inside, before it is whole."""
        if self.records and along is not None and isinstance(tensor, Tensor) and stack_pass.is_span(tensor, along):
            self.recordable[tensor] = (along, stack_pass)

    def has_in_place(self, module: nn.Module, name: str) -> bool:
        """Whether a module stands where it had this name, and not within one that was put there, as an adapter is."""
        model: Any = self.model
        parts = name.split(".")
        # The name is of the outermost model, and one inside of it, with a part of the name, may be called alone.
        suffixes = (parts[start:] for start in range(len(parts)))
        return any(reduce(lambda one, part: getattr(one, part, None), some, model) is module for some in suffixes)

    def recorded(self, value: Any) -> Any:
        """What transformers recorded inside of the layers, as the user may see it: whole."""
        if not isinstance(value, Tensor):
            return value
        if value in self.recordable:
            along, stack_pass = self.recordable[value]
            return stack_pass.whole(value, along)
        # Router logits [B·s, experts], of which the layers' results say nothing.
        rows = Along(0, rows=True)
        for stack_pass in self.latest.values():
            if value.dim() == 2 and stack_pass.is_shared and stack_pass.is_span(value, rows):
                return stack_pass.whole(value, rows)
        return value


def shapes_of_tokens(given: Mapping[str, Any]) -> list[tuple[int, int]]:
    """B and S of each argument that is the tokens of a stack."""
    found = [given[name] for name in TOKENS if isinstance(given.get(name), Tensor)]
    return [(tensor.shape[0], tensor.shape[1]) for tensor in found if tensor.dim() > 1]


def out_of_place(model: PreTrainedModel, given: list[Tensor]) -> str | None:
    """Why a forward cannot be where it is, before anything is sent; None when it can."""
    if torch._C._are_functorch_transforms_active():
        return (
            "torch.func (grad, vmap, jvp ...) of an enabled model is not covered: compute it within "
            "handle.suspended(), by the whole model on every rank, or use autograd"
        )
    if model.device.type == "meta" and any(tensor.device.type != "meta" for tensor in given):
        return (
            f"the weights of this {type(model).__name__} are elsewhere than on its device (accelerate's cpu_offload, "
            'or a device_map with "cpu" or "disk"), which is not covered: load all of it onto one device'
        )
    return None


def refusal(plan: RegionPlan, model: PreTrainedModel, given: Mapping[str, Any]) -> str | None:
    """Why this forward cannot be exact under sequence parallelism, None when it can."""
    key = plan.implementation
    models = plan.models if model in plan.models else (model,)  # A copy has configurations of its own.
    if key is not None and any(inner.config._attn_implementation != key for inner in models):
        return "the attention implementation was changed after enable(): call handle.disable() before you change it"
    is_cached = bool(given.get("use_cache")) or any(isinstance(one, Cache) for one in given.values())
    if isinstance(plan.caches, Refused) and (is_cached or "past_key_values" in given):
        return (
            f"a key/value cache (generate(), use_cache=True, past_key_values): {plan.caches.reason}. Generate "
            "within handle.suspended(), by the whole model on every rank, or pass use_cache=False"
        )
    if "past_key_values" in given and not isinstance(given["past_key_values"], Cache):
        return f"past_key_values is a {type(given['past_key_values']).__name__}, and no Cache of transformers"
    if {"cu_seq_lens_q", "max_length_q"} <= given.keys() and "position_ids" not in given:
        return (
            "cu_seq_lens_q and max_length_q without position_ids: under sequence parallelism it is positions that "
            "start anew which say where documents begin, so pass them too"
        )
    if is_on("output_hidden_states", model, given) and not is_on("return_dict", model, given, default=True):
        return "output_hidden_states needs return_dict=True under sequence parallelism"
    return None


def stays_sharded(
    plan: RegionPlan, model: PreTrainedModel, given: Mapping[str, Any], ignored: frozenset[str], only_loss: bool
) -> int | None:
    """S if our loss, and nothing but it, will see the logits."""
    kept = given.get("logits_to_keep")
    tokens = next((given[name] for name in TOKENS if name in given), None)
    labels = [given[name] for name in ("labels", "shift_labels") if name in given]
    stays = (
        model is plan.models[0]
        and (model.training or only_loss)
        and "labels" in given
        and tokens is not None
        and all(isinstance(one, Tensor) and one.shape == tokens.shape[:2] for one in labels)
        # Another argument is for code in place of the model's own forward, which may use hidden states itself.
        and given.keys() - ignored <= own_arguments(model)
        and (kept is None or (isinstance(kept, int) and kept == 0))
        and not isinstance(plan.sharded_loss, Refused)
        # Such a mask does not remember for a recomputation that the logits stayed sharded.
        and not (isinstance(mask := given.get("attention_mask"), Tensor) and mask.dim() == 4)
        # The user may have set another since.
        and model.loss_function is plan.sharded_loss
    )
    return tokens.shape[1] if stays and tokens is not None else None


def fills_caches(
    plan: RegionPlan, model: PreTrainedModel, given: Mapping[str, Any], is_given: bool, only_loss: bool
) -> bool:
    """Whether a cache is filled: one that is given, or that the model makes. In training, only if it is asked to.

    Most models make one whenever they are not told otherwise, and nobody looks at it where it is for a loss.
    """
    makes_one = not (model.training or only_loss or isinstance(plan.caches, Refused))
    return is_given or bool(given.get("use_cache", makes_one))


def is_on(switch: str, model: PreTrainedModel, given: Mapping[str, Any], default: bool = False) -> bool:
    """Whether a switch of transformers is on: in the arguments of a forward, or else in the configuration."""
    return bool(given.get(switch, getattr(model.config, switch, default)))


def own_arguments(model: PreTrainedModel) -> set[str]:
    """The arguments that a model's class, and what it passes its keyword arguments on to, know."""
    kind: Any = type(model)
    return {*names_of_class(kind), *TransformersKwargs.__annotations__, *FOR_THE_LOSS}


def with_sharded_logits(output: Any, length: int, peers: Peers, lm_head_input: LMHeadInput | None) -> Any:
    """A causal model's output, a dict or (loss, logits, ...), with logits that cannot be taken for the whole."""
    span = output["logits"] if isinstance(output, dict) else output[1]
    if lm_head_input is None:
        logits = ShardedLogits(span.shape, length, peers, lambda: span)
    else:
        logits = ShardedLogits(lm_head_input.shape, length, peers, logits_later(lm_head_input))
    if isinstance(output, dict):
        output["logits"] = logits
        return output
    return (output[0], logits, *output[2:])


def without_cache(output: Any) -> Any:
    """A model's output without the key/value cache that it made on its own and that nobody asked for; it is empty."""
    if isinstance(output, dict) and any(isinstance(value, Cache) for value in output.values()):
        return type(output)(**{name: value for name, value in output.items() if not isinstance(value, Cache)})
    if isinstance(output, tuple):
        return tuple(item for item in output if not isinstance(item, Cache))
    return output
