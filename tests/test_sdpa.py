"""Kernel `sdpa` against attention written out in float64, and its memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from models import Tiny
from strategies import masks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.masking_utils import blockwise_overlay

import sp_attention
from sp_attention import testing
from sp_attention.cli.rss import resident_memory
from sp_attention.kernels import sdpa, transformers
from sp_attention.kernels.request import Mask, Request
from sp_attention.launch import run_ranks

LENGTH = 40
CPU = torch.device("cpu")


def padding(*rows: tuple[int, int]) -> Tensor:
    """Real keys [first, last) of each row."""
    places = torch.arange(LENGTH)
    return torch.stack([(places >= first) & (places < last) for first, last in rows])


def documents(*rows: list[int]) -> Tensor:
    """Documents of the given lengths in each row."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def prefix(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) | (key < 7 * (batch + 1))


def strided(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Far keys, and no query before 20 sees any."""
    return (query - key >= 20) & ((query - key) % 3 == 0)


BASE = Mask(2, LENGTH, LENGTH, CPU)
GENERATOR = torch.Generator().manual_seed(0)
MASKS = {
    "causal": BASE,
    "full": replace(BASE, causal=False),
    "left": replace(BASE, padding=padding((9, LENGTH), (0, LENGTH))),
    "right": replace(BASE, padding=padding((0, 31), (0, LENGTH))),
    "both": replace(BASE, padding=padding((5, 29), (1, 39))),
    "nothing-real": replace(BASE, padding=padding((0, 0), (0, LENGTH))),
    "full-padded": replace(BASE, causal=False, padding=padding((5, 29), (0, LENGTH))),
    "window1": replace(BASE, window=1),
    "window7": replace(BASE, window=7),
    "window39": replace(BASE, window=39),
    "window7-left": replace(BASE, window=7, padding=padding((9, LENGTH), (0, LENGTH))),
    "window7-right": replace(BASE, window=7, padding=padding((0, 20), (3, 38))),
    "documents": replace(BASE, documents=documents([10, 1, 29], [40])),
    "documents-window7": replace(BASE, window=7, documents=documents([10, 1, 29], [5, 35])),
    "documents-padded": replace(BASE, documents=documents([10, 30], [20, 20]), padding=padding((3, 40), (0, 33))),
    "holes": replace(BASE, padding=torch.rand(2, LENGTH, generator=GENERATOR) < 0.7),
    "both-sides1": replace(BASE, causal=False, window=1),
    "both-sides7": replace(BASE, causal=False, window=7),
    "both-sides39": replace(BASE, causal=False, window=39),
    "both-sides7-padded": replace(BASE, causal=False, window=7, padding=padding((12, 25), (0, 33))),
    "both-sides30-padded": replace(BASE, causal=False, window=30, padding=padding((12, 25), (3, 40))),
    "both-sides30-left": replace(BASE, causal=False, window=30, padding=padding((12, LENGTH), (15, LENGTH))),
    "both-sides7-documents": replace(BASE, causal=False, window=7, documents=documents([10, 1, 29], [5, 35])),
    "prefix": replace(BASE, causal=False, function=prefix),
    "strided": replace(BASE, causal=False, function=strided),
    "strided-padded": replace(BASE, function=strided, padding=padding((9, LENGTH), (0, 25))),
    "rows": replace(BASE, window=7, padding=padding((5, 29), (0, LENGTH)), offset=3, query_length=17),
    "cross": replace(BASE, causal=False, query_length=17, padding=padding((5, 29), (0, LENGTH))),
    "cross-unpadded": replace(BASE, causal=False, query_length=17),
    "by-head": replace(BASE, explicit=torch.rand(1, 6, LENGTH, LENGTH, generator=GENERATOR) < 0.5),
    "keys": replace(BASE, causal=False, explicit=torch.rand(2, 1, 1, LENGTH, generator=GENERATOR) < 0.5),
    "explicit": replace(BASE, causal=False, explicit=torch.rand(1, 1, LENGTH, LENGTH, generator=GENERATOR) < 0.5),
}
# (query heads, KV heads, head size, value head size)
HEADS = {"H2": (2, 2, 8, 8), "H4-Hkv2": (4, 2, 8, 8), "H3-Hkv1-Dv4": (3, 1, 8, 4), "H2-Dv12": (2, 2, 8, 12)}


def request_for(mask: Mask, heads: str) -> Request:
    query_heads, kv_heads, size, value_size = HEADS[heads]
    shape = testing.Shape(mask.query_length, LENGTH, query_heads, kv_heads, size, value_size)
    request = testing.request(mask.heads(range(0, query_heads)), shape)
    for tensor in (request.query, request.key, request.value):
        tensor.requires_grad_()
    return request


def compare(request: Request) -> None:
    inputs = [request.query, request.key, request.value]
    inputs += [tensor for tensor in (request.bias, request.sinks) if tensor is not None]
    outputs = [function(request) for function in (sdpa.attend, testing.attend)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(outputs[1])
    ours, theirs = (torch.autograd.grad((output * weights).sum(), inputs) for output in outputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("band", [6, 256])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
def test_is_attention_written_out(mask: str, heads: str, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "BAND", band)
    compare(request_for(replace(MASKS[mask]), heads))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
def test_has_sinks(mask: str, heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "BAND", 6)
    sinks = (3 * torch.randn(HEADS[heads][0], dtype=torch.float64)).requires_grad_()
    compare(replace(request_for(replace(MASKS[mask]), heads), sinks=sinks))


@settings(max_examples=200, deadline=None)
@given(masks(rows=testing.BATCH))
def test_any_mask_is_attention_written_out(mask: Mask) -> None:
    request = testing.request(mask, testing.Shape(mask.query_length, mask.key_length))
    request = replace(request, **{name: getattr(request, name)[: mask.batch] for name in ("query", "key", "value")})
    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        monkeypatch.setattr(sdpa, "BAND", 3)
        torch.testing.assert_close(sdpa.attend(request), testing.attend(request), rtol=1e-10, atol=1e-10)


# What torch is asked for, in tiles of 16: rows, queries, keys and the pattern.
ASKED = {
    "causal": [(2, 40, 40, "causal")],
    "full": [(2, 40, 40, "full")],
    "left": [(1, 31, 31, "causal"), (1, 40, 40, "causal")],
    "right": [(1, 31, 31, "causal"), (1, 9, 31, "full"), (1, 40, 40, "causal")],
    "window7": [(2, 7, 7, "causal"), (2, 16, 22, "mask"), (2, 16, 22, "mask"), (2, 1, 7, "mask")],
    "window7-right": [
        *[(1, 7, 7, "causal"), (1, 16, 19, "mask"), (1, 3, 3, "mask")],
        *[(1, 7, 7, "causal"), (1, 16, 22, "mask"), (1, 14, 18, "mask")],
    ],
    "documents": [(1, 10, 10, "causal"), (1, 1, 1, "full"), (1, 29, 29, "causal"), (1, 40, 40, "causal")],
    "both-sides7": [(2, 16, 22, "mask"), (2, 16, 28, "mask"), (2, 8, 14, "mask")],
    "first-queries": [(2, 17, 17, "causal")],
    # See causal_after.
    "last-queries": [],
    "cross": [(1, 17, 24, "full"), (1, 17, 40, "full")],
    "gap": [(2, 16, 16, "mask"), (2, 16, 32, "mask"), (2, 8, 40, "mask")],
}
MORE = {
    "first-queries": replace(BASE, query_length=17),
    "last-queries": replace(BASE, query_length=17, offset=23),
    "gap": replace(BASE, padding=torch.arange(LENGTH).expand(2, -1) != 5),
}


@pytest.mark.parametrize("mask", ASKED)
def test_torch_is_asked_for(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "BAND", 16)
    asked = []

    def spy(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, *args: Any, **options: Any) -> Tensor:
        pattern = "causal" if options["is_causal"] else "full" if hidden is None else "mask"
        asked.append((query.shape[0], query.shape[2], key.shape[2], pattern))
        return torchs(query, key, value, hidden, *args, **options)

    torchs = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        sdpa.attend(request_for(replace((MASKS | MORE)[mask]), "H2"))
    assert asked == ASKED[mask]


@pytest.mark.parametrize("features", [{}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["without a mask", "with torch's mask"])
def test_later_queries_see_all_keys_before_them(features: dict[str, Any], dropout: float) -> None:
    shape = testing.Shape(17, LENGTH, 4, 2, 8)
    for mask in (
        MORE["last-queries"],
        replace(MORE["last-queries"], offset=11),
        replace(MORE["last-queries"], window=7),
    ):
        asked = testing.request(mask, shape, **features)
        expected = results(testing.attend, asked)
        for name, result in results(sdpa.attend, replace(asked, dropout=dropout)).items():
            torch.testing.assert_close(result, expected[name], msg=name)


def results(attend: Callable[[Request], Tensor], asked: Request) -> dict[str, Tensor]:
    """The output, and the gradients of queries, keys and values."""
    given = {name: getattr(asked, name).detach().clone().requires_grad_() for name in ("query", "key", "value")}
    out = attend(replace(asked, **given))
    down = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    gradients = torch.autograd.grad((out * down).sum(), [*given.values()])
    return {"output": out, **dict(zip(given, gradients, strict=True))}


def test_sinks_and_no_sinks_share_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "BAND", 6)
    request = request_for(replace(MASKS["window7"]), "H2")
    compare(request)
    compare(replace(request, sinks=torch.ones(2, dtype=torch.float64, requires_grad=True)))
    compare(request)


def test_sinks_of_more_precision_than_the_queries_keep_it() -> None:
    request = testing.request(BASE, testing.Shape(LENGTH, LENGTH, 2, 2, 8), scale=0.3)
    low = replace(
        request,
        **{name: getattr(request, name).bfloat16() for name in ("query", "key", "value")},
        # All queries and keys alike: the sink's score decides, and rounded to bfloat16 it would be off by 0.02.
        sinks=torch.tensor([9.77, -1.23]),
    )
    low = replace(low, query=torch.zeros_like(low.query), value=torch.ones_like(low.value))
    exact = replace(
        low, query=low.query.double(), key=low.key.double(), value=low.value.double(), sinks=low.sinks.double()
    )
    torch.testing.assert_close(sdpa.attend(low).double(), testing.attend(exact), rtol=2**-8, atol=0)


@pytest.mark.parametrize("band", [6, 256])
@pytest.mark.parametrize("shape", [(1, 4, LENGTH, LENGTH), (2, 1, LENGTH, LENGTH), (2, 4, 1, LENGTH)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "left", "documents", "window7", "full", "both-sides7", "prefix"])
def test_adds_a_bias(mask: str, shape: tuple[int, ...], band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "BAND", band)
    bias = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    request = replace(request_for(replace(MASKS[mask]), "H4-Hkv2"), bias=bias)
    compare(request)
    compare(replace(request, sinks=torch.randn(4, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("mask", ["causal", "window7", "prefix"])
def test_backward_has_the_dropout_of_forward(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "BAND", 6)
    monkeypatch.setitem(
        testing.FEATURES,
        "dropout",
        lambda: testing.request(
            replace(MASKS[mask]), testing.Shape(LENGTH, LENGTH), sinks=torch.zeros(3, dtype=torch.float64), dropout=0.4
        ),
    )
    (backend,) = sdpa.sp_attention_backends()
    assert testing.check(backend, "dropout") is None


def test_refuses_softcap_and_nothing_else() -> None:
    request = request_for(BASE, "H2")
    assert sdpa.refuses(request) is None
    assert sdpa.refuses(replace(request, sinks=torch.zeros(2))) is None
    assert sdpa.refuses(replace(request, softcap=30.0)) == "torch's scaled_dot_product_attention has no softcap"


@pytest.mark.parametrize("attend", [sdpa.attend, transformers.sdpa], ids=["sdpa", "transformers:sdpa"])
def test_torch_never_takes_cudnn(attend: Callable[[Request], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return torchs(*args, **options)

    torchs = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for feature in ("causal", "sliding window", "mask tensor"):
        attend(testing.FEATURES[feature]())
    assert set(seen) == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


HALF_ON_CUDA = "in half precision on CUDA, gradients of torch's scaled_dot_product_attention with a mask"


def refused_on_cuda(feature: str, dtype: torch.dtype) -> str | None:
    """What is told to a request for a feature whose queries are on a device that this machine may not have."""
    request = testing.request_for(feature, dtype=dtype)
    with FakeTensorMode():
        query = torch.empty(request.query.shape, dtype=dtype, device="cuda")
    return sdpa.refuses(replace(request, query=query))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_half_precision_on_cuda_it_trains_without_masks_of_torch_only(dtype: torch.dtype) -> None:
    masked = (
        "sliding window",
        "mask tensor",
        "additive bias",
        "padding between real tokens",
        "last queries of a sequence",
    )
    for feature in masked:
        assert (refused_on_cuda(feature, dtype) or "").startswith(HALF_ON_CUDA), feature
        assert refused_on_cuda(feature, torch.float32) is None
        with torch.no_grad():
            assert refused_on_cuda(feature, dtype) is None
    for feature in ("causal", "left padding", "packed documents", "bidirectional", "grouped KV heads"):
        assert refused_on_cuda(feature, dtype) is None


def largest_saved(request: Request) -> tuple[int, int]:
    """Elements of the largest tensor, and of all tensors, that forward keeps for backward."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sdpa.attend(request).sum().backward()
    return max(storages.values()), sum(storages.values())


SAVING = {
    "blocks": {"causal": False, "function": blockwise_overlay(torch.arange(4096)[None] // 512)},
    "both-sides": {"causal": False, "window": 64},
    "holes": {"padding": (torch.arange(4096) % 5 > 0)[None]},
    "chunks": {"documents": (torch.arange(4096) // 512)[None]},
}


@pytest.mark.parametrize("sinks", [False, True], ids=["no-sinks", "sinks"])
@pytest.mark.parametrize("kind", SAVING)
def test_keeps_nothing_of_size_length_by_length(kind: str, sinks: bool) -> None:
    length = 4096
    mask = Mask(1, length, length, CPU, **SAVING[kind])
    query, key, value = (torch.randn(1, length, 1, 8, requires_grad=True) for _ in range(3))
    scores = torch.zeros(1, requires_grad=True) if sinks else None
    largest, together = largest_saved(Request(query, key, value, mask, 0.3, sinks=scores))
    assert largest < length * length / 100
    assert together < length * length / 8


LONG = 32_768


def long_batch(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (1, LONG), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    if kind == "padded":
        batch["attention_mask"] = (torch.arange(LONG) >= LONG // 8)[None].long()
    if kind == "packed":
        batch["position_ids"] = (torch.arange(LONG) % 12_000)[None]
    return batch


def peak_of_a_step(kind: str) -> int:
    """Bytes that a forward and backward of one layer add to this rank's resident memory, at most."""
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings |= {"head_dim": 16, "intermediate_size": 32, "max_position_embeddings": LONG}
    tiny = Tiny("MistralForCausalLM", settings | {"sliding_window": 4096 if kind == "windowed" else None})
    model = tiny.build(torch.float32)
    sp_attention.enable(model, backend="sdpa")
    before = resident_memory("VmRSS")
    model(**long_batch(kind), use_cache=False).loss.backward()
    return resident_memory("VmHWM") - before


@pytest.mark.parametrize("kind", ["causal", "windowed", "padded", "packed"])
def test_builds_nothing_of_size_length_by_length(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    peak = max(run_ranks(2, peak_of_a_step, kind, timeout=300))
    with capsys.disabled():
        print(f"\nS = {LONG:,}, 2 ranks, 1 layer, {kind}: {peak / 2**20:.0f} MiB a rank for forward and backward")
    # A bool mask of S × S alone would be 1 GiB.
    assert peak < LONG * LONG / 4
