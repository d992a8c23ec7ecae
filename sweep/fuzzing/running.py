"""One case on several ranks: every call of it by the model on all ranks, and by a copy of the model in one process."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sp_attention
from sp_attention.cli.comparison import ROUNDING, TOLERANCES, merged, shake
from sp_attention.cli.differences import Values, largest_error
from sp_attention.cli.outcomes import DIFFERS, EXACT, Verdict
from sp_attention.errors import UnsupportedError
from sweep.fuzzing import calls
from sweep.fuzzing.batches import batch_of
from sweep.fuzzing.case import Case
from sweep.fuzzing.models import build
from sweep.fuzzing.page import FAULTS, OUTCOMES
from sweep.running import Record

# What ranks compute alike may differ by in the last digits.
ALIKE = {"float64": 1e-9, "float32": 1e-4}

# `enable` without options.
PLAIN = "enable, plainly"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Called:
    """What came of one call; error: the largest relative one. reason: of what it is, or why there is none."""

    call: str
    outcome: str
    error: float | None = None
    reason: str = ""


class EndedError(Exception):
    """A step ended with an error on some ranks: for every rank its class and text, None where it did not."""

    def __init__(self, errors: list[tuple[bool, str] | None]) -> None:
        self.errors = errors


@dataclass
class Session:
    """A model on all ranks, and a copy alone; handle is None while it is not enabled.

    apart: a group in which ranks only tell each other how they are, so that no collective of the library meets it.
    """

    case: Case
    alone: nn.Module
    model: nn.Module
    apart: dist.ProcessGroup
    handle: Any = None

    @property
    def group(self) -> int:
        """Which group of ranks this one is in."""
        return dist.get_rank() // (self.case.ranks // self.case.groups)

    def together(self, step: Callable[[], Result]) -> Result:
        """The result of a step; EndedError on every rank if it raises on any."""
        mine = None
        try:
            result = step()
        except Exception as error:
            mine = (isinstance(error, UnsupportedError), " ".join(f"{type(error).__name__}: {error}".split()))
        if any(everyone := self._told(mine)):
            raise EndedError(everyone)
        return result

    def _told(self, mine: Any) -> list[Any]:
        """What every rank has to tell."""
        everyone = [mine] * self.case.ranks
        dist.all_gather_object(everyone, mine, group=self.apart)
        return everyone

    def called(self, call: str, index: int) -> Called:
        """Do a call, of this place in the order, on both sides; the same verdict on every rank."""
        try:
            if call in ("enable", PLAIN, "disable"):
                return self._switched(call)
            if call in ("too-long", "interrupted"):
                return self._raised(call, index)
            return self._compared(call, index)
        except EndedError as ended:
            verdict = of_errors(call, ended.errors, self.case.ranks // self.case.groups)
            if verdict.outcome == "refused":
                # One process may have trained meanwhile.
                self._copy_weights(self.alone, self.model)
                self.model.zero_grad(set_to_none=True)
            return verdict

    def _switched(self, call: str) -> Called:
        if call == "disable" and self.handle is not None:
            self.together(self.handle.disable)
            self.handle = None
        elif call != "disable" and self.handle is None:
            self.handle = self.together(self._enabled_plainly if call == PLAIN else self._enabled)
        return Called(call, EXACT)

    def _enabled_plainly(self) -> Any:
        return sp_attention.enable(self.model, sp_size=self.case.ranks // self.case.groups)

    def _enabled(self) -> Any:
        case = self.case
        return sp_attention.enable(
            self.model,
            case.backend,
            sp_size=case.ranks // case.groups,
            whole_logits=case.whole_logits,
            loss_tile=case.loss_tile,
            mlp_tile=case.mlp_tile,
            longest=case.longest,
        )

    def _raised(self, call: str, index: int) -> Called:
        """What raises in one process must raise on all ranks."""
        do = calls.too_long if call == "too-long" else calls.interrupted
        for model in (self.alone, self.model):
            model.train(self.case.training)
        raises = False
        try:
            do(self.alone, batch_of(self.case, self.group, 2 * index))
        except Exception:
            raises = True
        raises = all(self._told(raises))
        try:
            self.together(lambda: do(self.model, batch_of(self.case, self.group, 2 * index)))
        except EndedError as ended:
            if not all(ended.errors):
                return Called(call, "ranks disagree", reason=_each(ended.errors))
            return Called(call, EXACT if raises else "not comparable", reason="" if raises else _each(ended.errors))
        return (
            Called(call, "wrong", reason="one process raises, and the ranks do not") if raises else Called(call, EXACT)
        )

    def _compared(self, call: str, index: int) -> Called:
        expected, problem, before = None, "", copy.deepcopy(self.alone)
        try:
            expected = self._values_alone(self.alone, call, index)
        except Exception as error:
            problem = f"in one process: {type(error).__name__}: {error}"[:300]
        # Whatever follows from them, text or losses, says nothing.
        is_score = "" if call == "generate" else "logits"
        scores = [value for name, value in (expected or {}).items() if name.startswith(is_score)]
        if any(score.isnan().any() for score in scores):
            problem = "in one process: scores are no numbers"
        if self.case.draws and call in calls.TRAINING:
            expected = None  # of other random numbers
        # A batch may be too much for one group only.
        if problem := next(filter(None, self._told(problem)), ""):
            return Called(call, "not comparable", reason=problem)
        ours = self._values_of_ranks(call, index)
        if apart := self._apart(ours):
            return Called(call, "ranks disagree", reason=apart)
        if expected is None:
            self._copy_weights(self.model, self.alone)
            return Called(call, "ranks alike")
        error, where = self.distance(ours, expected)
        tolerance = TOLERANCES[getattr(torch, self.case.dtype)]
        verdict = merged(Verdict("", EXACT if error <= tolerance else DIFFERS, error, where))
        if verdict.outcome == DIFFERS and verdict.error <= ROUNDING:
            # More than the tolerance, and yet the same, where the model itself is no more precise.
            shake(before, 1e-8 if self.case.dtype == "float64" else 1e-6)
            rounding = self.distance(self._values_alone(before, call, index), expected)[0]
            verdict = merged(Verdict("", EXACT if error <= max(tolerance, 10 * rounding) else DIFFERS, error, where))
        outcome = EXACT if verdict.outcome == EXACT else "wrong"
        return Called(call, outcome, verdict.error, verdict.where)

    def distance(self, ours: Values, expected: Values) -> tuple[float, str]:
        """The largest relative error, and of what; infinite where only one side has a number for the loss."""
        for name in ("loss", "loss 1"):
            if name in expected and name in ours and expected[name].isnan() != ours[name].isnan():
                return float("inf"), f"{name}: {ours[name]}, and {expected[name]} in one process"
        return largest_error(ours, expected)

    def _values_alone(self, model: nn.Module, call: str, index: int) -> Values:
        """By this process: of this group's batches, with the mean over groups of the gradients."""
        if call in calls.EVALUATIONS:
            return self._evaluated(model, call, index, None)
        values: Values = {}
        model.zero_grad(set_to_none=True)
        model.train(self.case.training)
        for numbers in calls.TRAINING[call]:
            for group in range(self.case.groups):
                found, objective = self._forwards(model, call, index, numbers, group)
                (objective / self.case.groups).backward()
                if group == self.group:
                    values |= found
        return values | self._after(model, call)

    def _values_of_ranks(self, call: str, index: int) -> Values:
        if call in calls.EVALUATIONS:
            return self.together(lambda: self._evaluated(self.model, call, index, self.handle))
        values: Values = {}
        self.model.zero_grad(set_to_none=True)
        self.model.train(self.case.training)
        outputs: list[Any] = []
        for numbers in calls.TRAINING[call]:
            found, objective = self.together(
                lambda n=numbers: self._forwards(self.model, call, index, n, self.group, outputs)
            )
            self.together(objective.backward)
            values |= found
        self.together(lambda: sp_attention.average_gradients(self.model))
        values |= self._after(self.model, call)
        if call == "late-logits":
            batch = batch_of(self.case, self.group, 2 * index)
            values |= self.together(lambda: calls.seen(outputs[0], batch))
        return values

    def _forwards(
        self, model: nn.Module, call: str, index: int, numbers: tuple[int, ...], group: int, outputs: Any = None
    ) -> tuple[Values, Tensor]:
        """What forwards give, and the sum of what they are trained for."""
        more = {"output_hidden_states": True} if call == "hidden-states" else {}
        values: Values = {}
        objectives = []
        for number in numbers:
            batch = batch_of(self.case, group, 2 * index + number)
            output = calls.forward(model, batch, **more)
            objectives.append(calls.objective(output, batch))
            if call != "late-logits" or outputs is None:
                found = calls.seen(output, batch)
                values |= {f"{name} {number}" if number else name: value for name, value in found.items()}
            if outputs is not None:
                outputs.append(output)
        return values, torch.stack(objectives).sum()

    def _after(self, model: nn.Module, call: str) -> Values:
        """The gradients; then the weights are moved, if they are to be."""
        names = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        values = {f"gradient of {name}": gradient.clone() for name, gradient in names.items()}
        if call in calls.UPDATES:
            calls.update(model)
        return values

    def _evaluated(self, model: nn.Module, call: str, index: int, handle: Any) -> Values:
        model.eval()
        with torch.no_grad(), calls.way(call, handle):
            return calls.EVALUATIONS[call](model, self.case, batch_of(self.case, self.group, 2 * index))

    def _apart(self, values: Values) -> str:
        """What is not alike on the ranks of a group, nothing if all is; gradients are those of all ranks."""
        mine = {name: float(value.nan_to_num().double().sum()) for name, value in values.items()}
        scales = {name: float(value.nan_to_num().double().abs().sum()) for name, value in values.items()}
        told = []
        for rank, (group, theirs) in enumerate(self._told((self.group, mine))):
            for name, number in theirs.items():
                if group == self.group or name.startswith("gradient of "):
                    here, scale = mine.get(name, float("nan")), scales.get(name, 0.0)
                    if not abs(number - here) <= ALIKE[self.case.dtype] * (scale or 1.0):
                        told.append(f"{name} on rank {rank}: {number!r}, and {here!r} on rank {dist.get_rank()}")
        return next((some[0] for some in self._told(told) if some), "")

    def _copy_weights(self, source: nn.Module, target: nn.Module) -> None:
        with torch.no_grad():
            for weight, other in zip(target.parameters(), source.parameters(), strict=True):
                weight.copy_(other)


