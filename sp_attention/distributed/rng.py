"""Random numbers under sequence parallelism: dropout masks that ranks share, and masks that each has of its own.

What every rank computes (embeddings, heads, parts on whole tensors) must draw the same numbers on all of them; what a
rank computes for its span alone must draw others than its peers. Seeds are derived from names and never from a running
state, so that a layer that is recomputed in backward draws what it drew before.
"""

import pickle
import random
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sp_attention.distributed.fingerprint import fingerprint
from sp_attention.distributed.peers import Peers


def states(device: torch.device) -> list[Tensor]:
    """The states of Python's, numpy's and torch's generators, and of the device's; unequal when numbers were drawn."""
    return [torch.tensor(random.getstate()[1]), _as_tensor(numpy_state()), *_of_torch(device)]


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    _seed_numpy(seed)
    torch.manual_seed(seed)


def sampling_state(device: torch.device) -> int:
    """A number that tells apart the states of the generator that tokens are sampled with, alike in every process."""
    return _number_of(_of_torch(device)[-1])


def numpy_state() -> Any:
    """The state of numpy's global generator, by which models of sound mask time; None where nobody imported numpy."""
    numpy = _numpy()
    return None if numpy is None else numpy.get_state(legacy=False)


def set_numpy_state(state: Any) -> None:
    """Give numpy's global generator back a state that `numpy_state` returned."""
    if state is not None:
        _numpy().set_state(state)


def _numpy() -> Any:
    return getattr(sys.modules.get("numpy"), "random", None)


def _as_tensor(state: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


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
    return _agreed(int(torch.randint(2**62, ())), device, peers)


def make_alike(device: torch.device, peers: Peers) -> None:
    """Generators that differ between ranks are seeded, so that they draw the same; nothing is drawn from the others."""
    _agreed(None, device, peers)


def _agreed(seed: int | None, device: torch.device, peers: Peers) -> int:
    """The seed of the group's first rank, or one made of its generators' states; those that differ are seeded by it."""
    python, numpy, *others = map(_number_of, states(device))
    torchs = derived(*others)
    mine = torch.tensor([torchs if seed is None else seed, python, numpy, torchs], device=device)
    peers.meet(7)
    everyone = torch.stack(peers.all_gather(mine))
    common = int(everyone[0, 0])
    differs = (everyone != everyone[0]).any(0).tolist()
    seeds: list[Callable[[int], Any]] = [random.seed, _seed_numpy, torch.manual_seed]
    for seed_it, differ in zip(seeds, differs[1:], strict=True):
        if differ:
            seed_it(common)
    return common


def _seed_numpy(seed: int) -> None:
    if _numpy() is not None:
        _numpy().seed(seed % 2**32)


def derived(*parts: int | str) -> int:
    """A seed made of numbers and names, the same in every process."""
    return fingerprint("/".join(map(str, parts)).encode())


class Forked:
    """Within it all generators are seeded; behind it they are what they were.

    host_seed: that of Python's and numpy's, by default the same: what ranks draw from them they draw alike, since it
    decides what is done rather than what becomes of a token.

    As torch.random.fork_rng, with Python's own. That is a generator itself, and would turn back time whenever it is
    collected, where an interrupt, of which hooks are not told, has left it open.
    """

    def __init__(self, seed: int, device: torch.device, host_seed: int | None = None) -> None:
        self._seed, self._device = seed, device
        self._host_seed = seed if host_seed is None else host_seed
        self._module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)

    def __enter__(self) -> None:
        self._python, self._numpy, self._host = random.getstate(), numpy_state(), torch.get_rng_state()
        self._own = None if self._module is None else self._module.get_rng_state(self._device)
        random.seed(self._host_seed)
        _seed_numpy(self._host_seed)
        torch.manual_seed(self._seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is GeneratorExit:  # Long after: others may have seeded since.
            return
        random.setstate(self._python)
        set_numpy_state(self._numpy)
        torch.set_rng_state(self._host)
        if self._module is not None:
            self._module.set_rng_state(self._own, self._device)
