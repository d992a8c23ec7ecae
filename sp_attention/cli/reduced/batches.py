"""Whole batches with labels for a model, by kind: what it takes of ids, masks, positions, pixels and features."""

import re
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sp_attention.cli.outcomes import KINDS
from sp_attention.cli.reduced.configuration import configurations
from sp_attention.cli.reduced.sizes import FIRST_TOKEN, POSITIONS
from sp_attention.rehearsal.dummy_tensors import DummyTensors

ROWS = 2
Batch = dict[str, Any]


def candidates(model: PreTrainedModel, task: str, length: int) -> Iterator[dict[str, Batch]]:
    """Sets of batches by kind, of which the model takes one, hopefully; "plain" is in each of them.

    length: tokens in a row of ids, S; the batches are [2, S], the same on every rank and every time.
    """
    takes = signature(model.forward).parameters
    if task == "image-classification":
        yield from ({"plain": batch} for batch in _images(model))
    elif task == "speech-seq2seq" and model.main_input_name != "input_ids":
        yield from ({"plain": batch} for batch in _speech(model, length))
    else:
        kinds = [kind for kind in KINDS if kind != "pixels" and (kind != "packed" or _takes_positions(model, task))]
        text = {kind: _text(model, task, kind, length) for kind in kinds}
        yield text
        # Some decoders of encoder-decoders start from as many tokens as the encoder reads.
        alike = {"labels": _ids(model, length, seed=1)}
        if model.config.is_encoder_decoder and task == "seq2seq-lm":
            yield {"plain": text["plain"] | alike}
        if "num_codebooks" in vars(model.config):
            yield {"plain": _codes(model, length)}
        if "pixel_values" in takes:
            for pixels in _pixels(model):
                yield {kind: batch | pixels for kind, batch in text.items()}
                yield {"plain": pixels | {"labels": text["plain"]["labels"]}}
                yield {"plain": pixels | alike}


def with_pixels(model: PreTrainedModel, task: str, length: int) -> Batch | None:
    """A batch of text with an image in every row, where that needs no processor; None where it does."""
    markers = [getattr(model.config, f"image_token_{end}", None) for end in ("id", "index")]
    marker = next((marker for marker in markers if marker is not None), None)
    takes = signature(model.forward).parameters
    if marker is None or "pixel_values" not in takes:
        return None
    for pixels in _pixels(model):
        wanted = 4
        for _ in range(3):
            batch = _with_image_tokens(_text(model, task, "plain", length + wanted), takes, marker, wanted) | pixels
            try:
                with torch.no_grad():
                    model(**batch)
            except Exception as error:  # of any kind: shapes, or how many tokens an image has
                told = re.search(r"tokens:? *(\d+),? .*features:? *(\d+)", str(error))
                if told is None or int(told[2]) // ROWS in (0, wanted):
                    break
                wanted = int(told[2]) // ROWS
            else:
                return batch
    return None


def _with_image_tokens(batch: Batch, takes: Any, marker: int, count: int) -> Batch:
    is_image = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    is_image[:, 2 : 2 + count] = True
    extra = {name: is_image.long() for name in ("mm_token_type_ids", "token_type_ids") if name in takes}
    ids, labels = batch["input_ids"], batch["labels"]
    if labels.shape == ids.shape:  # not those of a decoder
        labels = labels.masked_fill(is_image, -100)
    return batch | extra | {"input_ids": ids.masked_fill(is_image, marker), "labels": labels}


def _tensors(model: PreTrainedModel, rows: int = 1) -> DummyTensors:
    return DummyTensors(model, ROWS, rows, FIRST_TOKEN, tuple(configurations(model.config)))


def _ids(model: PreTrainedModel, length: int, seed: int = 0) -> Tensor:
    return _tensors(model).ids(length, seed)


def _takes_positions(model: PreTrainedModel, task: str) -> bool:
    return task in ("causal-lm", "image-text-to-text") and "position_ids" in signature(model.forward).parameters


def _text(model: PreTrainedModel, task: str, kind: str, length: int) -> Batch:
    takes = signature(model.forward).parameters
    dummy = _tensors(model)
    ids, third = dummy.ids(length), length // 3
    mask = dummy.padding(length, third if kind == "left-padded" else 0, third if kind == "right-padded" else 0)
    padding = getattr(model.config, "pad_token_id", None)
    if isinstance(padding, int):
        ids[mask == 0] = padding  # Some heads look for the last token that is none.
    _mark(model, task, ids, mask)
    batch: Batch = {"input_ids": ids} | _labels(model, task, kind, ids, mask)
    if kind.endswith("padded"):
        batch["attention_mask"] = mask
    if kind == "packed":
        # Row 0 has three documents, row 1 is one.
        first, second = length // 4, length // 2 + 1
        positions = dummy.positions([first, second - first, length - second], [length])
        batch |= {"position_ids": positions, "use_cache": False}
    if "bbox" in takes:
        batch["bbox"] = dummy.boxes(length)
    return batch


