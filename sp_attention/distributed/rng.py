"""Random numbers under sequence parallelism: dropout masks that ranks share, and masks that each has of its own.

What every rank computes (embeddings, heads, parts on whole tensors) must draw the same numbers on all of them; what a
rank computes for its span alone must draw others than its peers. Seeds are derived from names and never from a running
state, so that a layer that is recomputed in backward draws what it drew before.
"""

import random
from collections.abc import Callable
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor

from sp_attention.distributed.fingerprint import fingerprint
from sp_attention.distributed.peers import Peers


def states(device: torch.device) -> list[Tensor]:
    """The states of Python's and torch's generators, and of the device's; unequal when numbers were drawn between."""
    return [torch.tensor(random.getstate()[1]), *_of_torch(device)]


def sampling_state(device: torch.device) -> int:
    """A number that tells apart the states of the generator that tokens are sampled with, alike in every process."""
    return _number_of(_of_torch(device)[-1])


def _of_torch(device: torch.device) -> list[Tensor]:
    found = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        found.append(torch.get_device_module(device).get_rng_state(device))
    return found


def _number_of(state: Tensor) -> int:
    return fingerprint(state.cpu().numpy().tobytes())


def are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


def shared_seed(device: torch.device, peers: Peers) -> int:
    """A seed for what follows, the same on every rank, drawn from torch's generator so that each call has its own.

    Generators that differ between ranks are seeded with it, so that from here on they draw the same.
    """
    seed = int(torch.randint(2**62, ()))
    python, *others = map(_number_of, states(device))
    mine = torch.tensor([seed, python, derived(*others)], device=device)
    everyone = torch.empty(peers.size, len(mine), dtype=torch.int64, device=device)
    peers.meet(7)
    dist.all_gather(list(everyone), mine, group=peers.group)
    seed = int(everyone[0, 0])
    differs = (everyone != everyone[0]).any(0).tolist()
    if differs[1]:
        random.seed(seed)
    if differs[2]:
        torch.manual_seed(seed)
    return seed


def derived(*parts: int | str) -> int:
    """A seed made of numbers and names, the same in every process."""
    return fingerprint("/".join(map(str, parts)).encode())


def forked(seed: int, device: torch.device) -> Callable[[], None]:
    """Seed all generators until the returned function is called, which makes them what they were.

    What torch.random.fork_rng does, opened by one hook and closed by another; it leaves Python's generator alone.
    """
    own = [] if device.type in ("cpu", "meta") else [device]
    stack = ExitStack()
    stack.enter_context(torch.random.fork_rng(own, device_type=device.type if own else "cpu"))
    stack.callback(random.setstate, random.getstate())
    random.seed(seed)
    torch.manual_seed(seed)
    return stack.close
