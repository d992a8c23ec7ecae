"""Tiny batches for the rehearsal in enable(), of whatever a model takes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from sp_attention.errors import UnsupportedError, told
from sp_attention.region.plan import names_taken
from sp_attention.region.sequence_dims import Extent
from sp_attention.rehearsal.dummy_tensors import DummyTensors, Inputs


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
    why = "nothing is known of its inputs" if problem is None else told(problem)
    raise UnsupportedError(f"enable() found no small batch that {type(model).__name__} takes: {why}")


def _kinds(model: PreTrainedModel, extent: Extent, rows: int) -> list[list[DummyBatch]]:
    """Kinds of batches, each with what to take instead when the model does not take it."""
    takes = names_taken(model)
    dummy = DummyTensors(model, extent.batch, rows)
    length, encoder_length = extent.length, None
    padding: Inputs = {"attention_mask": dummy.padding(length)}
    positions: Inputs = {}
    if getattr(model.config, "is_encoder_decoder", False):
        encoder_length = length + 3
        tokens = {"decoder_input_ids": dummy.ids(length)}
        if model.main_input_name == "input_ids":
            padding = {"attention_mask": dummy.padding(encoder_length), "decoder_attention_mask": dummy.padding(length)}
            # Some heads look for the end of each text, and make the decoder's tokens out of the encoder's.
            choices: list[Inputs] = [
                tokens | {"input_ids": dummy.ids(encoder_length)},
                {"input_ids": dummy.marked(encoder_length)},
            ]
        else:
            padding = {"decoder_attention_mask": dummy.padding(length)}
            # The encoder of sound or images is left alone: the decoder is given what it might have returned.
            states = dummy.noise(extent.batch, encoder_length, model.config.get_text_config().hidden_size)
            choices = [tokens | {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}]
            choices += [tokens | signal for signal in dummy.signals(model.main_input_name, length)]
    elif "input_ids" in takes:
        tokens = {"input_ids": dummy.ids(length)}
        positions = {
            "position_ids": dummy.positions([length // 2, length - length // 2]),
            "token_type_ids": torch.zeros_like(tokens["input_ids"]),
        }
        choices = [tokens, {"input_ids": dummy.marked(length)}]
        choices += [tokens | {"bbox": dummy.boxes(length)}] if "bbox" in takes else []
        choices += (
            [tokens | signal for signal in dummy.signals("pixel_values", length)] if "pixel_values" in takes else []
        )
    else:
        choices, padding = dummy.signals(model.main_input_name, length), {}
    uncached: Inputs = {"use_cache": False} if "use_cache" in takes else {}
    padding, positions = ({name: more[name] for name in more if name in takes} for more in (padding, positions))
    kinds: list[list[Inputs]] = [
        [choice | padding | cache for choice in choices for cache in ({}, uncached)],
        [choice | more for choice in choices for more in (positions | uncached, {}, uncached)],
    ]
    return [
        [DummyBatch(inputs, extent, encoder_length) for inputs in kind] for kind in (kinds if padding else kinds[1:])
    ]
