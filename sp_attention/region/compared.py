"""What the ranks of a group compare before a forward: all that the model is given, and how it is called."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sp_attention.distributed import rng
from sp_attention.distributed.consistency import SAMPLING
from sp_attention.distributed.digest import Noted, described
from sp_attention.distributed.fingerprint import fingerprint
from sp_attention.region.cache_history import told_by_ranks
from sp_attention.region.kv_cache import cached_length
from sp_attention.region.masks import Described

# A dtype as a number, the same in every process.
_DTYPES = {
    dtype: number
    for number, dtype in enumerate(
        sorted({one for one in vars(torch).values() if isinstance(one, torch.dtype)}, key=str)
    )
}
# Of the names that are told of many.
_SOME = 5


def compared(model: PreTrainedModel, given: Mapping[str, Any], only_loss: bool) -> dict[str, Any]:
    """By name, what has to be alike on all ranks before a forward with these arguments: contents and modes."""
    found = {name: value for argument in given.items() for name, value in contents(*argument)}
    caches = [value for value in given.values() if isinstance(value, Cache)]
    found |= {
        "(training)": model.training,
        "(gradients)": torch.is_grad_enabled(),
        "(autocast)": autocast_of(model.device),
        "(only the loss)": only_loss,
        "(tokens in the cache)": max(map(cached_length, caches), default=0),
    }
    if torch.is_grad_enabled():  # Else nothing runs backward, where ranks would wait for each other.
        found["(parts)"] = noted_modes(model)
    elif caches or given.get("use_cache"):
        # A token may be sampled from what comes out. Ranks that differ in it, or in where the text ends, part here.
        found[SAMPLING] = rng.sampling_state(model.device)
    return found


def contents(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor in an argument by its path, and all the rest of it in words."""
    if isinstance(value, Tensor):
        yield name, value
        return
    parts = _parts(value)
    if parts is None:
        yield name, value
        return
    rest: list[str] = []
    for key, part in parts:
        for path, leaf in contents(f"{name}, {key}", part):
            if isinstance(leaf, Tensor):
                yield path, leaf
            else:
                rest.append(f"{path.removeprefix(name)}={described(leaf, torch.device('cpu'))}")
    yield f"{name} (without tensors)", f"{type(value).__qualname__}: {', '.join(rest)}"


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container holds, by its key or place; None for what is no container that is known here."""
    if isinstance(value, Described):  # Masks too, where generate() made them beforehand.
        return [*value.told.items()]
    if isinstance(value, BlockMask):
        return [*vars(value).items()]
    if isinstance(value, Cache):
        return [*told_by_ranks(value).items()]
    if isinstance(value, Mapping):
        return sorted(value.items(), key=lambda item: str(item[0]))
    if isinstance(value, (tuple, list)):
        return [*enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [*enumerate(sorted(value, key=repr))]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return [("values", torch.from_numpy(np.ascontiguousarray(value)))]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return None


def autocast_of(device: torch.device) -> str:
    """The dtype that is computed in now instead of the model's, if any."""
    kinds = {device.type, "cpu"} - {"meta"}
    on = {kind: str(torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind)}
    return ", ".join(f"{kind}: {dtype}" for kind, dtype in on.items()) or "off"


def noted_modes(model: nn.Module) -> Noted:
    """How the parts of a model take part in training: modes, checkpoints, frozen weights and dtypes."""
    flags, seen, ahead = bytearray(), set[int](), [model]
    while ahead:
        module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        held = vars(module)
        flags.append(module.training + 2 * _is_checkpoint(module))
        ahead += [one for one in held["_modules"].values() if one is not None]
        for parameter in held["_parameters"].values():
            if parameter is not None:
                flags.append(2 * _DTYPES[parameter.dtype] + parameter.requires_grad)
    number = fingerprint(bytes(flags))
    return Noted(number, lambda: f"{'; '.join(told_modes(model).values())} (all of it {number & 0xFFFFFFFF:08x})")


def told_modes(model: nn.Module) -> dict[str, str]:
    """The same in words."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    dtypes = {parameter.dtype for parameter in parameters.values()}
    told = {
        "in evaluation": [name for name, module in modules.items() if not module.training],
        "checkpointed": [name for name, module in modules.items() if _is_checkpoint(module)],
        "frozen": [name for name, parameter in parameters.items() if not parameter.requires_grad],
    } | {
        str(dtype).removeprefix("torch."): [name for name, one in parameters.items() if one.dtype == dtype]
        for dtype in sorted(dtypes, key=str)
    }
    return {kind: f"{kind}: {_some_of(names)}" for kind, names in told.items()}


def _is_checkpoint(module: nn.Module) -> bool:
    # Of its own, as a switch is that was turned on.
    return vars(module).get("gradient_checkpointing") is True or isinstance(module, CheckpointWrapper)


def _some_of(names: list[str]) -> str:
    named = ", ".join(name or "the model" for name in names[:_SOME])
    return f"{named} and {len(names) - _SOME} more" if len(names) > _SOME else named or "none"
