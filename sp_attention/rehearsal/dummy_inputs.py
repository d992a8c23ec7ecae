"""Tiny batches for the rehearsal in enable(), made for whatever a model takes: tokens, images, audio."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from sp_attention.errors import UnsupportedError
from sp_attention.region.sequence_dims import Extent

Inputs = dict[str, Any]


@dataclass(frozen=True)
class DummyBatch:
    """A batch, always the same: its inputs by name, its B and S, and the length of the encoder's sequence if any.

    output: what the model gives for it on its own, where that was asked.
    """

    inputs: Mapping[str, Any]
    extent: Extent
    encoder_length: int | None = None
    output: Any = None


def dummy_batches(model: PreTrainedModel, narrow: Extent, wide: Extent) -> list[tuple[DummyBatch, DummyBatch]]:
    """Pairs of batches of both extents that differ in what else they give: padding, or positions.

    The narrow ones come with the model's output.

    Row 0 of the padded one is padded on the left; the positions restart within each row, as in packed batches.
    Whatever the model itself does not take is left out. Raises UnsupportedError for a model that takes none of it.
    """
    pairs: list[tuple[DummyBatch, DummyBatch]] = []
    problem: Exception | None = None
    codebooks = getattr(model.config.get_text_config(decoder=True), "num_codebooks", None) or 1
    for rows in dict.fromkeys((1, codebooks)):
        for some, others in zip(_kinds(model, narrow, rows), _kinds(model, wide, rows), strict=True):
            for pair in zip(some, others, strict=True):
                try:
                    output = model(**pair[0].inputs)
                    if codebooks > 1:
                        model(**pair[1].inputs)  # Rows that go together in one may not in the other.
                except Exception as error:  # whatever a model raises at what it does not take
                    problem = problem or error
                else:
                    pairs.append((replace(pair[0], output=output), pair[1]))
                    break
        if pairs:
            return pairs
    why = "nothing is known of its inputs" if problem is None else f"{type(problem).__name__}: {problem}"
    raise UnsupportedError(f"enable() found no small batch that {type(model).__name__} takes: {why}")


def _kinds(model: PreTrainedModel, extent: Extent, rows: int) -> list[list[DummyBatch]]:
    """Kinds of batches, each with what to take instead when the model does not take it."""
    takes = inspect.signature(model.forward).parameters
    maker = _Maker(model, extent, rows)
    length, encoder_length = extent.length, None
    padding: Inputs = {"attention_mask": maker.padding(length)}
    positions: Inputs = {}
    if getattr(model.config, "is_encoder_decoder", False):
        encoder_length = length + 3
        tokens = {"decoder_input_ids": maker.ids(length)}
        if model.main_input_name == "input_ids":
            padding = {"attention_mask": maker.padding(encoder_length), "decoder_attention_mask": maker.padding(length)}
            # Some heads look for the end of each text, and make the decoder's tokens out of the encoder's.
            choices: list[Inputs] = [
                tokens | {"input_ids": maker.ids(encoder_length)},
                {"input_ids": maker.marked(encoder_length)},
            ]
        else:
            padding = {"decoder_attention_mask": maker.padding(length)}
            # The encoder of sound or images is left alone: the decoder is given what it might have returned.
            states = maker.noise(extent.batch, encoder_length, model.config.get_text_config().hidden_size)
            choices = [tokens | {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}]
            choices += [tokens | signal for signal in maker.signals(model.main_input_name)]
    elif "input_ids" in takes:
        tokens = {"input_ids": maker.ids(length)}
        positions = {"position_ids": maker.restarting(), "token_type_ids": torch.zeros_like(tokens["input_ids"])}
        choices = [tokens, {"input_ids": maker.marked(length)}]
        choices += [tokens | {"bbox": maker.boxes()}] if "bbox" in takes else []
        choices += [tokens | signal for signal in maker.signals("pixel_values")] if "pixel_values" in takes else []
    else:
        choices, padding = maker.signals(model.main_input_name), {}
    uncached: Inputs = {"use_cache": False} if "use_cache" in takes else {}
    padding, positions = ({name: more[name] for name in more if name in takes} for more in (padding, positions))
    kinds: list[list[Inputs]] = [
        [choice | padding | cache for choice in choices for cache in ({}, uncached)],
        [choice | more for choice in choices for more in (positions | uncached, {}, uncached)],
    ]
    return [
        [DummyBatch(inputs, extent, encoder_length) for inputs in kind] for kind in (kinds if padding else kinds[1:])
    ]


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

    def marked(self, length: int) -> Tensor:
        """Tokens with what heads for classes and for answers look for: three separators, or an end."""
        ids = self.ids(length)
        end, separator = (getattr(self.model.config, f"{name}_token_id", None) for name in ("eos", "sep"))
        if isinstance(separator, int):
            ids[:, -3:] = separator
        elif isinstance(end, int):
            ids[:, -1] = end
        return ids

    def boxes(self) -> Tensor:
        """Where on its page each token stands: [B, S, 4] of left, top, right, bottom."""
        corners = torch.arange(self.extent.length, device=self.model.device)[:, None] + torch.tensor(
            [0, 0, 2, 2], device=self.model.device
        )
        return corners.expand(self.extent.batch, -1, -1).contiguous()

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

    def signals(self, name: str) -> list[Inputs]:
        """Images, videos or sound, of the sizes that the configuration tells, in the layouts that are in use."""
        config = getattr(self.model.config, "vision_config", self.model.config)

        def first(*settings: str) -> Any:
            return next((getattr(config, one) for one in settings if getattr(config, one, None) is not None), None)

        shapes: list[tuple[int, ...]] = []
        if name in ("pixel_values", "pixel_values_videos"):
            size = first("image_size", "crop_size") or 64
            height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
            image = (first("num_channels", "in_channels", "in_chans") or 3, height, width)
            frames = first("num_frames")
            shapes = [(frames, *image)] * isinstance(frames, int) + [image]
        elif name == "input_values":
            shapes = [(400 * self.extent.length,)]
        elif name == "input_features":
            bands = first("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels") or 80
            frames = 2 * (first("max_source_positions") or 4 * self.extent.length)
            shapes = [(bands, frames), (frames, bands)]
        return [{name: self.noise(self.extent.batch, *shape)} for shape in shapes]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)
