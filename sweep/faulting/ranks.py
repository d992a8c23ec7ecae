"""On every rank: a model is enabled, trained and generates; on one, what is wrapped there alone makes it faulty."""

import json
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sp_attention
from sp_attention.region.others import SEES_SPANS
from sweep.faulting.fault import LAYERS, STEPS, Fault
from sweep.fuzzing.batches import batch_of
from sweep.fuzzing.case import Case
from sweep.fuzzing.models import build

# The timeout of the ranks' group.
SECONDS = 8
LENGTH, NEW_TOKENS = 19, 5
FIRED = "fired.json"

Batch = dict[str, Any]


class InjectedError(Exception):
    """Raised on purpose."""


class ToldError(Exception):
    """What the report of an enabled model tells of a fault: what a rank could not do, which none does then."""


@dataclass
class Injector:
    """Makes a rank faulty, when it comes to the point; on other ranks it does nothing. calls: of what is wrapped."""

    fault: Fault
    folder: Path
    model: nn.Module
    calls: int = 0
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def is_mine(self) -> bool:
        """Whether this is the faulty rank."""
        return dist.get_rank() == self.fault.rank

    @contextmanager
    def at(self, stage: str, step: int = 0) -> Iterator[None]:
        """Within it a stage runs: `enable`, `forward`, `backward` or `generate`."""
        fault = self.fault
        stages = {
            "rehearsal": ("enable",),
            "agreement": ("enable",) if fault.occasion else ("forward",),
            "exchange": ("forward", "backward"),
            "recomputation": ("backward",),
        }.get(fault.point, (fault.point,))
        is_due = stage in ("enable", "generate") or step == fault.step
        if not self.is_mine or fault.kind == "differ" or stage not in stages or not is_due:
            yield
            return
        with self._wrapped(stage):
            yield

    @contextmanager
    def _wrapped(self, stage: str) -> Iterator[None]:
        point, layer = self.fault.point, self.model.model.layers[self.fault.layer]
        if point == "backward":
            with layer.mlp.up_proj.weight.register_hook(lambda gradient: self.fire()):
                yield
            return
        if point in ("forward", "generate"):
            with layer.mlp.register_forward_pre_hook(_unseen(self._counted(lambda *_: None))):
                yield
            return
        if point == "exchange":
            owner, name = dist, "all_to_all_single"
        elif point == "agreement":
            owner, name = dist, "all_gather_object" if stage == "enable" else "all_gather"
        else:
            owner, name = layer.mlp, "forward"
        with patch.object(owner, name, self._counted(getattr(owner, name))):
            yield

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            # Whoever raises goes on raising: a rehearsal tries again.
            if self.calls >= self.fault.occasion:
                self.fire()
            return function(*args, **kwargs)

        return counted

    def fire(self) -> None:
        """The fault itself."""
        self.note()
        if self.fault.kind == "raise":
            raise InjectedError("raised on purpose")
        if self.fault.kind == "die" and self.fault.what == "exit":
            os._exit(3)
        if self.fault.kind in ("die", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.fault.kind == "die" else signal.SIGSTOP)

    def note(self) -> None:
        """Write when it came to it first."""
        file = self.folder / FIRED
        if not file.exists():
            write(file, {"at": monotonic(), "pid": os.getpid()})

    def differs(self, point: str, step: int = 0) -> str:
        """What is to be unlike on this rank at a point, nothing where all is alike."""
        fault = self.fault
        is_due = point not in ("forward", "agreement") or step == fault.step
        if not (self.is_mine and fault.kind == "differ" and fault.point == point and is_due):
            return ""
        self.note()
        return fault.what


def _unseen(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that ranks need not have alike."""
    setattr(hook, SEES_SPANS, True)
    return hook


def work(fault: Fault, folder: Path, temporary: Path) -> None:
    """On every rank: all of it, and a record of how it ended; the faulty one stays alive where it can.

    temporary: the folder for temporary files.
    """
    warnings.simplefilter("ignore")
    os.setsid()
    (folder / f"rank{dist.get_rank()}.pid").write_text(str(os.getpid()))
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    # So that connections are there before anything happens.
    dist.all_reduce(torch.zeros(1), group=group)
    record = {"error": "", "text": ""}
    try:
        _work(fault, folder, group)
    except Exception as error:
        record = {"error": type(error).__name__, "text": str(error)[:2000]}
    write(folder / f"rank{dist.get_rank()}.json", record | {"at": monotonic()})


def write(file: Path, record: dict[str, Any]) -> None:
    """All of it at once, for whoever reads meanwhile."""
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(record))
    draft.replace(file)


def _work(fault: Fault, folder: Path, group: dist.ProcessGroup) -> None:
    checkpointing = "non-reentrant" if fault.point == "recomputation" else "none"
    case = Case(heads=4, layers=LAYERS, rows=2, length=LENGTH, checkpointing=checkpointing)
    model = build(case)
    injector = Injector(fault, folder, model)
    unlike = injector.differs("rehearsal")
    if unlike == "weights":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    with injector.at("enable"):
        handle = sp_attention.enable(model, "sdpa", group=group, loss_tile=3 if unlike == "option" else "auto")
    told = [line.strip() for line in handle.report().splitlines() if InjectedError.__name__ in line]
    if told:
        raise ToldError(told[0])
    for step in range(STEPS):
        mode = injector.differs("agreement", step)
        model.train(mode != "training")
        batch = _unlike(batch_of(case, 0, 0), injector.differs("forward", step))
        with injector.at("forward", step), torch.set_grad_enabled(mode != "gradients"):
            loss = model(**batch).loss
        with injector.at("backward", step):
            loss.backward()
        sp_attention.average_gradients(model, group)
    model.eval()
    prompt = _unlike(batch_of(case, 0, 0), injector.differs("generate"))["input_ids"]
    with injector.at("generate"):
        model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)


def _unlike(batch: Batch, what: str) -> Batch:
    """Another batch than that of the other ranks, in one way."""
    if what == "tokens":
        return batch | {"input_ids": batch["input_ids"].flip(1)}
    if what == "labels":
        return batch | {"labels": batch["labels"].flip(1)}
    cut = {"length": (slice(None), slice(1, None)), "rows": (slice(1),)}.get(what)
    return batch if cut is None else {name: value[cut] for name, value in batch.items() if isinstance(value, Tensor)}
