"""Tensors of whatever a model takes, the same every time: ids, masks, positions, boxes, images and sound."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

Inputs = dict[str, Any]


@dataclass(frozen=True)
class DummyTensors:
    """Tensors for B samples of a model, on its device, floats in its dtype.

    rows: how many rows of ids make one sample, as for sound in several codebooks. first_id: ids are not below it, where
    there are others. configs: where sizes of images and sound are looked for, the first before the others; by default
    the configuration of vision, or else the model's own.
    """

    model: PreTrainedModel
    batch: int
    rows: int = 1
    first_id: int = 0
    configs: tuple[PreTrainedConfig, ...] = ()

    @property
    def vocabulary(self) -> int:
        config = self.model.config
        sizes = (getattr(one, "vocab_size", None) for one in (config.get_text_config(decoder=True), config))
        return next((size for size in sizes if size), 64)  # No vocabulary where characters are hashed.

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        size = self.first("image_size", "crop_size") or 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return self.first("num_channels", "in_channels", "in_chans") or 3, height, width

    def first(self, *settings: str) -> Any:
        """The value of the first of these settings that has one, None if none has."""
        configs = self.configs or (getattr(self.model.config, "vision_config", self.model.config),)
        values = (getattr(config, setting, None) for setting in settings for config in configs)
        return next((value for value in values if value is not None), None)

    def ids(self, length: int, seed: int = 0) -> Tensor:
        """Ordinary tokens [B * rows, length]: none that the configuration gives a meaning to, if there are others."""
        special: set[int] = set()

        def collect(settings: Mapping[str, Any]) -> None:
            for key, value in settings.items():
                if isinstance(value, dict):
                    collect(value)
                elif "token" in str(key):
                    special.update(one for one in (value if isinstance(value, list) else [value]) if type(one) is int)

        collect(self.model.config.to_dict())
        first = self.first_id if self.first_id < self.vocabulary else 0
        tokens = range(first, min(self.vocabulary, 1024))
        ordinary = torch.tensor([token for token in tokens if token not in special] or tokens)
        picked = torch.randint(len(ordinary), (self.batch * self.rows, length), generator=_generator(seed))
        return ordinary[picked].to(self.model.device)

    def marked(self, length: int) -> Tensor:
        """Tokens with what heads for classes and for answers look for: three separators, or an end."""
        ids = self.ids(length)
        end, separator = (getattr(self.model.config, f"{name}_token_id", None) for name in ("eos", "sep"))
        if isinstance(separator, int):
            ids[:, -3:] = separator
        elif isinstance(end, int):
            ids[:, -1] = end
        return ids

    def boxes(self, length: int) -> Tensor:
        """Where on its page each token stands: [B, length, 4] of left, top, right, bottom."""
        corners = torch.arange(length)[:, None] + torch.tensor([0, 0, 2, 2])
        return corners.expand(self.batch, -1, -1).contiguous().to(self.model.device)

    def padding(self, length: int, left: int = 2, right: int = 0) -> Tensor:
        """A mask [B, length] whose row 0 is padded on both sides by so much."""
        mask = torch.ones(self.batch, length, dtype=torch.int64, device=self.model.device)
        mask[0, :left] = 0
        mask[0, length - right :] = 0
        return mask

    def positions(self, *rows: list[int]) -> Tensor:
        """[B, S]: those of documents of these lengths, one after the other, in each row; or in every row."""
        restarting = [torch.cat([torch.arange(length) for length in row]) for row in rows]
        return torch.stack(restarting).expand(self.batch, -1).contiguous().to(self.model.device)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=_generator()).to(self.model.device, self.model.dtype)

    def signals(self, name: str, length: int) -> list[Inputs]:
        """Images, videos or sound, of the sizes that the configuration tells, in the layouts that are in use."""
        shapes: list[tuple[int, ...]] = []
        if name in ("pixel_values", "pixel_values_videos"):
            frames = self.first("num_frames")
            shapes = [(frames, *self.image)] * isinstance(frames, int) + [self.image]
        elif name == "input_values":
            shapes = [(400 * length,)]
        elif name == "input_features":
            bands = self.first("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels") or 80
            frames = 2 * (self.first("max_source_positions") or 4 * length)
            shapes = [(bands, frames), (frames, bands)]
        return [{name: self.noise(self.batch, *shape)} for shape in shapes]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
