"""Tiny batches for the rehearsal in enable(), made for whatever a model takes: tokens, images, audio."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from sp_attention.dims import Extent
from sp_attention.errors import UnsupportedError


@dataclass(frozen=True)
class Specimen:
    """A batch, always the same: its inputs by name, its B and S, and the length of the encoder's sequence if any.

    output: what the model gives for it on its own, where that was asked.
    """

    inputs: Mapping[str, Any]
    extent: Extent
    memory: int | None = None
    output: Any = None


def specimens(model: PreTrainedModel, narrow: Extent, wide: Extent) -> list[tuple[Specimen, Specimen]]:
    """Pairs of batches of both extents that differ in what else they give: padding, or positions.

    The narrow ones come with the model's output.

    Row 0 of the padded one is padded on the left; the positions restart within each row, as in packed batches.
    Whatever the model itself does not take is left out. Raises UnsupportedError for a model that takes none of it.
    """
    pairs: list[tuple[Specimen, Specimen]] = []
    problem: Exception | None = None
    codebooks = getattr(model.config.get_text_config(decoder=True), "num_codebooks", None) or 1
    for rows in dict.fromkeys((codebooks, 1)):
        for some, others in zip(_kinds(model, narrow, rows), _kinds(model, wide, rows), strict=True):
            for pair in zip(some, others, strict=True):
                try:
                    output = model(**pair[0].inputs)
                except Exception as error:  # whatever a model raises at what it does not take
                    problem = problem or error
                else:
                    pairs.append((replace(pair[0], output=output), pair[1]))
                    break
        if pairs:
            return pairs
    raise UnsupportedError(
        f"enable() found no small batch for {type(model).__name__}: {type(problem).__name__}: {problem}"
    )


def _kinds(model: PreTrainedModel, extent: Extent, rows: int) -> list[list[Specimen]]:
    """Kinds of batches, each with what to take instead when the model does not take it."""
    takes = inspect.signature(model.forward).parameters
    maker = _Maker(model, extent, rows)
    uncached = {"use_cache": False} if "use_cache" in takes else {}

    def kind(tokens: Mapping[str, Any], more: Mapping[str, Any], memory: int | None = None) -> list[Specimen]:
        extras = {name: value for name, value in more.items() if name in takes}
        return [Specimen({**tokens, **extras, **cache}, extent, memory) for cache in ({}, uncached)]

    if getattr(model.config, "is_encoder_decoder", False):
        memory = extent.length + 3
        tokens: dict[str, Any] = {"decoder_input_ids": maker.ids(extent.length)}
        padding = {"decoder_attention_mask": maker.padding(extent.length)}
        if model.main_input_name == "input_ids":
            tokens["input_ids"] = maker.ids(memory)
            padding["attention_mask"] = maker.padding(memory)
        else:
            # An encoder of sound or images is left alone: the decoder is given what it would have returned.
            states = maker.noise(extent.batch, memory, model.config.get_text_config().hidden_size)
            tokens["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
        # Some heads look for the one end of each text, and make the decoder's tokens out of the encoder's.
        text = {"input_ids": maker.ended(memory)}
        return [kind(tokens, padding, memory), [*kind(tokens, {}, memory), *kind(text, {}, memory)]]
    if "input_ids" in takes:
        tokens = {"input_ids": maker.ids(extent.length)}
        types = torch.zeros_like(tokens["input_ids"])
        positions = {"position_ids": maker.restarting(), "token_type_ids": types, **uncached}
        return [
            kind(tokens, {"attention_mask": maker.padding(extent.length)}),
            [*kind(tokens, positions), *kind(tokens, {})],
        ]
    return [kind({model.main_input_name: maker.signal()}, {})]


@dataclass(frozen=True)
class _Maker:
    """rows: how many rows of ids make one of the batch, as for sound in several codebooks."""

    model: PreTrainedModel
    extent: Extent
    rows: int

    @property
    def vocabulary(self) -> int:
        config = self.model.config
        sizes = (getattr(one, "vocab_size", None) for one in (config.get_text_config(decoder=True), config))
        return next((size for size in sizes if size), 64)  # No vocabulary where characters are hashed.

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
        ordinary = torch.tensor([token for token in range(min(self.vocabulary, 1024)) if token not in special])
        picked = torch.randint(len(ordinary), (self.extent.batch * self.rows, length), generator=self._generator())
        return ordinary[picked].to(self.model.device)

    def ended(self, length: int) -> Tensor:
        ids = self.ids(length)
        ids[:, -1] = getattr(self.model.config, "eos_token_id", None) or 0
        return ids

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
