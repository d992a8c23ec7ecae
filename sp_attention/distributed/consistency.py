"""What the ranks of a group tell each other before they go on: their problems, and what each was given.

A rank that raises alone leaves the others waiting in a collective, so a problem is shared first and then raised by all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sp_attention.distributed.digest import described, digest
from sp_attention.distributed.fingerprint import fingerprint
from sp_attention.distributed.peers import PartedError, Peers
from sp_attention.errors import BackendError, BatchError, Refused, UnsupportedError, told

# The name under which the state of the generator is compared that tokens are sampled with.
SAMPLING = "(random state)"
_SEED = (
    "Tokens are sampled on every rank, so torch's generators must be alike too: seed them alike before generate(), by "
    "transformers.set_seed(0)."
)

# Of what differs, as many lines are told at least.
_LINES = 40
_OTHER_BATCHES = "the ranks of this sequence-parallel group were given different batches."
_SAME_BATCH = (
    "Every rank of a group must pass the same whole batch to the model, which cuts it itself. Give the sampler the "
    "number of groups and the number of this group instead of world size and rank, seed whatever the collator draws by "
    "group, and do not cut the sequence yourself."
)
_SAME_MODE = (
    "What is in parentheses is how the model was called: modes, autocast, activation checkpointing, frozen weights and "
    "dtypes must be alike on every rank too."
)

Result = TypeVar("Result")
Mine = TypeVar("Mine")


def share_problem(problem: Exception | None, peers: Peers | None) -> None:
    """Raise the first problem any rank has, with its class and text, on every rank; return when none has one."""
    problems: list[Exception | None] = [problem]
    if peers is not None:
        peers.meet(7)
        problems = peers.all_gather_object(problem)
    first = next((found for found in problems if found is not None), None)
    if problem is not None and str(problem) == str(first):
        raise problem  # My own, which knows where it came from.
    if first is not None:
        raise first


def agreed(step: Callable[[], Result], peers: Peers | None) -> Result:
    """The result of a step; when it refuses on any rank, the same error on every rank."""
    problem: Exception | None = None
    try:
        result = step()
    except (UnsupportedError, ValueError) as error:
        problem = error
    share_problem(problem, peers)
    return result


def in_common(names: list[str], what: str, peers: Peers) -> list[str]:
    """The names that every rank of the group has, in the order of its first rank. Raises ValueError if there are none.

    what: these are names of, as text for people.
    """
    everywhere = peers.all_gather_object(names)
    common = [name for name in everywhere[0] if all(name in here for here in everywhere)]
    if not common:
        asked = "; ".join(f"rank {rank}: {', '.join(here)}" for rank, here in enumerate(everywhere))
        raise ValueError(f"the ranks of this group are to use different {what}: {asked}")
    return common


def first_reason(reason: str | None, peers: Peers) -> str | None:
    """The first reason that any rank has, on every rank; None when none has one."""
    return next((found for found in _of_all(reason, peers) if found is not None), None)


def _of_all(mine: Mine, peers: Peers) -> list[Mine]:
    peers.meet(8)
    return peers.all_gather_object(mine)


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
        reason = str(error) if isinstance(error, UnsupportedError) else told(error)
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
    everyone = peers.all_gather_object(dict(options))
    for name in options:
        values = [given[name] for given in everyone]
        if any(value != values[0] for value in values):
            each = ", ".join(f"{name}={value!r} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"the ranks of this group call enable() with {each}: give every rank the same")


def require_same_batch(
    arguments: Mapping[str, Any], peers: Peers, device: torch.device, known: WeakTensorKeyDictionary | None = None
) -> int:
    """Raise BatchError on every rank unless all ranks were given equal `arguments`: shapes, dtypes and every value.

    One collective of one integer a rank, which is returned; the texts travel only when something differs. `known`:
    what tensors are known to hold, for those that are given again and again.
    """
    mine = digest(arguments, device, known)
    peers.meet(1)
    numbers = torch.cat(peers.all_gather(mine.view(1))).tolist()
    if len(set(numbers)) > 1:
        told = {name: described(value, device) for name, value in arguments.items()}
        everyone = peers.all_gather_object(told)
        lines = _differences(everyone)
        mode = [_SAME_MODE] if any(line.startswith("(") for line in lines) else []
        seed = [_SEED] if any(line.startswith(SAMPLING) for line in lines) else []
        raise BatchError("\n".join([_OTHER_BATCHES, *lines, _SAME_BATCH, *mode, *seed]))
    return int(numbers[0])


def require_same(told: Mapping[str, str], peers: Peers, what: str, cure: str) -> None:
    """Raise BatchError, which says `what` differs and the `cure`, on every rank unless all have the same to tell."""
    numbers = peers.all_gather_object(fingerprint(repr(sorted(told.items())).encode()))
    if len(set(numbers)) > 1:
        everyone = peers.all_gather_object(dict(told))
        raise BatchError("\n".join([what, *_differences(everyone), cure]))


def _differences(everyone: Sequence[Mapping[str, str]]) -> list[str]:
    """A paragraph for each name under which ranks tell different things; of many, those of the first few."""
    names = list(dict.fromkeys(name for told in everyone for name in told))
    lines: list[str] = []
    left = 0
    for name in names:
        values = [told.get(name, "absent") for told in everyone]
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd and len(lines) >= _LINES:
            left += 1
        elif odd:
            lines.append(f"{name} differs on {', '.join(f'rank {rank}' for rank in odd)} from rank 0:")
            lines += [f"    rank {rank}: {value}" for rank, value in enumerate(values)]
    return [*lines, f"and {left} more"] if left else lines