def of_errors(call: str, errors: list[tuple[bool, str] | None], size: int) -> Called:
    """A refusal is the same error of the library on every rank of a group of this size."""
    groups = [errors[first : first + size] for first in range(0, len(errors), size)]
    if any(len(set(group)) > 1 for group in groups):
        return Called(call, "ranks disagree", reason=_each(errors))
    raised = [group[0] for group in groups if group[0] is not None]
    texts = " | ".join(text for _, text in raised)
    if "imed out" in texts or "closed by peer" in texts:
        return Called(call, "hang", reason=texts[:1000])
    return Called(call, "refused" if all(library for library, _ in raised) else "other error", reason=texts[:1000])


def _each(errors: list[tuple[bool, str] | None]) -> str:
    texts = [error[1][:300] if error else "no error" for error in errors]
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))


def run(case: Case, apart: dist.ProcessGroup) -> Record:
    """On every rank: the record of a case, which all have alike."""
    began = monotonic()
    model = build(case)
    session = Session(case, copy.deepcopy(model), model, apart)
    found = [session.called("enable", 0)]
    if found[0].outcome == "refused":
        # Whatever was asked for: the model must be as it was.
        found.append(session.called(PLAIN, 0))
    for index, call in enumerate(case.calls):
        if found[-1].outcome in FAULTS:
            break
        found.append(session.called(call, index))
    if session.handle is not None:
        session.handle.disable()
    outcome = max((called.outcome for called in found), key=OUTCOMES.index)
    return {
        "case": asdict(case),
        "outcome": outcome,
        "calls": [asdict(called) for called in found],
        "seconds": round(monotonic() - began, 1),
    }
