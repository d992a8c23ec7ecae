"""The sequence-parallel region: stacks of layers, each of which works on this rank's span of the sequence.

Before a layer, whatever still has the length of the whole sequence is cut to my span; after the last, the hidden states
are gathered, or stay sharded when the sharded loss follows. A part of a layer that mixes tokens on its own is given
whole tensors, and my span of what it returns goes on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from sp_attention import randomness
from sp_attention.agreement import SAMPLING, require_same_batch
from sp_attention.attention import Mask
from sp_attention.cache import LayersCache, cached_length
from sp_attention.call import Call, Current
from sp_attention.checkpoints import Checkpoints, checkpoints_in
from sp_attention.crossing import entering, leaving, text_of, users_own
from sp_attention.dims import Extent
from sp_attention.embeddings import can_look_up, looked_up
from sp_attention.engines import most_of_engine
from sp_attention.errors import UnsupportedError
from sp_attention.exchange import Peers
from sp_attention.forward import (
    TOKENS,
    Forward,
    fills_caches,
    is_on,
    refusal,
    stays_sharded,
    with_sharded_logits,
    without_cache,
)
from sp_attention.masks import DOCUMENTS, Described
from sp_attention.piecewise import hook_pieces
from sp_attention.plan import Embedding, Layer, Part, Region, Stack, named_arguments, tensor_names
from sp_attention.tiling import Head, hold
from sp_attention.trees import Path, leaf_at, leaves, map_leaves, tensors


@dataclass
class Hooks:
    """The hooks of one enabled model, and its forward in progress, if any.

    `current` is shared with the model's attention function.
    """

    region: Region
    peers: Peers
    current: Current
    forward: Forward | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    checkpoints: Checkpoints = field(init=False)
    _only_loss: bool = False

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.current)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hooks":
        # A copied model keeps its hooks, and process groups cannot be copied.
        return self

    def install(self) -> None:
        for model in self.region.models:
            # Not looked up by the model when it is called, since that may be a copy of it.
            self._hook(model, partial(self._before_model, self.region.arguments[model]), self._after_model)
        for stack in self.region.stacks:
            if stack.embedding is not None:
                self._hook_embedding(stack.embedding, stack.layers[0].module)
            for layer in stack.layers:
                self._hook_layer(stack, layer)
                for part in layer.parts:
                    self._hook_part(part)
        head = self.region.cut or self.region.head
        if not isinstance(head, str):
            self._hook_head(head.module, head.name)
        for module in self.region.pieces:
            self.handles += hook_pieces(module, self._pieces, self.region.random)

    @contextmanager
    def only_loss(self) -> Iterator[None]:
        """Within it nobody looks at logits, in evaluation either."""
        before, self._only_loss = self._only_loss, True
        try:
            yield
        finally:
            self._only_loss = before

    def hook_instead(self, stacks: tuple[Stack, ...]) -> None:
        """Hook these stacks in place of the region's."""
        self.remove()
        self.region = replace(self.region, stacks=stacks)
        self.install()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _hook(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        # A compiled model runs these as they are, and compiles what is between them.
        before, after = torch.compiler.disable(before), torch.compiler.disable(after)
        self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        # First, so that the hooks of others see what the rest of the model sees; always, so that an error within
        # leaves nothing in progress behind.
        self.handles.append(module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True))

    # Models

    def _before_model(
        self, seen: frozenset[str], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = named_arguments(model, args, kwargs)
        tensors_given = frozenset(id(tensor) for _, tensor in tensors(given))
        unseen = bool(tensor_names(given) - seen - set(TOKENS))  # Tokens and their embeddings are alike.
        if self.forward is not None and self.forward.model is not model:
            self.current.given |= tensors_given
            # A model inside the one that was called.
            self.forward.unseen |= unseen
            self.forward.records |= is_on("output_hidden_states", model, given)
            return
        caches = [value for value in given.values() if isinstance(value, Cache)]
        mode: dict[str, Any] = {
            "(training)": model.training,
            "(gradients)": torch.is_grad_enabled(),
            "(only the loss)": self._only_loss,
            "(tokens in the cache)": max(map(cached_length, caches), default=0),
        }
        if (caches or given.get("use_cache")) and not torch.is_grad_enabled():
            # A token may be sampled from what comes out. Ranks that differ in it, or in where the text ends, part here.
            mode[SAMPLING] = randomness.sampling_state(model.device)
        # Masks too, where generate() made them beforehand.
        described = [(".".join(map(str, path)), leaf) for path, leaf in leaves(given) if isinstance(leaf, Described)]
        masks = {f"{name}, {part}": value for name, leaf in described for part, value in leaf.told.items()}
        require_same_batch({**given, **masks, **mode}, self.peers, model.device)
        reason = refusal(self.region, model, given)
        if reason is not None:
            raise UnsupportedError(reason)
        self.current.call, self.current.weights = None, is_on("output_attentions", model, given)
        self.current.given, self.current.is_known, self.current.kept = tensors_given, True, {}
        self.checkpoints.unbind()
        self.forward = Forward(
            model,
            stays_sharded(self.region, model, given, self._only_loss),
            unseen,
            caches=fills_caches(self.region, model, given, bool(caches), self._only_loss),
            records=is_on("output_hidden_states", model, given),
        )
        if model.training or self._only_loss:
            self.forward.counts = self._counts_of_engine(self.forward, given)
        if model.training and self.region.random:
            self.forward.seed = randomness.shared_seed(model.device, self.peers)
        elif model.training:
            self.forward.states = randomness.states(model.device)

    def _after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        forward = self.forward
        if forward is None:
            return None
        if forward.model is model:
            self.forward, self.current.is_known = None, False
        if output is None:
            return None
        if forward.model is model:
            if forward.inside:
                raise UnsupportedError(
                    f"{', '.join(sorted(forward.inside))}: the last layer was not called, unlike in the rehearsal of "
                    "enable(): a model that skips layers (layerdrop, early exit) is not covered"
                )
            before = forward.states
            if before is not None and not randomness.are_equal(randomness.states(forward.model.device), before):
                raise UnsupportedError(
                    "random numbers were drawn in training, unlike in the rehearsal of enable(): switch dropout on "
                    "before enable()"
                )
        if isinstance(output, dict):
            for name in [name for name in output if "hidden_states" in name or "router" in name]:
                output[name] = map_leaves(lambda _, leaf: forward.recorded(leaf), output[name])
        if forward.model is not model:
            return output
        length = forward.sharded(self.region)
        if length is not None:
            output = with_sharded_logits(output, length, self.peers, forward.held)
        return output if forward.caches else without_cache(output)

    # Embeddings

    def _hook_embedding(self, embedding: Embedding, first: nn.Module) -> None:
        lengths: list[int] = []

        def before(module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            ids = args[0] if len(args) == 1 and not kwargs else None
            if ids is None or id(ids) not in self.current.given:
                return None
            if not self._looks_up_its_own(module, embedding.name, first, ids):
                return None
            lengths.append(ids.shape[1])
            span = self.peers.span(ids.shape[1])
            return (ids[:, span.start : span.stop],), {}

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not lengths:
                return None
            length = lengths.pop()
            if self.forward is None or output is None:
                return None
            self.forward.embedded = looked_up(output, length)
            return self.forward.embedded.whole

        self._hook(embedding.module, before, after)

    def _looks_up_its_own(self, module: nn.Embedding, name: str, first: nn.Module, ids: Tensor) -> bool:
        """Whether only my span of the embeddings is looked up: if nobody but the first layer gets to see them.

        A checkpoint around the hooks of the first layer would, which does without gradients, and a module that was put
        in the place that had this name.
        """
        forward = self.forward
        if forward is None or not forward.as_rehearsed or ids.shape[-1] < self.peers.size:
            return False
        if not forward.has_in_place(module, name):
            return False
        if torch.is_grad_enabled():
            models: list[nn.Module] = [] if isinstance(first, GradientCheckpointingLayer) else [*self.region.models]
            if any(getattr(model, "gradient_checkpointing", False) for model in models):
                return False
            if any(isinstance(one, CheckpointWrapper) for one in forward.model.modules()):
                return False
        return can_look_up(module, ids)

    # The head

    def _hook_head(self, module: nn.Module, name: str) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            forward, head = self.forward, self.region.head
            if forward is None or len(args) != 1 or kwargs or not forward.has_in_place(module, name):
                return None
            hidden, size = args[0], self.peers.size
            cuts = self.region.cut is not None and forward.as_rehearsed and not forward.cut
            if cuts and size <= hidden.shape[1] == forward.stays_sharded:
                forward.cut, span = hidden.shape[1], self.peers.span(hidden.shape[1])
                hidden = hidden[:, span.start : span.stop]
            length = forward.sharded(self.region)
            if length is not None and forward.held is None and isinstance(head, Head):
                _, tiles = forward.counts or self._counts(hidden.shape[0], length)
                if tiles > 1:
                    forward.held = hold(head, module, hidden, tiles)
                    hidden = hidden[:, :0]
            return (hidden,), kwargs

        hook = torch.compiler.disable(before)
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    # How many at a time

    def _counts(self, rows: int, length: int) -> tuple[int, int]:
        """In how many pieces parts of layers, and in how many tiles the head, are given this batch in training.

        As many on every rank: those of the longest span.
        """
        longest = length if length < self.peers.size else -(-length // self.peers.size)
        pieces = -(-longest // max(1, self.region.piece // max(1, rows))) if self.region.pieces else 1
        return pieces, self.region.head.tiles(rows * longest) if isinstance(self.region.head, Head) else 1

    def _counts_of_engine(self, forward: Forward, given: dict[str, Any]) -> tuple[int, int] | None:
        """Those of the longest of the sequences that all ranks of an engine have, None where there is no engine.

        If the logits of one are whole, those of none are in tiles.
        """
        if not self.region.pieces and isinstance(self.region.head, str):
            return None
        shapes = [given[name].shape[:2] for name in TOKENS if isinstance(given.get(name), Tensor)]
        pieces, tiles = zip((1, 1), *(self._counts(*shape) for shape in shapes if len(shape) == 2), strict=True)
        is_sharded = (forward.stays_sharded or 0) >= self.peers.size and forward.as_rehearsed
        counts = [max(pieces), max(tiles), not is_sharded]
        most = most_of_engine(counts, forward.model.parameters(), forward.model.device)
        return None if most is None else (most[0], 1 if most[2] else most[1])

    def _pieces(self, module: nn.Module) -> int:
        return self.current.pieces if module.training or self._only_loss else 1

    # Layers

    def _hook_layer(self, stack: Stack, layer: Layer) -> None:
        checkpoints = checkpoints_in(layer.module)
        entered: list[tuple[Call, Call | None, int, Callable[[], None]]] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call_of(stack, layer, (args, kwargs))

            def given_instead(path: Path, leaf: Any) -> Any:
                if isinstance(leaf, Cache):
                    return LayersCache(leaf, layer.heads, self.current, self.peers) if call.fills else None
                return entering(path, leaf, layer, call)

            given = map_leaves(given_instead, (args, kwargs))
            mine = call.is_shared and not layer.gathered
            entered.append((call, self.current.call, self.current.pieces, self._drawing(call, layer.name, mine)))
            self.current.pieces = call.pieces
            self.current.call = call if mine or (call.fills and not layer.gathered) else None
            if self.forward is not None and self.forward.records and call.is_shared:
                self.forward.note(leaf_at(given, layer.hidden), layer.arguments[layer.hidden], call)
            offloads_from = self.region.models[0].device.type if self.region.offloads else None
            runs_again = self.checkpoints.bind(checkpoints, offloads_from)
            if self.region.offloads and not runs_again and module.training and torch.is_grad_enabled():
                raise UnsupportedError(
                    f"offload=True, and nothing checkpoints {layer.name}, so nothing of it can be kept in CPU memory: "
                    "call model.gradient_checkpointing_enable() before you train, or leave offload out"
                )
            return given

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            self.checkpoints.unbind()
            if not entered:
                return None  # An error before this layer began.
            call, self.current.call, self.current.pieces, restore = entered.pop()
            restore()
            is_last = layer is stack.layers[-1]
            if is_last and self.forward is not None:
                self.forward.inside.discard(stack.name)
            if output is None:
                return None
            if not call.is_shared:
                return map_leaves(lambda _, leaf: users_own(leaf), output)
            if self.forward is not None and self.forward.records:
                for path, tensor in tensors(output):
                    self.forward.note(tensor, layer.results.get(path), call)
            ends = call.is_separate or (is_last and not call.stays_sharded)
            return map_leaves(lambda path, leaf: leaving(path, leaf, layer, call, ends), output)

        self._hook(layer.module, before, after)

    def _call_of(self, stack: Stack, layer: Layer, given: Any) -> Call:
        """The call that a layer belongs to; it is new for the first, and for each where they are separate."""
        mask = next((leaf.mask for _, leaf in leaves(given) if isinstance(leaf, Described)), None)
        if self.forward is None:
            return self._call_again(layer, stack, mask)
        hidden, along = leaf_at(given, layer.hidden), layer.arguments[layer.hidden]
        assert along is not None
        # Whatever the model does with hidden states that it collects, it does with whole ones.
        is_separate = stack.separate or not self.forward.as_rehearsed
        call = self.forward.calls.get(stack.name)
        if layer is stack.layers[0] or is_separate:
            extent = Extent(hidden.shape[along.dim - 1 if along.dim else 1], hidden.shape[along.dim])
            self.forward.passes += 1
            call = Call(
                extent,
                self.peers,
                fills=self.forward.caches and any(isinstance(leaf, Cache) for _, leaf in leaves(given)),
                is_separate=is_separate,
                stays_sharded=not is_separate
                and stack.name == self.region.before_loss
                and self.forward.stays_sharded == extent.length,
                pieces=(self.forward.counts or self._counts(extent.batch, extent.length))[0],
                seed=randomness.derived(self.forward.seed, self.forward.passes) if self.forward.seed else None,
            )
            if stack.embedding is not None and self.forward.embedded is not None:
                call.embedded, self.forward.embedded = self.forward.embedded, None
                if hidden.requires_grad and torch.is_grad_enabled():
                    call.embedded.part.requires_grad_()
                if not call.embedded.is_whole(hidden) or call.embedded.part.requires_grad > torch.is_grad_enabled():
                    raise UnsupportedError(
                        f"{layer.name} is not given what {stack.embedding.name} looked up, unlike in the rehearsal of "
                        "enable(), or is checkpointed by other code than transformers': call enable() after whatever "
                        "changed the model"
                    )
            self.forward.calls[stack.name] = call
            if not is_separate:
                self.forward.inside.add(stack.name)
        if call is None or not (is_separate or stack.name in self.forward.inside):
            raise UnsupportedError(
                f"{layer.name} is called before the first layer of its stack, unlike in the rehearsal of enable(): a "
                "model that skips layers is not covered"
            )
        if mask is not None:
            mask.once(("call", stack.name), lambda: call)
        return call

    def _call_again(self, layer: Layer, stack: Stack, mask: Mask | None) -> Call:
        """The call of a layer that a checkpoint around its hooks recomputes in backward: the mask remembers it."""
        call = None if mask is None else mask.once(("call", stack.name), lambda: None)
        if call is None or (call.is_separate and call.seed is not None):
            raise UnsupportedError(_outside(layer.name))
        return call

    def _drawing(self, call: Call, name: str, mine: bool) -> Callable[[], None]:
        """Let a layer or a part draw random numbers of its own, or those that all ranks draw; returns what ends it."""
        if call.seed is None:
            return lambda: None
        seed = randomness.derived(call.seed, name, *([self.peers.rank] if mine else []))
        return randomness.forked(seed, self.region.models[0].device)

    # Parts

    def _hook_part(self, part: Part) -> None:
        entered: list[tuple[Call | None, Callable[[], None]]] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self.current.call
            if call is None and not self.current.is_known:
                raise UnsupportedError(_outside(part.name))
            if call is None or not call.is_shared:
                entered.append((call, lambda: None))
                self.current.call = call if part.attends else None
                return None

            def whole(path: Path, leaf: Any) -> Any:
                if not isinstance(leaf, Tensor) or path[1] in DOCUMENTS:
                    return leaf
                if call.original(leaf) is not leaf:
                    return call.original(leaf)
                if path not in part.arguments and not {call.mine.length, call.extent.length}.isdisjoint(leaf.shape):
                    raise UnsupportedError(
                        f"{part.name}: the argument {text_of(path)} {list(leaf.shape)} is not what enable() saw in its "
                        "rehearsal"
                    )
                along = part.arguments.get(path)
                return leaf if along is None or not call.is_part(leaf, along) else call.whole(leaf, along)

            given = map_leaves(whole, (args, kwargs))
            entered.append((call, self._drawing(call, part.name, mine=False)))
            self.current.call = replace(call, is_replicated=True) if part.attends and call.fills else None
            return given

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not entered:
                return None
            call, restore = entered.pop()
            self.current.call = call
            restore()
            if output is None or call is None or not call.is_shared:
                return None

            def mine(path: Path, leaf: Any) -> Any:
                along = part.results.get(path)
                if along is None or not isinstance(leaf, Tensor) or not call.is_whole(leaf, along):
                    return leaf
                return call.part(leaf, along)

            return map_leaves(mine, output)

        self._hook(part.module, before, after)


def _outside(name: str) -> str:
    if not torch.is_grad_enabled():  # A checkpoint that recomputes in backward needs gradients.
        return (
            f"{name} is called outside of a forward of its model, as generate() calls an encoder, and nothing tells "
            "what sequence it is of: do this within handle.suspended(), by the whole model on every rank"
        )
    return (
        f"{name} runs outside of a forward of its model, and nothing tells what sequence it is of: to checkpoint it "
        "use model.gradient_checkpointing_enable()"
    )
