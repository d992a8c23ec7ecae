"""Random numbers under sequence parallelism: dropout masks that ranks share, and masks that each has of its own.

What every rank computes (embeddings, heads, parts on whole tensors) must draw the same numbers on all of them; what a
rank computes for its span alone must draw others than its peers. Seeds are derived from names and never from a running
state, so that a layer that is recomputed in backward draws what it drew before.
"""

import random
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from sp_attention.distributed.fingerprint import fingerprint
from sp_attention.distributed.peers import Peers


def states(device: torch.device) -> list[Tensor]:
    """The states of Python's and torch's generators, and of the device's; unequal when numbers were drawn between."""
    return [torch.tensor(random.getstate()[1]), *_of_torch(device)]


def seed_all(seed: int) -> None:
    """Seed Python's and torch's generators."""
    random.seed(seed)
    torch.manual_seed(seed)


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


class Forked:
    """Within it all generators are seeded; behind it they are what they were.

    host_seed: that of Python's own, by default the same: what ranks draw from it they draw alike, since it decides what
    is done rather than what becomes of a token.

    As torch.random.fork_rng, with Python's own. That is a generator itself, and would turn back time whenever it is
    collected, where an interrupt, of which hooks are not told, has left it open.
    """

    def __init__(self, seed: int, device: torch.device, host_seed: int | None = None) -> None:
        self._seed, self._device = seed, device
        self._host_seed = seed if host_seed is None else host_seed
        self._module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)

    def __enter__(self) -> None:
        self._python, self._host = random.getstate(), torch.get_rng_state()
        self._own = None if self._module is None else self._module.get_rng_state(self._device)
        random.seed(self._host_seed)
        torch.manual_seed(self._seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is GeneratorExit:  # Long after: others may have seeded since.
            return
        random.setstate(self._python)
        torch.set_rng_state(self._host)
        if self._module is not None:
            self._module.set_rng_state(self._own, self._device)
