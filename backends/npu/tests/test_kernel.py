"""The kernel `npu`, and torch's on its device, against attention written out: the real torch-npu on stand-ins."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import fused
import host
import pytest
import standin  # noqa: F401  # registers the stand-ins
import torch
from sp_attention_npu import kernel, sp_attention_backends
from torch import Tensor

from sp_attention import testing
from sp_attention.errors import BackendError
from sp_attention.kernels import sdpa
from sp_attention.kernels.registry import find, usable
from sp_attention.kernels.request import Mask, Request

NPU = torch.device("npu:0")
LENGTH = testing.LENGTH
REFUSED = ("softcap", "additive bias", "additive bias by head")
(BACKEND,) = sp_attention_backends()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conforms(dtype: torch.dtype) -> None:
    testing.conform(BACKEND, REFUSED, device=NPU, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_own_conforms_on_this_device(dtype: torch.dtype) -> None:
    (backend,) = sdpa.sp_attention_backends()
    testing.conform(backend, ("softcap",), device=NPU, dtype=dtype)


def test_transformers_own_refuses_this_device() -> None:
    """It would hand on another mask than it is given."""
    backend = find("npu", "transformers:sdpa")
    reasons = [testing.check(backend, feature, device=NPU, dtype=torch.float32) for feature in testing.FEATURES]
    assert all(reasons)


def padding(*rows: tuple[int, int]) -> Tensor:
    places = torch.arange(LENGTH, device=NPU)
    return torch.stack([(places >= first) & (places < last) for first, last in rows])


def documents(*rows: list[int]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]).to(NPU)


def strided(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """No query before 20 sees any key."""
    return (query - key >= 20) & ((query - key) % 3 == 0)


BASE = Mask(2, LENGTH, LENGTH, NPU)
BOTH_SIDES = replace(BASE, causal=False)
PACKED_AND_PADDED = {"documents": documents([20, 17], [9, 28]), "padding": padding((3, 30), (0, 8))}
BY_HEAD = torch.rand(1, 6, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.1
HOLES = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(5)) < 0.5
# Beyond what the kit asks, all that the code tells apart.
MASKS = {
    "window1": replace(BASE, window=1),
    "window1-right": replace(BASE, window=1, padding=padding((0, 30), (3, 33))),
    "window7-right": replace(BASE, window=7, padding=padding((0, 30), (3, 36))),
    "window30-right": replace(BASE, window=30, padding=padding((0, 20), (9, 11))),
    "window7-documents-padded": replace(BASE, window=7, **PACKED_AND_PADDED),
    "documents-padded": replace(BASE, **PACKED_AND_PADDED),
    "both-sides1": replace(BOTH_SIDES, window=1),
    "both-sides7-padded": replace(BOTH_SIDES, window=7, padding=padding((12, 25), (0, 33))),
    "both-sides30-padded": replace(BOTH_SIDES, window=30, padding=padding((12, 25), (3, 37))),
    "both-sides7-documents": replace(BOTH_SIDES, window=7, documents=documents([10, 1, 26], [5, 32])),
    "full-documents-padded": replace(BOTH_SIDES, **PACKED_AND_PADDED),
    "rows-causal": replace(BASE, query_length=11, offset=17),
    "rows-window7": replace(BASE, window=7, query_length=11, offset=17),
    "rows-window7-first": replace(BASE, window=7, query_length=11, offset=3),
    "rows-both-sides7": replace(BOTH_SIDES, window=7, query_length=11, offset=17),
    "rows-both-sides7-last": replace(BOTH_SIDES, window=7, query_length=11, offset=26),
    "rows-behind-the-keys": replace(BASE, query_length=11, offset=33),
    "cross": replace(BOTH_SIDES, query_length=11),
    "holes": replace(BASE, padding=HOLES.index_fill(1, torch.arange(3), False).to(NPU)),
    "strided": replace(BOTH_SIDES, function=strided),
    "by-head": replace(BASE, explicit=BY_HEAD.to(NPU)),
}
SHAPES = {
    "h6-hkv2": {"heads": 6, "kv_heads": 2},
    "h6-hkv1-Dv4": {"heads": 6, "kv_heads": 1, "value_size": 4},
    "h6-hkv6-Dv12": {"heads": 6, "kv_heads": 6, "value_size": 12},
}


def asked(mask: Mask, shape: str = "h6-hkv2", dtype: torch.dtype = torch.float32, **features: Any) -> Request:
    """A request on the device, whose tensors want their gradients."""
    sizes = testing.Shape(mask.query_length, mask.key_length, **SHAPES[shape])
    request = testing.request(mask, sizes, **features)
    tensors = {name: getattr(request, name) for name in ("query", "key", "value", "sinks")}
    moved = {name: tensor.to(NPU, dtype).requires_grad_() for name, tensor in tensors.items() if tensor is not None}
    return replace(request, **moved)


def results(attend: Callable[[Request], Tensor], request: Request) -> list[Tensor]:
    """Output and gradients of queries, keys, values and sinks, in float64 on the CPU."""
    inputs = [t for t in (request.query, request.key, request.value, request.sinks) if t is not None]
    out = attend(request)
    down = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return [out.detach().cpu().double(), *(g.cpu().double() for g in torch.autograd.grad((out * down).sum(), inputs))]


def require_right(request: Request, attend: Callable[[Request], Tensor] = kernel.attend) -> None:
    exact = {name: getattr(request, name) for name in ("query", "key", "value", "sinks", "bias")}
    exact = {name: None if tensor is None else tensor.double() for name, tensor in exact.items()}
    for ours, theirs in zip(results(attend, request), results(testing.attend, replace(request, **exact)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", MASKS)
def test_is_attention_written_out(mask: str, shape: str) -> None:
    require_right(asked(replace(MASKS[mask]), shape))
    require_right(asked(replace(MASKS[mask]), shape, sinks=torch.arange(6.0) - 2))


@pytest.mark.parametrize("mask", MASKS)
def test_torchs_own_is_attention_written_out(mask: str) -> None:
    (backend,) = sdpa.sp_attention_backends()
    require_right(asked(replace(MASKS[mask])), backend.attend)


@pytest.mark.parametrize(("sequences", "tokens"), [(3, 2**20), (1024, 20)])
@pytest.mark.parametrize("mask", ["window7-documents-padded", "documents-padded", "both-sides7-documents"])
def test_many_sequences_take_several_calls(
    mask: str, sequences: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "SEQUENCES", sequences)
    monkeypatch.setattr(kernel, "TOKENS", tokens)
    request = asked(replace(MASKS[mask]))
    fused.calls.clear()
    kernel.attend(request)
    assert len(fused.calls) > 1
    assert all(len(call["actual_seq_qlen"]) <= sequences for call in fused.calls)
    require_right(request)


# What the operator is told, for masks of each kind: layout, sparse mode, limits, lengths.
TOLD = {
    "causal": (BASE, [("BSND", 3, None, None)]),
    "full": (replace(BOTH_SIDES), [("BSND", 0, None, None)]),
    "window7": (replace(BASE, window=7), [("BSND", 4, (6, 0), None)]),
    "both-sides7": (replace(BOTH_SIDES, window=7), [("BSND", 4, (6, 6), None)]),
    "documents": (replace(BASE, documents=documents([10, 1, 26], [37])), [("TND", 3, None, ([10, 11, 37, 74],) * 2)]),
    "left": (replace(BASE, padding=padding((9, 37), (0, 37))), [("TND", 3, None, ([28, 65],) * 2)]),
    "right": (
        replace(BASE, padding=padding((0, 30), (0, 37))),
        [("TND", 3, None, ([30, 67],) * 2), ("TND", 0, None, ([7], [30]))],
    ),
    "window7-right": (
        replace(BASE, window=7, padding=padding((0, 34), (0, 37))),
        # The last 3 queries of the first row are in reverse order, and so are the 6 keys that they see.
        [("TND", 4, (6, 0), ([34, 37, 74], [34, 40, 77]))],
    ),
    "holes": (MASKS["holes"], [("BSND", 1, None, None)]),
}


@pytest.mark.parametrize("kind", TOLD)
def test_the_operator_is_told(kind: str) -> None:
    mask, expected = TOLD[kind]
    fused.calls.clear()
    kernel.attend(asked(replace(mask), scale=0.3))
    told = []
    for call in fused.calls:
        limits = (call["before"], call["after"]) if call["sparse_mode"] == 4 else None
        ends = call["actual_seq_qlen"], call["actual_seq_kvlen"]
        told.append((call["input_layout"], call["sparse_mode"], limits, None if ends[0] is None else ends))
        assert (call["scale"], call["keep_prob"], call["sink"]) == (0.3, 1, None)
    assert told == expected


def hiding(hidden: Tensor, value: float) -> Tensor:
    return torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(hidden, value)


BIASES = {
    "by-row": lambda: torch.randn(2, 1, LENGTH, LENGTH),
    "by-head": lambda: torch.randn(1, 6, LENGTH, LENGTH),
    "by-key": lambda: torch.randn(2, 6, 1, LENGTH),
    # As users write masks: with the lowest number, or with -inf, and a query that sees nothing.
    "lowest": lambda: hiding(HOLES[:, None, None], torch.finfo(torch.float32).min),
    "infinite": lambda: hiding(torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf),
}


@pytest.mark.parametrize("mask", ["full", "causal", "padded"])
@pytest.mark.parametrize("bias", BIASES)
def test_adds_a_bias_that_is_not_trained(bias: str, mask: str) -> None:
    masks = {
        "full": replace(BOTH_SIDES),
        "causal": BASE,
        "padded": replace(BASE, padding=padding((9, 37), (0, 30))),
    }
    torch.manual_seed(0)
    request = replace(asked(replace(masks[mask]), scale=0.3), bias=BIASES[bias]().to(NPU))
    assert kernel.refuses(request) is None
    require_right(request)
    require_right(replace(request, sinks=torch.ones(6, device=NPU, requires_grad=True)))


@pytest.mark.parametrize("mask", MASKS)
def test_after_the_first_layer_nothing_waits_for_the_device(mask: str) -> None:
    request = asked(replace(MASKS[mask]), sinks=torch.arange(6.0))
    kernel.attend(request)
    host.reads.clear()
    assert kernel.refuses(request) is None
    kernel.attend(replace(request, query=request.query + 1)).sum().backward()
    assert host.reads == []


@pytest.mark.parametrize("mask", ["documents-padded", "strided"])
def test_a_mask_is_worked_out_once(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, right = [], kernel._calls
    monkeypatch.setattr(kernel, "_calls", lambda mask: seen.append(mask) or right(mask))
    request = asked(replace(MASKS[mask]))
    for _ in range(3):
        kernel.attend(request)
    assert seen == [request.mask]


def test_layers_share_the_operators_mask() -> None:
    request = asked(replace(BASE))
    fused.calls.clear()
    kept = [kernel.attend(request) for _ in range(2)]
    places = {call["atten_mask"].data_ptr() for call in fused.calls}
    assert (len(kept), len(places)) == (2, 1)


def test_what_waits_for_the_device_is_seen() -> None:
    numbers = torch.ones(3, device=NPU)
    for name, read in {
        "_to_copy": numbers.cpu,
        "_local_scalar_dense": numbers[0].item,
        "nonzero": numbers.nonzero,
    }.items():
        host.reads.clear()
        read()
        assert f"aten::{name}" in host.reads


def test_an_evaluation_in_inference_mode_leaves_nothing_behind() -> None:
    request = asked(replace(BASE))
    with torch.inference_mode():
        kernel.attend(request)
    require_right(asked(replace(BASE)))


REFUSALS = {
    "npu_fusion_attention has no softcap": {"softcap": 30.0},
    "npu_fusion_attention takes bfloat16, float16 and float32, not torch.float64": {
        "query": torch.zeros(2, LENGTH, 6, 8, dtype=torch.float64)
    },
    "npu_fusion_attention takes heads of up to 768 numbers, not 1024": {"query": torch.zeros(2, LENGTH, 6, 1024)},
    "npu_fusion_attention takes up to 256 heads, not 257": {"query": torch.zeros(2, LENGTH, 257, 8)},
    "npu_fusion_attention takes sequences of up to 1,048,576 tokens": {"mask": Mask(1, 2**20 + 1, 2**20 + 1, NPU)},
    "npu_fusion_attention gives no gradient for a bias on the scores": {
        "bias": torch.zeros(1, 1, LENGTH, LENGTH, requires_grad=True)
    },
    "npu_fusion_attention cannot drop all": {"dropout": 1.0},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refuses(reason: str) -> None:
    assert kernel.refuses(replace(asked(replace(BASE)), **REFUSALS[reason])) == reason


def test_is_found_and_preferred_on_its_device_and_nowhere_else() -> None:
    assert find("npu", "npu").attend is kernel.attend
    assert usable("npu")[0].kernel == "npu"
    assert find("npu", "sdpa").kernel == "sdpa"
    with pytest.raises(BackendError, match=r"unknown backend 'npu' on cpu \(it exists on npu\)"):
        find("cpu", "npu")
