"""Attention for models that are not of transformers: that of one process, from spans, or an error on every rank."""

import subprocess
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor

from sp_attention import testing
from sp_attention.kernels.request import Mask, Request
from sp_attention.launch import run_ranks
from sp_attention.ulysses.module import UlyssesAttention

LENGTH, SIZE, VALUE_SIZE = 13, 8, 4
# On three and four ranks those of one and two heads are shared by queries too, on six those of five.
HEADS = ((6, 3), (5, 1), (2, 1), (1, 1), (3, 3))
# Of the last, some ranks have no queries that see anything.
KINDS = ("causal", "packed, window", "bidirectional, padded", "mostly padding")


def request_of(heads: int, kv_heads: int, kind: str) -> Request:
    """Of the whole sequence, in float64, always the same."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    documents = torch.tensor([[0] * 5 + [1] * 8, [0] * 13])
    masks: dict[str, dict[str, Any]] = {
        "causal": {},
        "packed, window": {"documents": documents, "window": 4},
        "bidirectional, padded": {"causal": False, "padding": torch.arange(LENGTH) >= torch.tensor([[3], [0]])},
        "mostly padding": {"padding": torch.arange(LENGTH) >= torch.tensor([[11], [10]])},
    }
    request = Request(
        random(2, LENGTH, heads, SIZE),
        random(2, LENGTH, kv_heads, SIZE),
        random(2, LENGTH, kv_heads, VALUE_SIZE),
        Mask(2, LENGTH, LENGTH, torch.device("cpu"), **masks[kind]),
        scale=0.4,
    )
    if kind == "causal":
        return replace(request, sinks=random(heads), bias=random(1, heads, LENGTH, LENGTH))
    return request


def results(attend: Any, given: list[Tensor], down: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    given = [tensor.detach().clone().requires_grad_() for tensor in given]
    out = attend(*given)
    return [out.detach(), *torch.autograd.grad((out * down).sum(), given)]


def errors() -> dict[str, float]:
    """The largest error of an output or a gradient, relative to the largest number that is expected."""
    module, found = UlyssesAttention("sdpa"), {}
    span = module.span(LENGTH)
    mine = slice(span.start, span.stop)
    for (heads, kv_heads), kind in product(HEADS, KINDS):
        request = request_of(heads, kv_heads, kind)
        qkv = [request.query, request.key, request.value]
        extra = [one for one in (request.sinks, request.bias) if one is not None]
        down = torch.randn(
            2, LENGTH, heads, VALUE_SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )

        def alone(query: Tensor, key: Tensor, value: Tensor, *more: Tensor, request: Request = request) -> Tensor:
            named = dict(zip(("sinks", "bias"), more, strict=False))
            return testing.attend(replace(request, query=query, key=key, value=value, **named))

        def shared(query: Tensor, key: Tensor, value: Tensor, *more: Tensor, request: Request = request) -> Tensor:
            named = dict(zip(("sinks", "bias"), more, strict=False))
            return module(query, key, value, LENGTH, request.mask, scale=request.scale, **named)

        expected = results(alone, [*qkv, *extra], down)
        got = results(shared, [*(tensor[:, mine] for tensor in qkv), *extra], down[:, mine])
        for whole in got[4:]:  # Of what every rank has whole, each has the gradient of its own loss.
            torch.distributed.all_reduce(whole)
        expected = [one[:, mine] if number < 4 else one for number, one in enumerate(expected)]
        found[f"{heads} heads over {kv_heads}, {kind}"] = max(map(relative_error, got, expected))
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4, pytest.param(6, marks=pytest.mark.slow)])
def test_outputs_and_gradients_of_spans_are_those_of_one_process(ranks: int) -> None:
    for found in run_ranks(ranks, errors, timeout=120):
        assert all(error < 1e-12 for error in found.values()), found


def test_without_ranks_it_is_the_kernel() -> None:
    request = request_of(6, 3, "packed, window")
    out = UlyssesAttention("sdpa")(request.query, request.key, request.value, LENGTH, request.mask, scale=0.4)
    torch.testing.assert_close(out, testing.attend(request))
    with pytest.raises(ValueError, match=r"of 14 tokens, which module.span\(14\) has"):
        UlyssesAttention("sdpa")(request.query, request.key, request.value, 14)


def refusals(rank: int) -> dict[str, str]:
    """What all ranks raise where one of them is given something else."""
    module = UlyssesAttention("sdpa")
    span = module.span(LENGTH)
    mine = slice(span.start, span.stop)
    request = request_of(6, 3, "packed, window")
    query, key, value = (tensor[:, mine] for tensor in (request.query, request.key, request.value))
    is_odd = module.peers.rank == rank
    given: dict[str, tuple[Any, ...]] = {
        "a token less": (query[:, 1:], key[:, 1:], value[:, 1:], LENGTH) if is_odd else (query, key, value, LENGTH),
        "another length": (query, key, value, LENGTH + 1) if is_odd else (query, key, value, LENGTH),
        "another dtype": (query.float(), key.float(), value.float(), LENGTH) if is_odd else (query, key, value, LENGTH),
        "heads that do not fit": (query, key[:, :, :1].expand(-1, -1, 4, -1), value, LENGTH),
        "fewer heads": (query[:, :, :3], key, value, LENGTH) if is_odd else (query, key, value, LENGTH),
        "a kernel that does not": (query, key, value, LENGTH),
    }
    found = {}
    for name, arguments in given.items():
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            module(*arguments, softcap=2.0 if name == "a kernel that does not" else None)
        found[name] = f"{type(caught.value).__name__}: {caught.value}"
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_what_differs_on_one_rank_is_an_error_on_all(rank: int) -> None:
    first, second = run_ranks(2, refusals, rank)
    assert first == second
    assert f"rank {rank}: queries [2, " in first["a token less"]
    assert "tokens, which module.span(13) has" in first["a token less"]
    assert "do not fit each other" in first["heads that do not fit"]
    for name in ("another dtype", "fewer heads"):
        assert first[name].startswith("ValueError: not all ranks are given the same length, heads, sizes and dtype")
    assert first["another length"].startswith("ValueError: ")
    assert "BackendError: UlyssesAttention: kernel 'sdpa' on cpu cannot do this" in first["a kernel that does not"]


def test_it_works_where_transformers_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; import torch; "
        "from sp_attention.ulysses.module import UlyssesAttention; "
        "query = torch.randn(1, 5, 2, 8); print(UlyssesAttention('sdpa')(query, query, query, 5).shape)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "torch.Size([1, 5, 2, 8])", ran.stderr
