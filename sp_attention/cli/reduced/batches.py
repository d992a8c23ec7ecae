"""Whole batches for a model, by kind: what it takes of ids, masks, positions, labels, pixels and features."""

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
        alike = {"labels": _ids(model, length, length + 1)}
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


def _generator(length: int) -> torch.Generator:
    return torch.Generator().manual_seed(length)


def _of_parts(model: PreTrainedModel, *names: str) -> Any:
    """The first value that a configuration of the model, or one inside it, has for one of these names."""
    parts = configurations(model.config)
    values = (getattr(part, name, None) for name in names for part in parts)
    return next((value for value in values if value is not None), None)


def _ids(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    sizes = [getattr(part, "vocab_size", None) for part in configurations(model.config)]
    vocabulary = min([size for size in sizes if isinstance(size, int) and size > FIRST_TOKEN] or [FIRST_TOKEN + 1])
    return torch.randint(FIRST_TOKEN, vocabulary, (ROWS, length), generator=_generator(seed))


def _takes_positions(model: PreTrainedModel, task: str) -> bool:
    return task in ("causal-lm", "image-text-to-text") and "position_ids" in signature(model.forward).parameters


def _text(model: PreTrainedModel, task: str, kind: str, length: int) -> Batch:
    takes = signature(model.forward).parameters
    ids = _ids(model, length, length)
    mask = torch.ones_like(ids)
    if kind == "left-padded":
        mask[0, : length // 3] = 0
    if kind == "right-padded":
        mask[0, length - length // 3 :] = 0
    padding = getattr(model.config, "pad_token_id", None)
    if isinstance(padding, int):
        ids[mask == 0] = padding  # Some heads look for the last token that is none.
    _mark(model, task, ids, mask)
    batch: Batch = {"input_ids": ids} | _labels(model, task, kind, ids, mask)
    if kind.endswith("padded"):
        batch["attention_mask"] = mask
    if kind == "packed":
        batch |= {"position_ids": _packed_positions(length), "use_cache": False}
    if "bbox" in takes:
        corners = torch.randint(0, POSITIONS // 2, (ROWS, length, 4), generator=_generator(length))
        batch["bbox"] = corners + corners.roll(2, dims=2) * torch.tensor([0, 0, 1, 1])
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


def _packed_positions(length: int) -> Tensor:
    """Row 0 has three documents, row 1 is one."""
    first, second = length // 4, length // 2 + 1
    documents = torch.cat([torch.arange(first), torch.arange(second - first), torch.arange(length - second)])
    return torch.stack([documents, torch.arange(length)])


def _labels(model: PreTrainedModel, task: str, kind: str, ids: Tensor, mask: Tensor) -> Batch:
    length = ids.shape[1]
    if task == "sequence-classification":
        return {"labels": torch.tensor([0, 1])}
    if task == "question-answering":
        return {"start_positions": torch.tensor([length // 2, 3]), "end_positions": torch.tensor([length // 2 + 4, 9])}
    if model.config.is_encoder_decoder and task in ("seq2seq-lm", "speech-seq2seq", "image-text-to-text"):
        labels = _ids(model, 2 * length // 3, length + 1)  # not as long as what the encoder reads
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
    ids = torch.cat([_ids(model, length, length + book) for book in range(books)])
    return {"input_ids": ids, "labels": ids.view(ROWS, books, length).transpose(1, 2).clone()}


def _images(model: PreTrainedModel) -> Iterator[Batch]:
    labels = {"labels": torch.tensor([0, 1])}
    for pixels in _pixels(model):
        yield pixels | labels
    if model.main_input_name == "input_ids":  # an image is a text of colours
        yield {"input_ids": _ids(model, POSITIONS, POSITIONS)} | labels
    yield {"inputs": _random(model, (ROWS, 3, 16, 16))} | labels


def _pixels(model: PreTrainedModel) -> Iterator[Batch]:
    """What belongs to one image in every row, in the ways in which models want it."""
    takes = signature(model.forward).parameters
    size, patch = _of_parts(model, "image_size", "force_image_size"), _of_parts(model, "patch_size")
    channels = _of_parts(model, "num_channels", "in_channels")
    height, width = size if isinstance(size, (list, tuple)) else (size or 64, size or 64)
    channels = channels if isinstance(channels, int) else 3
    side = patch if isinstance(patch, int) else 4
    frames = _of_parts(model, "temporal_patch_size")
    frames = frames if isinstance(frames, int) else 1
    down, across = height // side, width // side
    dims = channels * side * side
    if "image_grid_thw" in takes:
        grid = torch.tensor([[1, down, across]] * ROWS)
        patches = _random(model, (ROWS * down * across, dims * frames))
        yield {"pixel_values": patches, "image_grid_thw": grid}
    if "spatial_shapes" in takes:
        seen = torch.ones(ROWS, down * across, dtype=torch.long)
        shapes = torch.tensor([[down, across]] * ROWS)
        patches = _random(model, (ROWS, down * across, dims))
        yield {"pixel_values": patches, "pixel_attention_mask": seen, "spatial_shapes": shapes}
    image = _random(model, (ROWS, channels, height, width))
    if "qformer_input_ids" in takes:
        yield {"pixel_values": image, "qformer_input_ids": _ids(model, 7, 7)}
    if "image_sizes" in takes:
        sizes = torch.tensor([[height, width]] * ROWS)
        yield {"pixel_values": image, "image_sizes": sizes}
        yield {"pixel_values": image[:, None].expand(-1, 2, -1, -1, -1).clone(), "image_sizes": sizes}
    yield {"pixel_values": image}
    yield {"pixel_values": image[:, None].clone()}


def _speech(model: PreTrainedModel, length: int) -> Iterator[Batch]:
    bins = _of_parts(model, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim") or 16
    positions = _of_parts(model, "max_source_positions")
    labels = {"labels": _ids(model, length, length)}
    frames = 2 * positions if isinstance(positions, int) else 64
    for shape in ((ROWS, frames, bins), (ROWS, bins, frames), (ROWS, 4000), (ROWS, 1, 4000)):
        yield {model.main_input_name: _random(model, shape)} | labels


def _random(model: PreTrainedModel, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=_generator(shape[-1]), dtype=torch.float64).to(model.dtype)
