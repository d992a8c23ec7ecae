"""Whole training steps of a Llama: by one process, by this library, and by DeepSpeed's sequence parallelism.

A step is forward, loss, backward, the mean of gradients over the ranks, and plain SGD, in float32. Everyone does it on
the same model and the same tokens, as the guide of each says.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sp_attention
from sp_attention.region.versions import checkpoint_activations

# By their parameters. The small one has long sequences that end in minutes.
MODELS: dict[str, dict[str, Any]] = {
    "49M": {
        "vocab_size": 49152,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "1M": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
}
MODEL = MODELS["49M"]
# What this library is asked for, in a step as it comes and where memory is short.
ENABLE: dict[str, Any] = {"backend": "sdpa"}
ENABLE_LONG: dict[str, Any] = {**ENABLE, "mlp_tile": 1024}
RATE = 1e-3
# Tokens whose logits are there at once in DeepSpeed's tiles.
TILE = 1024

ALONE, OURS, DEEPSPEED, ALST = "one process", "sp-attention", "deepspeed", "deepspeed ALST"
ALONE_LONG, OURS_LONG = "one process, checkpointing", "sp-attention, checkpointing"
# A step; its result is the loss of the whole sequence.
Step = Callable[[], float]


def make_step(name: str, length: int, sizes: Mapping[str, Any] = MODEL) -> Step:
    """The step of a contender on every rank of the default process group, which is one for ALONE."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=length)).train()
    ids = torch.randint(sizes["vocab_size"], (1, length))
    loss = LOSSES[name](model, ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> float:
        value = loss()
        sp_attention.average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def _alone(model: PreTrainedModel, ids: Tensor) -> Step:
    def backward() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return backward


def _alone_long(model: PreTrainedModel, ids: Tensor) -> Step:
    checkpoint_activations(model)
    return _alone(model, ids)


def _ours(model: PreTrainedModel, ids: Tensor) -> Step:
    sp_attention.enable(model, **ENABLE)
    return _alone(model, ids)


def _ours_long(model: PreTrainedModel, ids: Tensor) -> Step:
    sp_attention.enable(model, **ENABLE_LONG)
    checkpoint_activations(model)
    return _alone(model, ids)


def _deepspeed(model: PreTrainedModel, ids: Tensor) -> Step:
    """As in DeepSpeed's tutorial: this rank's part of a batch, and the ranks' losses weighted by their tokens."""
    mine, positions, targets = _deepspeed_part(model, ids)
    collectives: Any = importlib.import_module("torch.distributed.nn.functional")

    def backward() -> float:
        logits = model(input_ids=mine, position_ids=positions, use_cache=False).logits
        vocabulary = model.config.vocab_size
        loss = model.loss_function(logits=logits, labels=None, shift_labels=targets, vocab_size=vocabulary)
        count = (targets != -100).sum()
        losses = collectives.all_gather(loss.view(1))
        counts = collectives.all_gather(count.view(1))
        whole = sum(one * many for one, many in zip(losses, counts, strict=True)) / sum(counts)
        whole.backward()
        return float(whole.detach())

    return backward


def deepspeed_tiled_mlps(model: PreTrainedModel) -> None:
    """Let DeepSpeed give MLPs tiles of tokens, as many as its own way of it does."""
    module: Any = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")

    def tiled_mlp(self: Any, x: Tensor) -> Tensor:
        parameters = [self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight]
        tiles = math.ceil(x.shape[1] / x.shape[2])
        result: Tensor = module.TiledMLP.apply(type(self).forward, self, x, tiles, parameters)
        return result

    base: Any = model.get_decoder()
    for layer in base.layers:
        layer.mlp.forward = MethodType(tiled_mlp, layer.mlp)


def _deepspeed_alst(model: PreTrainedModel, ids: Tensor) -> Step:
    """With what DeepSpeed has for long sequences: checkpointing, and MLP and loss in tiles."""
    mine, positions, targets = _deepspeed_part(model, ids)
    module: Any = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    checkpoint_activations(model)
    deepspeed_tiled_mlps(model)
    ranks, tokens = dist.get_world_size(), ids.shape[1] - 1
    base: Any = model.get_decoder()
    head: Any = model.get_output_embeddings()

    def tile_loss(self: Any, x: Tensor, y: Tensor) -> Tensor:
        # Scaled here, since the head's gradient is made here: the mean over ranks is that of the whole sequence.
        return nn.functional.cross_entropy(head(x), y, ignore_index=-100, reduction="sum") * (ranks / tokens)

    def backward() -> float:
        hidden = base(input_ids=mine, position_ids=positions, use_cache=False).last_hidden_state
        tiles = math.ceil(hidden.shape[1] / TILE)
        loss = module.TiledFusedLogitsLoss.apply(tile_loss, model, hidden, targets, None, tiles, [head.weight], "sum")
        loss.backward()
        whole = loss.detach().view(1)
        dist.all_reduce(whole)
        return float(whole) / ranks

    return backward


def _deepspeed_part(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Let the model attend by UlyssesSPAttentionHF; this rank's tokens, their positions, and their targets."""
    comm: Any = importlib.import_module("deepspeed.comm")
    module: Any = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    module.UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=ranks,
        micro_batch_size=len(ids),
        seq_length_is_variable=True,
    )
    positions = torch.arange(ids.shape[1])[None]
    targets = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    mine, positions, targets = (whole.chunk(ranks, 1)[rank].contiguous() for whole in (ids, positions, targets))
    return mine, positions, targets


# By contender, what makes of a model and the whole tokens a forward and backward, with this rank's gradients.
LOSSES: dict[str, Callable[[PreTrainedModel, Tensor], Step]] = {
    ALONE: _alone,
    ALONE_LONG: _alone_long,
    OURS: _ours,
    OURS_LONG: _ours_long,
    DEEPSPEED: _deepspeed,
    ALST: _deepspeed_alst,
}
