"""Kernel `sdpa` against attention written out in float64, and its memory."""

from dataclasses import replace

import pytest
import torch
from models import Tiny
from torch import Tensor

import sp_attention
from sp_attention.attention import Mask, Request
from sp_attention.cli.training import resident_memory
from sp_attention.kernels import sdpa
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
    "explicit": replace(BASE, causal=False, explicit=torch.rand(1, 1, LENGTH, LENGTH, generator=GENERATOR) < 0.5),
}
# (query heads, KV heads, head size, value head size)
HEADS = {"H2": (2, 2, 8, 8), "H4-Hkv2": (4, 2, 8, 8), "H3-Hkv1-Dv4": (3, 1, 8, 4), "H2-Dv12": (2, 2, 8, 12)}


def request_for(mask: Mask, heads: str) -> Request:
    query_heads, kv_heads, size, value_size = HEADS[heads]
    torch.manual_seed(0)

    def tensor(count: int, width: int) -> Tensor:
        # Strided, as the exchange hands them over.
        return torch.randn(LENGTH, 2, count, width, dtype=torch.float64).transpose(0, 1).requires_grad_()

    return Request(tensor(query_heads, size), tensor(kv_heads, size), tensor(kv_heads, value_size), mask, scale=0.4)


def written_out(request: Request) -> Tensor:
    """softmax(scale · QKᵀ + bias, over the keys that the mask allows) V; zeros where it allows none."""
    repeats = request.query.shape[2] // request.key.shape[2]
    key, value = (tensor.repeat_interleave(repeats, 2) for tensor in (request.key, request.value))
    scores = torch.einsum("bqhd,bkhd->bhqk", request.query, key) * request.scale
    if request.bias is not None:
        scores = scores + request.bias
    allowed = request.mask.dense()
    weights = torch.where(allowed, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights / torch.where(total > 0, total, 1.0), value)


def compare(request: Request) -> None:
    inputs = (request.query, request.key, request.value)
    outputs = [function(request) for function in (sdpa.attend, written_out)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(outputs[1])
    ours, theirs = (torch.autograd.grad((output * weights).sum(), inputs) for output in outputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
def test_is_attention_written_out(mask: str, heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "BAND", 6)
    compare(request_for(MASKS[mask], heads))


@pytest.mark.parametrize("mask", ["causal", "left", "documents"])
def test_adds_a_bias(mask: str) -> None:
    bias = torch.randn(1, 4, LENGTH, LENGTH, dtype=torch.float64)
    compare(replace(request_for(MASKS[mask], "H4-Hkv2"), bias=bias))


def test_refuses_softcap_and_sinks_and_nothing_else() -> None:
    request = request_for(BASE, "H2")
    assert sdpa.refuses(request) is None
    assert sdpa.refuses(replace(request, softcap=30.0)) == "torch's scaled_dot_product_attention has no softcap"
    assert sdpa.refuses(replace(request, sinks=torch.zeros(2))) == (
        "torch's scaled_dot_product_attention has no attention sinks"
    )


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
