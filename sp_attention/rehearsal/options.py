"""What the user asks of `enable` besides the kernel and the group."""

from dataclasses import dataclass
from typing import Literal

import torch

from sp_attention.ulysses.head_groups import HeadGroups

# Tokens whose logits the loss makes at a time: None for all.
LossTile = int | Literal["auto"] | None


@dataclass(frozen=True)
class Options:
    """The arguments of `enable` of the same names, which has their meaning; alike on all ranks of a group."""

    rehearse: bool = True
    whole_logits: bool = False
    loss_tile: LossTile = "auto"
    mlp_tile: int | None = None
    offload: bool = False
    longest: int | None = None
    head_groups: HeadGroups | None = None

    @property
    def for_one_rank(self) -> bool:
        """Whether they ask for what is of use to a rank alone: less memory in training."""
        asked = (self.mlp_tile, self.head_groups, self.loss_tile if isinstance(self.loss_tile, int) else None)
        return self.offload or any(one is not None for one in asked)

    def problem(self, device: torch.device) -> str | None:
        """What is wrong with them for a model on a device, None if nothing is."""
        for name, tile in (("loss_tile", self.loss_tile), ("mlp_tile", self.mlp_tile)):
            if tile is None or (name == "loss_tile" and tile == "auto"):
                continue
            if not isinstance(tile, int) or isinstance(tile, bool) or tile < 1:
                return f"{name}={tile!r} is no number of tokens"
            if not self.rehearse:
                return (
                    f"{name}={tile} has to be proven for this model, and rehearse=False proves nothing: leave one out"
                )
        groups = self.head_groups
        if groups not in (None, "auto") and (not isinstance(groups, int) or isinstance(groups, bool) or groups < 1):
            return f'head_groups={groups!r} is no number of groups, nor "auto"'
        if self.whole_logits and isinstance(self.loss_tile, int):
            return f"loss_tile={self.loss_tile} makes logits in tiles, and whole_logits=True all at once: leave one out"
        if self.offload and device.type == "cpu":
            return "offload=True keeps tensors of a device in CPU memory, and this model is on the CPU: leave it out"
        return None
