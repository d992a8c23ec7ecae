"""What `sp-attention verify MODEL` is about: a model and batches for it, from a type, a folder or a function."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from sp_attention.cli.reduced import TASKS, batches_for, enlarge, prepare, tasks_of, types_of
from sp_attention.cli.reduced.batches import Batch


@dataclass(frozen=True)
class Subject:
    """The words of the command line. model: a type, a folder, or module:function. full: as given, not reduced."""

    model: str
    task: str | None
    length: int
    full: bool


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model in training mode, the same on every rank, and batches by kind."""

    model: PreTrainedModel
    task: str
    batches: dict[str, Batch]


def prepared(subject: Subject) -> Prepared:
    """The subject, ready to be compared; raises NotBuildableError, ValueError or OSError with a reason if it cannot."""
    if ":" in subject.model:
        return _as_given(_called(subject.model), subject)
    folder = Path(subject.model)
    if folder.is_dir():
        config = AutoConfig.from_pretrained(folder)
        task = _task(config.model_type, subject.task)
        if subject.full:
            return _as_given(_loaded(folder, config, task), subject)
        model_type = config.model_type
    elif subject.full:
        raise ValueError(f"--full is for a folder or module:function, and '{subject.model}' is neither")
    else:
        model_type = subject.model
        task = _task(model_type, subject.task)
    model, batches = prepare(model_type, task, subject.length)
    return Prepared(model, task, batches)


def _as_given(model: PreTrainedModel, subject: Subject) -> Prepared:
    nn.Module.to(model, dtype=torch.float64)
    model.train()
    classes = [kind.__name__ for kind in type(model).__mro__]
    of_class = [task for task in TASKS for name in types_of(task).values() if name in classes]
    task = subject.task or (of_class[0] if of_class else "causal-lm")
    return Prepared(model, task, batches_for(model, task, subject.length))


def _called(name: str) -> PreTrainedModel:
    module, function = name.split(":", 1)
    try:
        model = getattr(import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"'{name}' cannot be called: {error}") from error
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"'{name}' returns a {type(model).__name__}, not a transformers model")
    return model


def _loaded(folder: Path, config: transformers.PreTrainedConfig, task: str) -> PreTrainedModel:
    """The model of a folder with its weights, or with random ones where it has only a configuration."""
    model_class = getattr(transformers, types_of(task)[config.model_type])
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        loaded: PreTrainedModel = model_class.from_pretrained(folder, dtype=torch.float64)
        return loaded
    torch.manual_seed(0)
    made: PreTrainedModel = model_class(config)
    nn.Module.to(made, dtype=torch.float64)
    return enlarge(made)


def _task(model_type: str, wanted: str | None) -> str:
    tasks = tasks_of(model_type)
    if not tasks:
        raise ValueError(
            f"'{model_type}' is no folder, no module:function, and no type of models of transformers "
            f"{transformers.__version__} with a task of {', '.join(TASKS)}"
        )
    if wanted is not None and wanted not in tasks:
        raise ValueError(f"{model_type} has no model for '{wanted}', but for {', '.join(tasks)}")
    return wanted or tasks[0]
