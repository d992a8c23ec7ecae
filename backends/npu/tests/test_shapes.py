"""Shapes at scale, where nothing is computed: torch-npu's own meta kernels, and a fake process group of many ranks."""

from collections.abc import Iterator

import pytest
import standin  # noqa: F401  # registers the stand-ins
import torch
import torch.distributed as dist
from sp_attention_npu import kernel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from sp_attention.distributed.peers import Peers
from sp_attention.kernels.request import Mask, Request
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head
from sp_attention.ulysses.head_plan import head_plan

NPU = torch.device("npu:0")
CASES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 4096},
}


def tensors(
    batch: int, length: int, heads: int, kv_heads: int, device: torch.device = NPU
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((heads, 192), (kv_heads, 192), (kv_heads, 128))
    return tuple(
        torch.empty(batch, length, count, size, dtype=torch.bfloat16, device=device, requires_grad=True)
        for count, size in sizes
    )


def require_shapes(request: Request) -> None:
    assert kernel.refuses(request) is None
    out = kernel.attend(request)
    assert (out.dtype, out.device) == (request.query.dtype, request.query.device)
    assert out.shape == (*request.query.shape[:3], request.value.shape[3])
    inputs = [request.query, request.key, request.value] + [s for s in (request.sinks,) if s is not None]
    for tensor, gradient in zip(inputs, torch.autograd.grad(out, inputs, torch.empty_like(out)), strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    """Tensors of the device without memory, and torch-npu's meta kernels and gradient formulas for them."""
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("sinks", [False, True], ids=["no-sinks", "sinks"])
@pytest.mark.parametrize("case", CASES)
def test_a_million_tokens(case: str, sinks: bool) -> None:
    mask = Mask(1, 2**20, 2**20, NPU, **CASES[case])
    scores = torch.empty(8, dtype=torch.bfloat16, device=NPU, requires_grad=True) if sinks else None
    require_shapes(Request(*tensors(1, 2**20, 8, 2), mask, 0.1, sinks=scores))


@pytest.fixture
def fake_group(request: pytest.FixtureRequest) -> Iterator[Peers]:
    ranks = request.param
    dist.init_process_group("fake", rank=ranks // 3, world_size=ranks, store=FakeStore())
    assert dist.group.WORLD is not None
    yield Peers(dist.group.WORLD, ranks // 3, ranks)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("case", "fake_group"), [("causal", 1024), ("window", 64), ("full", 8), ("causal", 8)], indirect=["fake_group"]
)
def test_a_layer_of_many_ranks(case: str, fake_group: Peers) -> None:
    # Neither the tokens nor the heads can be divided by the ranks.
    length, heads, kv_heads = 1_000_003, 1030, 206
    plan = head_plan(heads, kv_heads, fake_group.size)
    mine = fake_group.span(length)
    query, key, value = tensors(1, len(mine), heads, kv_heads)
    exchanged = seq_to_head(query, key, value, length, plan, fake_group)
    request = Request(*exchanged, Mask(1, length, length, NPU, **CASES[case]), 0.1)
    assert request.query.shape == (1, length, len(plan.query[fake_group.rank]), 192)
    assert kernel.refuses(request) is None
    out = head_to_seq(kernel.attend(request), plan, fake_group)
    assert out.shape == (1, len(mine), heads, 128)
    gradients = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]
