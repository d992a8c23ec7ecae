"""Logits that are made when somebody asks for them, after the loss has made its own in tiles: by the same weights.

What has written to the weights since is seen in their versions, and in some of their numbers, since optimizers of some
engines, and adapters that are merged, write past the versions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sp_attention.distributed.sharded_params import belongs_to_engine
from sp_attention.errors import UnsupportedError
from sp_attention.loss.tiled_loss import LMHeadInput

# Of a weight, about as many numbers are looked at.
_SOME = 2**10


@dataclass(frozen=True, eq=False)
class _Noted:
    """A tensor, and what tells whether it was written to since."""

    tensor: Tensor
    version: int | None
    some: Tensor | None

    @property
    def is_as_it_was(self) -> bool:
        now = _noted(self.tensor, self.some is not None)
        if self.some is None or now.some is None:
            return self.version == now.version and self.some is now.some
        kinds = [(one.dtype, one.shape, one.device) for one in (self.some, now.some)]
        return self.version == now.version and kinds[0] == kinds[1] and _same_bits(self.some, now.some)


@dataclass(frozen=True, eq=False)
class LogitsLater:
    """Logits of a forward that has ended. weights: the LM head's, by name. switches: what it has beside them."""

    given: LMHeadInput
    hidden: _Noted
    weights: Mapping[str, _Noted]
    switches: tuple[str, ...]

    def __call__(self) -> Tensor:
        """[B, s, V], with their gradient path. Raises UnsupportedError if they would not be those of the forward."""
        own, noted = dict(_weights(self.given.module)), {name: one.tensor for name, one in self.weights.items()}
        in_place = own.keys() == noted.keys() and all(own[name] is noted[name] for name in noted)
        # An engine gathers the weights that the module has when it is called, and no others.
        is_engines = any(map(belongs_to_engine, [*own.values(), *noted.values()]))
        unchanged = self.hidden.is_as_it_was and all(one.is_as_it_was for one in self.weights.values())
        if not unchanged or (is_engines and not in_place) or self.switches != _switches(self.given.module):
            raise UnsupportedError(
                f"outputs.logits: the weights of {self.given.head.name} are not those of the forward any more (an "
                "optimizer's step, a backward after which an engine has freed them, adapters that were switched or "
                "merged), and these logits are made only when they are asked for: ask for outputs.logits.part or "
                ".whole() before that, or keep all logits with enable(model, loss_tile=None)"
            )
        return self.given.logits({} if in_place else noted)


def logits_later(given: LMHeadInput) -> LogitsLater:
    """The logits of a forward that ends now, for later."""
    weights = {name: _noted(weight) for name, weight in _weights(given.module)}
    return LogitsLater(given, _noted(given.hidden, False), weights, _switches(given.module))


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _noted(tensor: Tensor, by_numbers: bool = True) -> _Noted:
    here = tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
    version = None if here.is_inference() else here._version
    # FSDP2 frees the memory of what it has gathered.
    is_gone = here.is_meta or here.untyped_storage().nbytes() < here.nbytes
    if not by_numbers or is_gone:
        return _Noted(tensor, version, None)
    try:
        flat = here.detach().reshape(-1)
        return _Noted(tensor, version, flat[:: max(1, flat.numel() // _SOME)].clone())
    except (RuntimeError, NotImplementedError, TypeError):  # Quantised ones of others, which have no numbers to show.
        return _Noted(tensor, version, None)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _switches(module: nn.Module) -> tuple[str, ...]:
    """What modules have in attributes of plain values, such as which adapters are on; not the mode."""
    plain = (bool, int, float, str, list, tuple)
    return tuple(
        f"{name}={value!r}"
        for one in module.modules()
        for name, value in vars(one).items()
        if isinstance(value, plain) and name != "training"
    )