def _mark(model: PreTrainedModel, task: str, ids: Tensor, mask: Tensor) -> None:
    """Put special tokens where heads look for them, in place."""
    end, separator = getattr(model.config, "eos_token_id", None), getattr(model.config, "sep_token_id", None)
    last = (mask * torch.arange(ids.shape[1])).argmax(1)
    rows = torch.arange(ROWS)
    if task == "sequence-classification" and isinstance(end, int):
        ids[rows, last] = end  # some classify by the state of the end token, of which every text has one
    if task == "question-answering" and isinstance(separator, int):
        for place in (last, last // 2 + 2, last // 2 + 3):  # three between question and context
            ids[rows, place] = separator


def _labels(model: PreTrainedModel, task: str, kind: str, ids: Tensor, mask: Tensor) -> Batch:
    length = ids.shape[1]
    if task == "sequence-classification":
        return {"labels": torch.tensor([0, 1])}
    if task == "question-answering":
        return {"start_positions": torch.tensor([length // 2, 3]), "end_positions": torch.tensor([length // 2 + 4, 9])}
    if model.config.is_encoder_decoder and task in ("seq2seq-lm", "speech-seq2seq", "image-text-to-text"):
        labels = _ids(model, 2 * length // 3, seed=1)  # not as long as what the encoder reads
        if kind == "right-padded":
            labels[0, length // 2 :] = -100
        return {"labels": labels}
    labels = (ids % 2 if task == "token-classification" else ids).masked_fill(mask == 0, -100)
    if kind == "left-padded":
        # A first real token has no context on the left but padding, so what predicts it is nothing real; nor is the
        # token of a decoder that gets the encoder's tokens moved by one.
        labels[:, : length // 3 + 1] = -100
    return {"labels": labels}


def _codes(model: PreTrainedModel, length: int) -> Batch:
    """Music: the ids of every codebook are rows of their own, [B·books, S], and labels are [B, S, books]."""
    books = model.config.num_codebooks
    ids = _tensors(model, books).ids(length)
    return {"input_ids": ids, "labels": ids.view(ROWS, books, length).transpose(1, 2).clone()}


def _images(model: PreTrainedModel) -> Iterator[Batch]:
    labels = {"labels": torch.tensor([0, 1])}
    for pixels in _pixels(model):
        yield pixels | labels
    if model.main_input_name == "input_ids":  # an image is a text of colours
        yield {"input_ids": _ids(model, POSITIONS)} | labels
    yield {"inputs": _tensors(model).noise(ROWS, 3, 16, 16)} | labels


def _pixels(model: PreTrainedModel) -> Iterator[Batch]:
    """What belongs to one image in every row, in the ways in which models want it."""
    takes, dummy = signature(model.forward).parameters, _tensors(model)
    channels, height, width = dummy.image
    patch, frames = dummy.first("patch_size"), dummy.first("temporal_patch_size")
    side = patch if isinstance(patch, int) else 4
    frames = frames if isinstance(frames, int) else 1
    down, across = height // side, width // side
    dims = channels * side * side
    if "image_grid_thw" in takes:
        grid = torch.tensor([[1, down, across]] * ROWS)
        patches = dummy.noise(ROWS * down * across, dims * frames)
        yield {"pixel_values": patches, "image_grid_thw": grid}
    if "spatial_shapes" in takes:
        seen = torch.ones(ROWS, down * across, dtype=torch.long)
        shapes = torch.tensor([[down, across]] * ROWS)
        patches = dummy.noise(ROWS, down * across, dims)
        yield {"pixel_values": patches, "pixel_attention_mask": seen, "spatial_shapes": shapes}
    image = dummy.noise(ROWS, channels, height, width)
    if "qformer_input_ids" in takes:
        yield {"pixel_values": image, "qformer_input_ids": _ids(model, 7)}
    if "image_sizes" in takes:
        sizes = torch.tensor([[height, width]] * ROWS)
        yield {"pixel_values": image, "image_sizes": sizes}
        yield {"pixel_values": image[:, None].expand(-1, 2, -1, -1, -1).clone(), "image_sizes": sizes}
    yield {"pixel_values": image}
    yield {"pixel_values": image[:, None].clone()}


def _speech(model: PreTrainedModel, length: int) -> Iterator[Batch]:
    dummy, name = _tensors(model), model.main_input_name
    labels = {"labels": dummy.ids(length)}
    # Besides what is in use, what only some types want.
    bands = dummy.first("feature_projection_input_dim") or 16
    others = [{name: dummy.noise(ROWS, *shape)} for shape in ((64, bands), (4000,), (1, 4000))]
    yield from (signal | labels for signal in [*dummy.signals(name, length), *others])
