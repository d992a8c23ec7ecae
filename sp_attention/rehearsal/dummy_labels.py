"""Labels for dummy batches, of the forms that can be told from what a model returns without any."""

from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sp_attention.region.forward import TOKENS
from sp_attention.rehearsal.dummy_inputs import DummyBatch
from sp_attention.rehearsal.dummy_tensors import Inputs


def with_labels(model: PreTrainedModel, dummy: DummyBatch) -> Inputs | None:
    """The inputs of a dummy batch with labels that fit what the model returned for it; None where nothing tells them.

    A class of every token, of every sample, or of some of its frames, numbers in their place, or where answers begin
    and end: always within the logits, since a device does not survive a class that is not there.
    """
    takes, output = signature(model.forward).parameters, dummy.output
    if model.device.type == "meta" or not isinstance(output, dict):
        return None
    start, logits = output.get("start_logits"), output.get("logits")
    if "start_positions" in takes and isinstance(start, Tensor) and start.dim() == 2:
        places = torch.arange(len(start), device=start.device) % start.shape[1]
        return {**dummy.inputs, "start_positions": places, "end_positions": places}
    if "labels" not in takes or not isinstance(logits, Tensor) or not logits.is_floating_point():
        return None
    labels = _labels(model, dummy, logits)
    return None if labels is None else {**dummy.inputs, "labels": labels}


def token_labels(dummy: DummyBatch, classes: int | None = None) -> Tensor | None:
    """A class of every token [B, S], by default itself, -100 for padding; None for a model that is given no ids."""
    name = next((name for name in TOKENS if name in dummy.inputs), None)
    if name is None:
        return None
    ids = dummy.inputs[name]
    labels: Tensor = ids if classes is None else ids % classes
    padding = dummy.inputs.get(name.replace("input_ids", "attention_mask"))
    return labels if padding is None or padding.shape != ids.shape else labels.masked_fill(padding == 0, -100)


def _labels(model: PreTrainedModel, dummy: DummyBatch, logits: Tensor) -> Tensor | None:
    classes = logits.shape[-1]
    if logits.dim() == 3:
        of_tokens = token_labels(dummy, classes)
        if of_tokens is not None:
            return of_tokens if of_tokens.shape == logits.shape[:2] else None
        # A transcript of fewer letters than there are frames.
        return torch.ones(len(logits), 1, dtype=torch.int64, device=logits.device) if classes > 1 else None
    if logits.dim() != 2 or len(logits) != dummy.extent.batch:
        return None
    kind = getattr(model.config, "problem_type", None)
    if kind == "multi_label_classification" or classes == 1 or kind == "regression":
        return (torch.arange(logits.numel(), device=logits.device) % 2).view(logits.shape).to(logits.dtype)
    return torch.arange(len(logits), device=logits.device) % classes
