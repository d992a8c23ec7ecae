"""Before anything is rehearsed: whether all ranks of a group enable the same model, in the same mode."""

import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from sp_attention.distributed.consistency import require_same
from sp_attention.distributed.digest import weights_digest
from sp_attention.distributed.peers import Peers
from sp_attention.distributed.sharded_params import belongs_to_engine
from sp_attention.region.attn_implementation import configs, own_attention
from sp_attention.region.compared import autocast_of, told_modes

# Where a model was loaded from, which may be a folder of each machine's own.
_PLACES = {"_name_or_path", "name_or_path"}


def require_same_model(model: nn.Module, inner: PreTrainedModel, peers: Peers) -> None:
    """Raise BatchError on every rank unless all call `enable` with one model: classes, configurations, weights, modes.

    model: what `enable` is given, with the model of transformers inside it.
    """
    told = {
        "(class)": type(inner).__qualname__,
        "(modules)": ", ".join(dict.fromkeys(type(module).__qualname__ for module in inner.modules())),
        "(autocast)": autocast_of(inner.device),
        "(gradients)": str(torch.is_grad_enabled()),
        "(inference mode)": str(torch.is_inference_mode_enabled()),
        "(default dtype)": str(torch.get_default_dtype()),
        "(training)": str(inner.training),
        "(device)": inner.device.type,
        "(attention)": ", ".join(str(own) for _, own in own_attention(inner)),
    }
    told |= {f"({kind})": modes for kind, modes in told_modes(inner).items()}
    told |= dict(_of_configs(inner))
    if not any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):  # It names no parameters.
        told |= dict(_of_weights(inner))
    require_same(
        told,
        peers,
        "the ranks of this sequence-parallel group call enable() with different models, or in different modes.",
        "Every rank must build the model alike, with the same weights (seed its initialisation, or load them from one "
        "place), and call enable() in the same mode.",
    )


def _of_configs(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    for number, config in enumerate(configs(model)):
        values = json.loads(json.dumps(config.to_dict(), default=lambda one: type(one).__qualname__, skipkeys=True))
        for name, value in values.items():
            if name not in _PLACES:
                yield f"config.{name}" if number == 0 else f"config of model {number}.{name}", repr(value)


def _of_weights(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Names, shapes and dtypes of all weights and buffers, and what those hold that are whole, and that are saved."""
    weights = [*model.named_parameters(), *model.named_buffers()]
    buffers = dict(model.named_buffers())
    saved = {id(value) for module in model.modules() for value in _saved_buffers(module)}
    # Each rank has another part of what an engine has cut up.
    whole = {
        name: one for name, one in weights if not belongs_to_engine(one) and (name not in buffers or id(one) in saved)
    }
    contents = weights_digest(whole)
    for name, one in weights:
        shape = tuple(getattr(one, "ds_shape", one.shape))
        frozen = "" if name in buffers or one.requires_grad else ", frozen"
        content = f", content {contents[name]:016x}" if name in contents else ""
        yield name, f"{str(one.dtype).removeprefix('torch.')} {list(shape)}{frozen}{content}"


def _saved_buffers(module: nn.Module) -> Iterator[Tensor]:
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield buffer
