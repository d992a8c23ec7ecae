"""A reduced model: which class a type has for a task, and weights large enough that a wrong mask shows."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from sp_attention.cli.reduced.configuration import NotBuildableError, reduced

LARGEST = 6_000_000
# Tasks and transformers' mappings from types to classes of models.
TASKS: dict[str, str] = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": "MASKED_LM",
    "seq2seq-lm": "SEQ_TO_SEQ_CAUSAL_LM",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "question-answering": "QUESTION_ANSWERING",
    "speech-seq2seq": "SPEECH_SEQ_2_SEQ",
    "image-classification": "IMAGE_CLASSIFICATION",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
}


def types_of(task: str) -> dict[str, str]:
    """The types of models that transformers has for a task, and their classes."""
    names = getattr(modeling_auto, f"MODEL_FOR_{TASKS[task]}_MAPPING_NAMES")
    return {kind: name if isinstance(name, str) else name[0] for kind, name in names.items()}


def tasks_of(model_type: str) -> list[str]:
    """The tasks that a type of models has, in the order of `TASKS`."""
    return [task for task in TASKS if model_type in types_of(task)]


def build(
    model_type: str, task: str, dtype: torch.dtype = torch.float64, thresholds: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The same small model every time, in training mode; raises NotBuildableError with the reason if there is none.

    thresholds: fields of its configurations to set, where there are any of these names.
    """
    try:
        return _build(model_type, task, dtype, dict(thresholds or {}))
    except NotBuildableError:
        raise
    except Exception as error:  # of any kind: the code of some model, given numbers that it does not expect
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise NotBuildableError(reason[:300]) from error


def _build(model_type: str, task: str, dtype: torch.dtype, settings: dict[str, Any]) -> PreTrainedModel:
    model_class = getattr(transformers, types_of(task)[model_type])
    if task == "causal-lm":
        settings |= {"is_decoder": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if task == "image-classification":
            settings |= {"image_size": 64, "window_size": 2}  # room for several halvings
        config = reduced(model_class.config_class, **settings)
        if config.is_encoder_decoder:
            for name, token in (("decoder_start_token_id", 1), ("pad_token_id", 0)):
                if getattr(config, name, None) is None:
                    setattr(config, name, token)
        _require_small(model_class, config)
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # A head may have one that no setting tells of.
    nn.Module.to(model, dtype=dtype)
    return enlarge(model)


def _require_small(model_class: type[PreTrainedModel], config: Any) -> None:
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
    except Exception:  # not every class can be made without memory
        return
    if size > LARGEST:
        raise NotBuildableError(f"its reduced model has {size / 1e6:.0f} million parameters")


def enlarge(model: PreTrainedModel, spread: float = 0.2) -> PreTrainedModel:
    """Random weights of one spread instead of small, equal or uninitialised ones; in training mode."""
    generator = torch.Generator().manual_seed(1)

    def noise(parameter: nn.Parameter) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2:
                parameter.nan_to_num_().add_(0.1 * noise(parameter))
            elif parameter.numel() == 1 or not parameter.isfinite().all() or parameter.std() < 1e-6:
                parameter.copy_(spread * noise(parameter))
            else:
                parameter.mul_(spread / parameter.std())
    model.train()
    return model
