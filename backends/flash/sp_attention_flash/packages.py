"""The three flash-attn packages: what tells them apart, and one way to call them all.

Their public functions, as of flash-attn 2.8.3 (flash_attn/flash_attn_interface.py), FlashAttention 3
(hopper/flash_attn_interface.py) and flash-attn-4 4.0.0b36 (flash_attn/cute/interface.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sp_attention.kernels.varlen import Pattern, Sequences


@dataclass(frozen=True)
class Package:
    """A flash-attn package.

    kernel: its name among our kernels. distribution, oldest: what has to be installed, from which version on.
    load: imports the module with its functions. extension: the module of it that is compiled for one torch, if any is.
    cure: how to install it. arches: the major compute capabilities whose backward it has.
    unlimited: what it takes for an end without a window. lse: the option that returns log-sum-exps.
    dropout, sinks: whether it has them.
    """

    kernel: str
    distribution: str
    oldest: str
    load: Callable[[], Any]
    extension: str | None
    cure: str
    arches: tuple[int, ...]
    unlimited: int | None
    lse: str
    dropout: bool = False
    sinks: bool = False

    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Its attention for tensors [B, S, h, D], and for sequences of various lengths [T, h, D]. Imports it."""
        module = self.load()
        return module.flash_attn_func, module.flash_attn_varlen_func


FLASH2 = Package(
    kernel="flash2",
    distribution="flash-attn",
    oldest="2.8.3",
    load=partial(import_module, "flash_attn"),
    extension="flash_attn_2_cuda",
    cure="pip install --no-build-isolation --no-cache-dir 'flash-attn>=2.8.3,<3'",
    arches=(8, 9, 10, 12),
    unlimited=-1,
    lse="return_attn_probs",
    dropout=True,
)
FLASH3 = Package(
    kernel="flash3",
    distribution="flash_attn_3",
    oldest="3.0.0",
    load=partial(import_module, "flash_attn_interface"),
    extension="flash_attn_interface",
    cure="pip install --no-build-isolation . in the folder hopper of its repository, Dao-AILab/flash-attention",
    arches=(8, 9),
    unlimited=-1,
    lse="return_attn_probs",
)
FLASH4 = Package(
    kernel="flash4",
    distribution="flash-attn-4",
    oldest="4.0.0b36",
    load=partial(import_module, "flash_attn.cute"),
    extension=None,
    cure="pip install --pre 'flash-attn-4>=4.0.0b36' triton",
    # On an H200 (9.0), 4.0.0b36 gave wrong gradients of queries behind the first 128, and behind the first sequence.
    arches=(10, 11, 12),
    unlimited=None,
    lse="return_lse",
    sinks=True,
)
PACKAGES = (FLASH2, FLASH3, FLASH4)


def _from_hub(repository: str, version: int) -> Any:
    return import_module("kernels").get_kernel(repository, version=version)


# A build of flash-attn 2 that the package `kernels` fetches when it is first called, under transformers' name for it.
HUB2 = replace(
    FLASH2,
    kernel="transformers:kernels-community/flash-attn2",
    distribution="kernels",
    oldest="0.17",
    # The version that transformers 5.23 takes for our versions of torch.
    load=partial(_from_hub, "kernels-community/flash-attn2", 4),
    extension=None,
    cure="pip install kernels",
)


@dataclass(frozen=True)
class Options:
    """What is the same for every call of one request; sinks [h] only where the package has them."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None


def call(
    package: Package,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    sequences: Sequences | None,
    options: Options,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[B, Sq, h, D], two of [B, Sk, hkv, D] → [B, Sq, h, D]; with sequences [T, h, D], two of [T, hkv, D] → [T, h, D].

    Beside it, if asked for, log-sum-exps [B, h, Sq] or [h, Tq] in float32, through which no gradient flows.
    """
    given: dict[str, Any] = {
        "softmax_scale": options.scale,
        "causal": pattern.causal,
        "window_size": tuple(package.unlimited if end is None else end for end in (pattern.before, pattern.after)),
        "softcap": options.softcap or 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        package.lse: lse,
    }
    if options.dropout:
        given["dropout_p"] = options.dropout
    if options.sinks is not None:
        given["learnable_sink"] = options.sinks
    dense, varlen = package.functions()
    if sequences is None:
        result = dense(query, key, value, **given)
    else:
        result = varlen(
            query,
            key,
            value,
            cu_seqlens_q=sequences.query_edges,
            cu_seqlens_k=sequences.key_edges,
            max_seqlen_q=sequences.longest_query,
            max_seqlen_k=sequences.longest_key,
            **given,
        )
    # A tensor alone, or the output and what was asked for beside it; flash-attn-4 has always two.
    out, *rest = (result,) if isinstance(result, Tensor) else result
    return out, rest[0] if lse else None
