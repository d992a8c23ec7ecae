"""What several test modules use: a model of one process beside that of the ranks, how far they are apart, programs."""

import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from models import MODELS, Tiny, batch_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import sp_attention
from sp_attention import testing
from sp_attention.distributed.peers import Peers
from sp_attention.launch import run_ranks

# One start of ranks for all cases of a test: what the same function gave for the same arguments.
run_once = cache(run_ranks)

# Numbers of ranks of a test whose cases take long: all in the environment `slow`.
TWO_AND_THREE = [2, pytest.param(3, marks=pytest.mark.slow)]


def slow_but(names: Iterable[str], *quick: str) -> list[Any]:
    """Cases of a test: all in the environment `slow`, and these few every time."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


TESTS = Path(__file__).parent
THIRD_PARTY = TESTS / "third_party"
EXAMPLES = TESTS.parent / "examples"
# What DDP, torch.compile and activation checkpointing put into the names of parameters.
WRAPPERS = re.compile(r"^module\.|^_orig_mod\.|_checkpoint_wrapped_module\.")

# Calls a model and backward(), and returns tensors to compare.
Step = Callable[[nn.Module], Sequence[Tensor]]
# The fixture `selected`.
Selected = Callable[..., tuple[Any, ...]]


def world() -> Peers:
    return Peers(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


class WholeOnEveryRank(torch.autograd.Function):
    """The identity on a tensor that all ranks hold, whose gradient is the mean over ranks, as for parameters."""

    @staticmethod
    def forward(ctx: object, whole: Tensor) -> Tensor:
        return whole.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


def pair(tiny: Tiny, backend: str = "sdpa") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model on its own, and the same one enabled."""
    reference, model = tiny.build(), tiny.build()
    sp_attention.enable(model, backend=backend)
    return reference, model


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number of `theirs`, if there is any; infinite where it is NaN."""
    assert ours.shape == theirs.shape
    error = testing.relative_error(ours, theirs, scale=None if theirs.any() else 1.0)
    return math.inf if math.isnan(error) else error


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by the names that parameters have without wrappers; those of which there are any."""
    return {
        WRAPPERS.sub("", name): parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def spy(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that wants to see what a rank has of a sequence."""
    hook.sees_spans = True
    return hook


def averages_itself(model: nn.Module) -> bool:
    """Whether an engine averages gradients over ranks."""
    return isinstance(model, DistributedDataParallel) or isinstance(next(model.parameters()), DTensor)


def errors_of(reference: nn.Module, model: nn.Module, step: Step) -> dict[str, float]:
    """Relative errors of what `step` returns, by number, and of the gradients that it leaves, by name: of a model of
    the ranks against one process."""
    theirs, ours = step(reference), step(model)
    if not averages_itself(model):
        sp_attention.average_gradients(model)
    errors = {f"{i}": relative_error(*each) for i, each in enumerate(zip(ours, theirs, strict=True))}
    expected, found = gradients_of(reference), gradients_of(model)
    assert found.keys() == expected.keys()
    return errors | {name: relative_error(found[name], expected[name]) for name in expected}


def largest_error(reference: nn.Module, model: nn.Module, step: Step) -> float:
    return max(errors_of(reference, model, step).values())


def too_large(errors: dict[str, float], tolerance: float = 1e-5) -> dict[str, float]:
    return {name: error for name, error in errors.items() if not error < tolerance}


def loss_step(model: nn.Module, kind: str = "left-padded", length: int = 33, **changes: object) -> list[Tensor]:
    loss = model(**batch_of(kind, length) | changes).loss
    loss.backward()
    return [loss.detach()]


def slopes(model: PreTrainedModel, weights: list[nn.Parameter]) -> tuple[float, float]:
    """How the loss of a model that draws changes along a direction of weights: by its gradient, and by two losses."""
    torch.manual_seed(5)
    directions = [torch.randn_like(weight) for weight in weights]

    def loss_at(distance: float) -> Tensor:
        torch.manual_seed(7)
        with torch.no_grad():
            torch._foreach_add_(weights, directions, alpha=distance)
        loss = model(**batch_of("plain", 33)).loss
        with torch.no_grad():
            torch._foreach_add_(weights, directions, alpha=-distance)
        return loss

    torch.manual_seed(7)
    model(**batch_of("plain", 33)).loss.backward()
    sp_attention.average_gradients(model)
    by_gradient = sum(float((one.grad * way).sum()) for one, way in zip(weights, directions, strict=True))
    step = 1e-3
    return by_gradient, float(loss_at(step).detach() - loss_at(-step).detach()) / (2 * step)


def two_forwards_step(model: nn.Module) -> list[Tensor]:
    losses = [model(**batch_of(kind, length)).loss for kind, length in (("plain", 33), ("packed", 14))]
    (losses[0] + 2 * losses[1]).backward()
    return [loss.detach() for loss in losses]


def hidden_states_step(model: nn.Module, rows: int = 2, length: int = 33) -> list[Tensor]:
    output = model(**batch_of("plain", length, rows), output_hidden_states=True)
    (output.loss + sum((state**2).mean() for state in output.hidden_states)).backward()
    return [output.loss.detach(), *(state.detach() for state in output.hidden_states)]


def train_on(kernel: str) -> tuple[float, float, str]:
    """The error of the loss of a model on another kernel, the largest of a gradient, and what enable() reports."""
    tiny = MODELS["llama-5q1kv"]
    reference, model = tiny.build(), tiny.build()
    report = sp_attention.enable(model, backend=kernel).report()
    errors = errors_of(reference, model, lambda model: loss_step(model, "right-padded"))
    return errors.pop("0"), max(errors.values()), report


def ddp(model: nn.Module, **options: bool) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fsdp(model: nn.Module, apart: str = "") -> nn.Module:
    """`apart`: modules that are units of their own, whose weights are there only while they are called."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    units = [module for name, module in model.named_modules() if apart and name.endswith(apart)]
    for module in (*units, *model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def as_launched() -> None:
    """What torchrun would have set."""
    os.environ |= {"RANK": f"{dist.get_rank()}", "LOCAL_RANK": f"{dist.get_rank()}"}
    os.environ |= {"WORLD_SIZE": f"{dist.get_world_size()}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    be_quiet()


def be_quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def run_command(
    *arguments: str, launcher: tuple[str, ...] = ("-m",), folder: Path = TESTS, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """`sp-attention` with these arguments, away from the source tree, so that the installed package runs.

    text: its standard input.
    """
    return subprocess.run(
        [sys.executable, *launcher, "sp_attention", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        input=text,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def require_example_learns(name: str, folder: Path, timeout: float = 180) -> None:
    """The example runs as its first line says, and its loss falls."""
    first, *_ = (EXAMPLES / name).read_text().splitlines()
    assert first.endswith(f'torchrun --nproc-per-node 2 examples/{name}"""')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLES / name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, env=environment)
    assert ran.returncode == 0, ran.stderr
    losses = [float(number) for number in re.findall(r"loss'?:? '?(\d+\.\d+)", ran.stdout)]
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
