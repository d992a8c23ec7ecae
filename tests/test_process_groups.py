"""Every way of saying which ranks share a sequence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import LLAMA, MODELS, batch_of
from torch.distributed.device_mesh import init_device_mesh

import sp_attention
from sp_attention.distributed.process_groups import resolve
from sp_attention.launch import run_ranks

CPU = torch.device("cpu")


class Unit:
    """An mpu object."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self.group


def members_of_each_way() -> dict[str, list[int]]:
    """The global ranks that this rank shares sequences with, for every way of saying so; 4 processes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    across = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "dp"))
    ways = {
        "default": resolve(None, None, CPU),
        "sp_size 2": resolve(None, 2, CPU),
        "sp_size 4": resolve(None, 4, CPU),
        "group": resolve(mesh["dp"].get_group(), None, CPU),
        "mesh of one dim": resolve(mesh["sp"], None, CPU),
        "mesh with a dim sp": resolve(across, None, CPU),
        "mpu": resolve(Unit(mesh["sp"].get_group()), None, CPU),
    }
    return {way: dist.get_process_group_ranks(peers.group) for way, peers in ways.items()}


def test_all_ways_give_the_ranks_they_say() -> None:
    for rank, ways in enumerate(run_ranks(4, members_of_each_way)):
        neighbours = [rank // 2 * 2, rank // 2 * 2 + 1]
        columns = [rank % 2, rank % 2 + 2]
        assert ways == {
            "default": [0, 1, 2, 3],
            "sp_size 2": neighbours,
            "sp_size 4": [0, 1, 2, 3],
            "group": columns,
            "mesh of one dim": neighbours,
            "mesh with a dim sp": columns,
            "mpu": neighbours,
        }


def refusals() -> list[str]:
    model = MODELS["llama-tied"].build(torch.float32)
    unnamed = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "tp"))
    texts = []
    wrong = [{"sp_size": 3}, {"sp_size": 0}, {"group": "all"}, {"group": unnamed}, {"group": unnamed, "sp_size": 2}]
    for options in wrong:
        with pytest.raises(ValueError, match=r"\w") as refusal:
            sp_attention.enable(model, backend="sdpa", **options)
        texts.append(str(refusal.value))
    return texts


def test_what_does_not_fit_is_refused_on_every_rank_with_the_cure() -> None:
    every = run_ranks(4, refusals)
    assert every[0] == every[1] == every[2] == every[3]
    assert every[0] == [
        "4 processes cannot be cut into groups of 3; use 1, 2 or 4",
        "4 processes cannot be cut into groups of 0; use 1, 2 or 4",
        "group is a str; it must be a ProcessGroup, a DeviceMesh, or an object with get_sequence_parallel_group()",
        "a device mesh of 2 dimensions ('dp', 'tp') does not say which one shares the sequence: pass one dimension, "
        "as in mesh['tp'], or name it 'sp'",
        "give enable() either group or sp_size, not both",
    ]


def refuse_three_of_eight() -> str:
    with pytest.raises(ValueError, match="cut into groups") as refusal:
        resolve(None, 3, CPU)
    return str(refusal.value)


def test_eight_processes_are_told_their_choices() -> None:
    texts = run_ranks(8, refuse_three_of_eight)
    assert set(texts) == {"8 processes cannot be cut into groups of 3; use 1, 2, 4 or 8"}


def train_in_two_groups() -> tuple[float, list[torch.Tensor]]:
    """A step of 2 groups x 2 ranks, each group with its own batch; the mean over all ranks of the gradients."""
    model = LLAMA.build()
    handle = sp_attention.enable(model, backend="sdpa", sp_size=2)
    assert handle.report().startswith("sp_attention: 4 processes = 2 groups x 2 ranks, ")
    loss = model(**batch_of("plain", 33 - dist.get_rank() // 2)).loss
    loss.backward()
    sp_attention.average_gradients(model)
    return loss.item(), [parameter.grad for parameter in model.parameters()]


def test_groups_train_on_their_own_batches_and_gradients_are_the_mean_of_theirs() -> None:
    model, losses = LLAMA.build(), []
    for length in (33, 32):
        loss = model(**batch_of("plain", length)).loss
        (loss / 2).backward()
        losses.append(loss.item())
    for rank, (loss, grads) in enumerate(run_ranks(4, train_in_two_groups)):
        assert loss == pytest.approx(losses[rank // 2], rel=1e-6)
        for ours, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-6 * parameter.grad.abs().max().item())


def test_one_process_changes_nothing() -> None:
    model = LLAMA.build()
    before = dict(vars(model))
    handle = sp_attention.enable(model, backend="sdpa")
    assert vars(model) == before
    assert model.config._attn_implementation == "sdpa"
    assert handle.report() == "sp_attention: one rank, so nothing is changed"
    handle.disable()


def test_more_than_one_rank_in_a_lone_process_names_torchrun() -> None:
    with pytest.raises(ValueError, match=r"sp_size=2 needs 2 processes or more, and this is one: use torchrun"):
        sp_attention.enable(LLAMA.build(), backend="sdpa", sp_size=2)


SCRIPT = r"""
import sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from models import LLAMA, batch_of
import sp_attention
model = LLAMA.build()
sp_attention.enable(model, backend="sdpa")
loss = model(**batch_of("plain", 33)).loss.item()
print(f"{dist.get_rank()} {dist.get_backend()} {loss:.4f}\n", end="", flush=True)
"""


def test_under_torchrun_enable_starts_the_process_group(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [*torchrun, str(script), str(Path(__file__).parent)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    loss = LLAMA.build()(**batch_of("plain", 33)).loss.item()
    assert sorted(ran.stdout.splitlines()) == [f"{rank} gloo {loss:.4f}" for rank in (0, 1)]
