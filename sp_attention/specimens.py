"""Tiny batches for the rehearsal in enable(), made for whatever a model takes: tokens, images, audio."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from sp_attention.dims import Extent
from sp_attention.errors import UnsupportedError


@dataclass(frozen=True)
class Specimen:
    """A batch, always the same: its inputs by name, its B and S, and the length of the encoder's sequence if any."""

    inputs: Mapping[str, Any]
    extent: Extent
    memory: int | None = None


def specimens(model: PreTrainedModel, extent: Extent) -> list[Specimen]:
    """Batches of this many rows and tokens that differ in what else they give: padding, or positions.

    Row 0 of the padded one is padded on the left; the positions restart within each row, as in packed batches.
    Raises UnsupportedError for a model with inputs that nothing is known of.
    """
    takes = inspect.signature(model.forward).parameters
    maker = _Maker(model, extent)
    if getattr(model.config, "is_encoder_decoder", False):
        memory = extent.length + 3
        tokens = {"decoder_input_ids": maker.ids(extent.length)}
        if model.main_input_name == "input_ids":
            tokens["input_ids"] = maker.ids(memory)
        else:
            # An encoder of sound or images is left alone: the decoder is given what it would have returned.
            states = maker.noise(extent.batch, memory, model.config.get_text_config().hidden_size)
            tokens = {**tokens, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}
        padding = {
            name: maker.padding(length)
            for name, length in (("attention_mask", memory), ("decoder_attention_mask", extent.length))
            if name in takes and not (name == "attention_mask" and "input_ids" not in tokens)
        }
        return [Specimen({**tokens, **padding}, extent, memory), Specimen(tokens, extent, memory)]
    if "input_ids" in takes and maker.vocabulary is not None:
        tokens = {"input_ids": maker.ids(extent.length)}
        positions: dict[str, Any] = {}
        if "position_ids" in takes:
            positions = {"position_ids": maker.restarting(), "use_cache": False}
            if "use_cache" not in takes:
                del positions["use_cache"]
        types = {"token_type_ids": torch.zeros_like(tokens["input_ids"])} if "token_type_ids" in takes else {}
        padding = {"attention_mask": maker.padding(extent.length)} if "attention_mask" in takes else {}
        return [Specimen({**tokens, **padding}, extent), Specimen({**tokens, **positions, **types}, extent)]
    return [Specimen({model.main_input_name: maker.signal()}, extent)]


@dataclass(frozen=True)
class _Maker:
    model: PreTrainedModel
    extent: Extent

    @property
    def vocabulary(self) -> int | None:
        config = self.model.config
        sizes = (getattr(one, "vocab_size", None) for one in (config.get_text_config(decoder=True), config))
        return next((size for size in sizes if size), None)

    def ids(self, length: int) -> Tensor:
        """Ordinary tokens [B, length]: none that the configuration gives a meaning to."""
        special: set[int] = set()

        def collect(settings: Mapping[str, Any]) -> None:
            for key, value in settings.items():
                if isinstance(value, dict):
                    collect(value)
                elif "token" in str(key):
                    special.update(one for one in (value if isinstance(value, list) else [value]) if type(one) is int)

        collect(self.model.config.to_dict())
        if self.vocabulary is None:
            raise UnsupportedError(f"{type(self.model).__name__} has no vocabulary to make tokens from")
        ordinary = torch.tensor([token for token in range(min(self.vocabulary, 1024)) if token not in special])
        picked = torch.randint(len(ordinary), (self.extent.batch, length), generator=self._generator())
        return ordinary[picked].to(self.model.device)

    def padding(self, length: int) -> Tensor:
        mask = torch.ones(self.extent.batch, length, dtype=torch.int64, device=self.model.device)
        mask[0, :2] = 0
        return mask

    def restarting(self) -> Tensor:
        first = self.extent.length // 2
        positions = torch.cat([torch.arange(first), torch.arange(self.extent.length - first)])
        return positions.expand(self.extent.batch, -1).contiguous().to(self.model.device)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator()).to(self.model.device, self.model.dtype)

    def signal(self) -> Tensor:
        """An image, a video, or sound, of the size that the configuration tells."""
        config = getattr(self.model.config, "vision_config", self.model.config)
        batch, name = self.extent.batch, self.model.main_input_name
        if name in ("pixel_values", "pixel_values_videos"):
            size = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
            height, width = (size, size) if isinstance(size, int) else tuple(size or ())[-2:] or (64, 64)
            channels = getattr(config, "num_channels", getattr(config, "in_channels", 3))
            frames = [config.num_frames] if isinstance(getattr(config, "num_frames", None), int) else []
            return self.noise(batch, *frames, channels, height, width)
        if name == "input_values":
            return self.noise(batch, 400 * self.extent.length)
        if name == "input_features":
            bands = next(
                (getattr(config, one) for one in ("num_mel_bins", "feature_size", "input_feat_per_channel")
                 if hasattr(config, one)),
                80,
            )  # fmt: skip
            return self.noise(batch, bands, 8 * self.extent.length)
        raise UnsupportedError(f"{type(self.model).__name__} takes {name!r}, of which enable() can make no example")

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)
