"""What the ranks of a group tell each other before they go on: their problems, and what batch they got.

A rank that raises alone leaves the others waiting in a collective, so a problem is shared first and then raised by all.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sp_attention.distributed.fingerprint import fingerprint
from sp_attention.distributed.peers import PartedError, Peers
from sp_attention.errors import BackendError, BatchError, Refused, UnsupportedError

# Odd multipliers of a multiply-and-shift hash on 64-bit integers (L'Ecuyer 1999, Steele et al. 2014).
_MIX = (0x2545F4914F6CDD1D, -0x61C8864680B583EB)

# The name under which the state of the generator is compared that tokens are sampled with.
SAMPLING = "(random state)"
_SEED = (
    "Tokens are sampled on every rank, so torch's generators must be alike too: seed them alike before generate(), by "
    "transformers.set_seed(0)."
)

Result = TypeVar("Result")
Mine = TypeVar("Mine")


def share_problem(problem: Exception | None, peers: Peers | None) -> None:
    """Raise the first problem any rank has, with its class and text, on every rank; return when none has one."""
    problems: list[Exception | None] = [problem]
    if peers is not None:
        peers.meet(7)
        problems = [None] * peers.size
        dist.all_gather_object(problems, problem, group=peers.group)
    first = next((found for found in problems if found is not None), None)
    if problem is not None and str(problem) == str(first):
        raise problem  # My own, which knows where it came from.
    if first is not None:
        raise first


def first_reason(reason: str | None, peers: Peers) -> str | None:
    """The first reason that any rank has, on every rank; None when none has one."""
    return next((found for found in _of_all(reason, peers) if found is not None), None)


def _of_all(mine: Mine, peers: Peers) -> list[Mine]:
    everyone = [mine] * peers.size
    peers.meet(8)
    dist.all_gather_object(everyone, mine, group=peers.group)
    return everyone


def attempted(step: Callable[[], Result], peers: Peers, device: torch.device | None = None) -> Result | Refused:
    """What a step of the rehearsal returned, or why it failed on any rank: on all ranks alike.

    Whatever the model raises is a reason; what a kernel refuses is raised, since another one can do it. `device` is
    the model's in a step with collectives.
    """
    reason, refusal, parted = None, None, None
    try:
        result = step() if device is None else peers.watched(step, device)
    except BackendError as error:
        refusal = error
    except PartedError as error:
        parted = str(error)
    except Exception as error:
        reason = str(error) if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {error}"
    share_problem(refusal, peers)
    everyone = _of_all((reason, parted), peers)
    failed = [f"rank {rank}: {found}" for rank, (found, _) in enumerate(everyone) if found is not None]
    if len(failed) == peers.size:
        return Refused(everyone[0][0] or "")
    # Where no rank failed by itself, they only part.
    why = next(iter(failed), None) or next((found for _, found in everyone if found is not None), None)
    return result if why is None else Refused(why)


def require_same_options(options: Mapping[str, Any], peers: Peers) -> None:
    """Raise ValueError on every rank unless all ranks gave `enable` these options alike."""
    everyone: list[Mapping[str, Any]] = [{}] * peers.size
    dist.all_gather_object(everyone, dict(options), group=peers.group)
    for name in options:
        values = [given[name] for given in everyone]
        if any(value != values[0] for value in values):
            each = ", ".join(f"{name}={value!r} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"the ranks of this group call enable() with {each}: give every rank the same")


def require_same_batch(arguments: Mapping[str, Any], peers: Peers, device: torch.device) -> None:
    """Raise BatchError on every rank unless all ranks were given equal `arguments`: shapes, dtypes and every value.

    One collective of one integer a rank; the texts travel only when something differs.
    """
    mine = sum((_digest(value, device) * _salt(name) for name, value in sorted(arguments.items())), _salt("batch"))
    digests = torch.empty(peers.size, dtype=torch.int64, device=device)
    peers.meet(1)
    dist.all_gather(list(digests.split(1)), torch.as_tensor(mine, device=device).view(1), group=peers.group)
    if len(set(digests.tolist())) > 1:
        described = {name: _describe(value, device) for name, value in arguments.items()}
        everyone: list[dict[str, str]] = [{} for _ in range(peers.size)]
        dist.all_gather_object(everyone, described, group=peers.group)
        raise BatchError(_difference(everyone))


def _difference(everyone: list[dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for described in everyone for name in described))
    lines = []
    for name in names:
        values = [described.get(name, "absent") for described in everyone]
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd:
            lines.append(f"{name} differs on {', '.join(f'rank {rank}' for rank in odd)} from rank 0:")
            lines += [f"    rank {rank}: {value}" for rank, value in enumerate(values)]
    return "\n".join(
        [
            "the ranks of this sequence-parallel group were given different batches.",
            *lines,
            "Every rank of a group must pass the same whole batch to the model, which cuts it itself. Give the sampler "
            "the number of groups and the number of this group instead of world size and rank, seed whatever the "
            "collator draws by group, and do not cut the sequence yourself.",
            *([_SEED] if any(line.startswith(SAMPLING) for line in lines) else []),
        ]
    )


def _describe(value: Any, device: torch.device) -> str:
    if not isinstance(value, Tensor):
        # Other objects print their address, which differs between processes.
        return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__qualname__
    content = int(_digest(value, device)) & 0xFFFFFFFF
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}, content {content:08x}"


def _salt(text: str) -> int:
    """An odd 62-bit integer."""
    return fingerprint(text.encode()) | 1


def _digest(value: Any, device: torch.device) -> Tensor:
    """A 64-bit fingerprint of a value, as a tensor on `device`; nothing is read back to the host."""
    if not isinstance(value, Tensor):
        return torch.tensor(_salt(_describe(value, device)), device=device)
    kind = _salt(f"{value.dtype} {list(value.shape)}")
    bits = value.detach().to(device)
    if bits.is_floating_point():
        bits = bits.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.itemsize])
    numbers = bits.reshape(-1).to(torch.int64)
    places = torch.arange(1, numbers.numel() + 1, device=device)
    mixed = (numbers + places * _MIX[1]) * _MIX[0]
    mixed = (mixed ^ (mixed >> 29)) * _MIX[0]
    return (mixed ^ (mixed >> 32)).sum() + kind
