"""Whole batches for a model, by kind: what it takes of ids, masks, positions, labels, pixels and features."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sp_attention.cli.reduced.configuration import configurations
from sp_attention.cli.reduced.sizes import FIRST_TOKEN, POSITIONS

KINDS = ("plain", "left-padded", "right-padded", "packed", "pixels")
ROWS = 2
Batch = dict[str, Any]


def batches_for(model: PreTrainedModel, task: str, length: int) -> dict[str, Batch]:
    """Batches [2, length] of every kind of `KINDS` that the model takes, the same on every rank."""
    takes = signature(model.forward).parameters
    generator = torch.Generator().manual_seed(length)
    if task == "image-classification":
        if model.main_input_name != "pixel_values":
            return {}
        return {"plain": {"pixel_values": _pixels(model, generator), "labels": torch.tensor([0, 1])}}
    if task == "speech-seq2seq":
        return {"plain": _speech(model, length, generator)}
    found = {}
    for kind in KINDS:
        if kind == "pixels" or (kind == "packed" and not ("position_ids" in takes and task == "causal-lm")):
            continue
        found[kind] = _text(model, task, kind, length, generator)
    return found


def _vocabulary(model: PreTrainedModel) -> int:
    sizes = [getattr(part, "vocab_size", None) for part in configurations(model.config)]
    return min([size for size in sizes if isinstance(size, int) and size > FIRST_TOKEN] or [FIRST_TOKEN + 1])


def _ids(model: PreTrainedModel, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(FIRST_TOKEN, _vocabulary(model), (ROWS, length), generator=generator)


def _text(model: PreTrainedModel, task: str, kind: str, length: int, generator: torch.Generator) -> Batch:
    takes = signature(model.forward).parameters
    ids = _ids(model, length, generator)
    mask = torch.ones_like(ids)
    if kind == "left-padded":
        mask[0, : length // 3] = 0
    if kind == "right-padded":
        mask[0, length - length // 3 :] = 0
    end = getattr(model.config, "eos_token_id", None)
    if task == "sequence-classification" and isinstance(end, int):
        # Some classify by the state of the end token, of which every text has one.
        ids[torch.arange(ROWS), (mask * torch.arange(length)).argmax(1)] = end
    batch: Batch = {"input_ids": ids} | _labels(model, task, kind, ids, mask, generator)
    if kind.endswith("padded"):
        batch["attention_mask"] = mask
    if kind == "packed":
        batch |= {"position_ids": _packed_positions(length), "use_cache": False}
    if "bbox" in takes:
        batch["bbox"] = torch.randint(0, POSITIONS // 2, (ROWS, length, 4), generator=generator)
        batch["bbox"][..., 2:] += batch["bbox"][..., :2]
    return batch


def _packed_positions(length: int) -> Tensor:
    """Row 0 has three documents, row 1 is one."""
    first, second = length // 4, length // 2 + 1
    documents = torch.cat([torch.arange(first), torch.arange(second - first), torch.arange(length - second)])
    return torch.stack([documents, torch.arange(length)])


def _labels(
    model: PreTrainedModel, task: str, kind: str, ids: Tensor, mask: Tensor, generator: torch.Generator
) -> Batch:
    length = ids.shape[1]
    if task == "sequence-classification":
        return {"labels": torch.tensor([0, 1])}
    if task == "question-answering":
        return {"start_positions": torch.tensor([length // 2, 3]), "end_positions": torch.tensor([length // 2 + 4, 9])}
    if task == "seq2seq-lm" and model.config.is_encoder_decoder:
        labels = _ids(model, 2 * length // 3, generator)
        if kind == "right-padded":
            labels[0, length // 2 :] = -100
        return {"labels": labels}
    labels = (ids % 2 if task == "token-classification" else ids).masked_fill(mask == 0, -100)
    if kind == "left-padded" and task != "token-classification":
        # A first real token has no context on the left but padding, so what predicts it is nothing real.
        labels[:, : length // 3 + 1] = -100
    return {"labels": labels}


def _pixels(model: PreTrainedModel, generator: torch.Generator) -> Tensor:
    parts = configurations(model.config)
    size = next((part.image_size for part in parts if getattr(part, "image_size", None)), 32)
    channels = next((part.num_channels for part in parts if getattr(part, "num_channels", None)), 3)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn((ROWS, channels, height, width), generator=generator, dtype=torch.float64).to(model.dtype)


def _speech(model: PreTrainedModel, length: int, generator: torch.Generator) -> Batch:
    parts = configurations(model.config)
    name = model.main_input_name
    if name == "input_features":
        bins = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels")
        size = next((getattr(part, bin) for part in parts for bin in bins if getattr(part, bin, None)), 16)
        frames = next((2 * part.max_source_positions for part in parts if hasattr(part, "max_source_positions")), 64)
        # Whisper's features are [B, bins, frames], others' [B, frames, bins].
        shape = (ROWS, size, frames) if any(hasattr(part, "num_mel_bins") for part in parts) else (ROWS, frames, size)
    else:
        shape = (ROWS, 4000)
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)
    return {name: features, "labels": _ids(model, length, generator)}
