"""What ranks compare by a number: a fingerprint of tensors and of texts, and what is told of them when they differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sp_attention.distributed.fingerprint import fingerprint

# Odd multipliers of a multiply-and-shift hash on 64-bit integers (L'Ecuyer 1999, Steele et al. 2014).
_MIX = (0x2545F4914F6CDD1D, -0x61C8864680B583EB)
# Integers that are mixed at a time, so that large tensors take no memory.
_CHUNK = 2**22
# Of a weight, as many words at least are looked at in their places.
_SOME = 2**12
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What prints alike in every process. Other objects print their address.
_PRINTED = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype)


@dataclass(frozen=True)
class Noted:
    """What is compared by a number, and told only when it differs."""

    number: int
    told: Callable[[], str]


def digest(values: Mapping[str, Any], device: torch.device, known: WeakTensorKeyDictionary | None = None) -> Tensor:
    """A 64-bit fingerprint of values by name, as a tensor on `device`; nothing is read back to the host.

    known: the fingerprints of tensors inside of containers that are given again and again; new ones are added to it.
    """
    texts, total = [], torch.zeros((), dtype=torch.int64, device=device)
    for name, value in sorted(values.items()):
        if isinstance(value, Tensor):
            texts.append(f"{name}: {_kind(value)}")
            total = total + _remembered(value, device, known if ", " in name else None) * _salt(name)
        else:
            texts.append(f"{name}: {value.number if isinstance(value, Noted) else described(value, device)}")
    return total + _salt("\n".join(texts))


def described(value: Any, device: torch.device) -> str:
    """What differs, in words."""
    if isinstance(value, Noted):
        return value.told()
    if isinstance(value, Tensor):
        return f"{_kind(value)}, content {int(_content(value, device)) & 0xFFFFFFFF:08x}"
    return repr(value) if isinstance(value, _PRINTED) else type(value).__qualname__


def _kind(tensor: Tensor) -> str:
    # A tensor that wants a gradient on one rank alone has ranks wait for each other in backward.
    gradient = ", requires a gradient" if tensor.requires_grad else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{gradient}"


def _remembered(tensor: Tensor, device: torch.device, known: WeakTensorKeyDictionary | None) -> Tensor:
    """The content of a tensor, from `known` if it was not written to since."""
    if known is None or tensor.is_inference():  # Nothing counts what is written to such a tensor.
        return _content(tensor, device)
    version, content = known.get(tensor, (None, None))
    found: Tensor = _content(tensor, device) if content is None or version != tensor._version else content
    known[tensor] = (tensor._version, found)
    return found


def _content(tensor: Tensor, device: torch.device) -> Tensor:
    bits = tensor.detach()
    bits = bits.to_dense() if bits.layout is not torch.strided else bits
    bits = (torch.view_as_real(bits) if bits.is_complex() else bits).to(device)
    if bits.is_floating_point():
        bits = bits.contiguous().view(_INTEGERS[bits.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=device)
    first = 1
    for chunk in bits.reshape(-1).split(_CHUNK):
        places = torch.arange(first, first + chunk.numel(), device=device)
        mixed = (chunk.to(torch.int64) + places * _MIX[1]) * _MIX[0]
        mixed = (mixed ^ (mixed >> 29)) * _MIX[0]
        total = total + (mixed ^ (mixed >> 32)).sum()
        first += chunk.numel()
    return total


def _salt(text: str) -> int:
    """An odd 62-bit integer."""
    return fingerprint(text.encode()) | 1


def weights_digest(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """A 64-bit fingerprint of each of these tensors, by one pass over them; of those only that have contents here."""
    found = {name: words for name, weight in weights.items() if (words := _words(weight)) is not None}
    by_device: dict[torch.device, list[str]] = {}
    for name, words in found.items():
        by_device.setdefault(words.device, []).append(name)
    numbers: dict[str, int] = {}
    for names in by_device.values():  # Read back to the host once.
        numbers |= zip(names, torch.stack([found[name] for name in names]).tolist(), strict=True)
    return {name: number % 2**64 for name, number in numbers.items()}


def _words(weight: Tensor) -> Tensor | None:
    """The sum of all bits of a tensor, as 64-bit integers, and a fingerprint of some of them in their places."""
    if weight.is_meta:
        return None
    try:
        raw = weight.detach().contiguous().reshape(-1).view(torch.uint8)
        raw = raw.clone() if raw.storage_offset() % 8 else raw  # As of a part of a file, on the rank that reads it.
        whole = raw.numel() // 8 * 8
        words = raw[:whole].view(torch.int64)
        # Integers, of which the sum does not depend on the order, and so not on the number of threads.
        some = _content(words[:: max(1, words.numel() // _SOME)], words.device)
        return words.sum() + raw[whole:].sum() + some
    except (RuntimeError, NotImplementedError, TypeError):  # Quantised ones of others, which have no bits to show.
        return None
