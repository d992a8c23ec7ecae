"""Layers are tried again at the first forward with longer sequences than what is known of them was proven with."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from sp_attention.distributed.consistency import first_reason
from sp_attention.errors import UnsupportedError
from sp_attention.region.context import Context, StackPass
from sp_attention.region.locality import Sample, length_for, not_local
from sp_attention.region.plan import Layer, RegionPlan

# Layers are not given more tokens for it than this, or my span: a rank need not have the memory for a whole sequence.
_MOST = 32_768


@dataclass
class LengthCheck:
    """The layers to try, by their module, and the length up to which they are proven.

    to_try: those still to be tried in this forward, with sequences of `length`.
    """

    samples: dict[nn.Module, Sample]
    proven: int
    length: int = 0
    to_try: frozenset[nn.Module] = frozenset()

    @staticmethod
    def of(samples: Iterable[Sample], plan: RegionPlan, proven: int) -> "LengthCheck":
        """With what the layers of these samples are in the end in this plan."""
        found: dict[nn.Module, Sample] = {}
        layers = {layer.module: layer for stack in plan.stacks for layer in stack.layers}
        for sample in samples:
            layer = layers.get(sample.layer.module)
            if layer is not None and not layer.gathered:
                found[layer.module] = sample.planned(layer)
        return LengthCheck(found, proven)

    def begin(self, length: int) -> None:
        """A forward with sequences of `length` tokens begins, for all ranks of the group alike."""
        if length <= self.proven:
            self.to_try = frozenset()
        else:
            self.length, self.to_try = 1 << (length - 1).bit_length(), frozenset(self.samples)

    def passed(self, layer: Layer, hidden: Tensor, stack_pass: StackPass, context: Context) -> None:
        """A layer was given these hidden states. Raises UnsupportedError, on every rank, where length changes it."""
        if layer.module not in self.to_try:
            return
        sample = self.samples[layer.module]
        tokens = length_for(max(len(stack_pass.span), min(self.length, _MOST)))
        found = not_local(sample, tokens, context, trains=layer.module.training, dtype=hidden.dtype)
        reason = f"{layer.name} does something else" if found else None
        reason = first_reason(reason, stack_pass.peers)
        if reason is not None:
            raise UnsupportedError(
                f"{reason} in a sequence of {tokens} tokens than in one of {self.proven}, to which enable() has proven "
                f"it: pass enable(longest={self.length}), so that it gathers what has to be"
            )
        self.to_try -= {layer.module}
        if not self.to_try:
            self.proven = self.length
