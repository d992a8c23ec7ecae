"""What else exchanges sequence for heads: the packages that are installed, each called as its own users call it."""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# [B, s, H | Hkv, D] and a kernel, which takes and gives [B, S, h | hkv, D] → [B, s, H, D].
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
Exchange = Callable[[Tensor, Tensor, Tensor, Kernel], Tensor]


def deepspeed(rank_length: int) -> Exchange:
    """UlyssesSPAttentionHF, which lies around an attention function of transformers. It wants the positions too."""
    comm: Any = importlib.import_module("deepspeed.comm")
    module: Any = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    made: dict[tuple[int, ...], Any] = {}
    first = dist.get_rank() * rank_length
    positions = torch.arange(first, first + rank_length)[None]
    caller = torch.nn.Module()

    def exchange(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
        shape = (len(query), *query.shape[2:], key.shape[2])
        if shape not in made:
            batch, heads, size, kv_heads = shape
            made[shape] = module.UlyssesSPAttentionHF(
                attn=None,
                batch_size=batch,
                attn_head_count=heads,
                attn_head_size=size,
                kv_head_count=kv_heads,
                num_hidden_layers=1,
                process_group=dist.group.WORLD,
                seq_length_is_variable=True,
            )

        def attention(module: object, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: object) -> Any:
            return kernel(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)), None

        made[shape].attn = attention
        heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        out: Tensor = made[shape](caller, *heads_first, None, position_ids=positions)[0]
        return out.view(query.shape)

    return exchange


def yunchang(rank_length: int) -> Exchange:
    """SeqAllToAll4D, as in its UlyssesAttention."""
    seq_all_to_all: Any = importlib.import_module("yunchang.comm.all_to_all").SeqAllToAll4D
    return _of_one(
        lambda tensor: seq_all_to_all.apply(dist.group.WORLD, tensor, 2, 1, False),
        lambda out: seq_all_to_all.apply(dist.group.WORLD, out, 1, 2, False),
    )


def ms_swift(rank_length: int) -> Exchange:
    """_SeqAllToAll, as in its DistributedAttention."""
    seq_all_to_all: Any = alone("swift.sequence_parallel.ulysses")._SeqAllToAll
    return _of_one(
        lambda tensor: seq_all_to_all.apply(dist.group.WORLD, tensor, 2, 1),
        lambda out: seq_all_to_all.apply(dist.group.WORLD, out, 1, 2),
    )


def verl(rank_length: int) -> Exchange:
    """gather_seq_scatter_heads and gather_heads_scatter_seq, as in its attention for transformers."""
    module: Any = alone("verl.utils.ulysses")
    return _of_one(
        lambda tensor: module.gather_seq_scatter_heads(tensor, seq_dim=1, head_dim=2, group=dist.group.WORLD),
        lambda out: module.gather_heads_scatter_seq(out, seq_dim=1, head_dim=2, group=dist.group.WORLD),
    )


def veomni(rank_length: int) -> Exchange:
    """gather_seq_scatter_heads and gather_heads_scatter_seq; one row without its dim, as its attention does it."""
    module: Any = alone("veomni.distributed.sequence_parallel.ulysses")

    def to_heads(tensor: Tensor) -> Tensor:
        if len(tensor) == 1:
            return module.gather_seq_scatter_heads(tensor[0], seq_dim=0, head_dim=1, group=dist.group.WORLD)[None]  # type: ignore[no-any-return]
        return module.gather_seq_scatter_heads(tensor, seq_dim=1, head_dim=2, group=dist.group.WORLD)  # type: ignore[no-any-return]

    def to_seq(out: Tensor) -> Tensor:
        if len(out) == 1:
            return module.gather_heads_scatter_seq(out[0], seq_dim=0, head_dim=1, group=dist.group.WORLD)[None]  # type: ignore[no-any-return]
        return module.gather_heads_scatter_seq(out, seq_dim=1, head_dim=2, group=dist.group.WORLD)  # type: ignore[no-any-return]

    return _of_one(to_heads, to_seq)


# By the name of the distribution: the package, and what makes its exchange for s tokens on each rank.
OTHERS: Mapping[str, tuple[str, Callable[[int], Exchange]]] = {
    "veomni": ("veomni", veomni),
    "ms-swift": ("swift", ms_swift),
    "yunchang": ("yunchang", yunchang),
    "deepspeed": ("deepspeed", deepspeed),
    "verl": ("verl", verl),
}


def reasons() -> dict[str, str | None]:
    """For each of the others why it cannot be used here, None where it can. Needs a process group."""
    return {name: _reason(name) for name in OTHERS}


def alone(module: str) -> ModuleType:
    """A module of an installed package, imported without what its packages import when they are.

    Some packages start servers' clients or demand another transformers in their `__init__`, which the exchange has no
    need of. For processes that do nothing else with the package.
    """
    *parents, _ = module.split(".")
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        if name not in sys.modules:
            bare: Any = ModuleType(name)
            if depth == 1:
                spec = find_spec(name)
                assert spec is not None
                bare.__path__ = list(spec.submodule_search_locations or ())
            else:
                above: Any = sys.modules[".".join(parents[: depth - 1])]
                bare.__path__ = [str(Path(path, parents[depth - 1])) for path in above.__path__]
            sys.modules[name] = bare
    return importlib.import_module(module)


def _reason(name: str) -> str | None:
    package, make = OTHERS[name]
    if find_spec(package) is None:
        return f"not installed: pip install {name}"
    try:
        make(1)
    except Exception as error:  # foreign code: whatever it does not find here
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def _of_one(to_heads: Callable[[Tensor], Tensor], to_seq: Callable[[Tensor], Tensor]) -> Exchange:
    """The exchange of those that trade one tensor at a time."""

    def exchange(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
        return to_seq(kernel(to_heads(query), to_heads(key), to_heads(value)))

    return exchange


def context_parallel() -> str | None:
    """Why torch's own context parallelism cannot attend here. Needs a process group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as shared

    one = torch.zeros(1, 1, 2 * dist.get_world_size(), 8)
    try:
        with shared(init_device_mesh("cpu", (dist.get_world_size(),)), buffers=[one], buffer_seq_dims=[2]):
            torch.nn.functional.scaled_dot_product_attention(one, one, one, is_causal=True)
    except Exception as error:  # a prototype, which says so itself
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "attends here; this benchmark does not know how yet, since it did not when it was written"


def quieten() -> None:
    """Let what the others print and log go to standard error, and no more than errors; standard output is the answer's.

    For processes that are there for the benchmark only.
    """
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # deepspeed warns of what it has to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
