"""A stand-in for flash-attn's compiled extension: its four functions, with its argument checks, as plain float64 math.

Not flash-attn's code and not CUDA: it lets the real Python package of flash-attn 2.8.3 run on the CPU. The signatures
are those that flash_attn/flash_attn_interface.py calls, and the checks those of csrc/flash_attn/flash_api.cpp. Unlike
there, float32 is accepted once a test puts it in `DTYPES`.
"""

from itertools import pairwise

import torch
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16]


def check(condition: bool, text: str) -> None:
    if not condition:
        raise RuntimeError(text)


def check_arguments(q: Tensor, k: Tensor, v: Tensor, softcap: float, dropout: float, *edges: Tensor) -> None:
    check(q.dtype in DTYPES, "FlashAttention only support fp16 and bf16 data type")
    check(k.dtype == q.dtype, "query and key must have the same dtype")
    check(v.dtype == q.dtype, "query and value must have the same dtype")
    check(all(t.stride(-1) == 1 for t in (q, k, v)), "Input tensor must have contiguous last dimension")
    check(q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(q.shape[-1] % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8")
    check(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
    check(k.shape == v.shape and k.shape[-1] == q.shape[-1], "v must have shape (batch, seqlen_k, heads, head_size)")
    check(not (softcap > 0 and dropout > 0), "Softcapping does not support dropout for now")
    check(dropout < 1, "p_dropout < 1.f")
    for edge in edges:
        check(edge.dtype == torch.int32, "cu_seqlens must have dtype int32")
        check(edge.is_contiguous() and edge.dim() == 1, "cu_seqlens must be contiguous")
        check(int(edge[0]) == 0, "the kernel would read from before the first token")


def visible(queries: int, keys: int, causal: bool, left: int, right: int) -> Tensor:
    """[Sq, Sk] bool: the last query stands beside the last key; a negative end of the window is none."""
    distance = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    right = 0 if causal else right
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """[h, Sq, Sk] scores of [Sq, h, D] and [Sk, hkv, D], and their derivative by the product of q and k, over scale."""
    product = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    if softcap <= 0:
        return product, 1.0
    capped = (product / softcap).tanh()
    return capped * softcap, 1 - capped**2


def kept(shape: torch.Size, dropout: float, seed: int) -> Tensor | float:
    if not dropout:
        return 1.0
    draws = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (draws >= dropout) / (1 - dropout)


def forward(q, k, v, dropout, scale, causal, left, right, softcap, seed):
    """One sequence: [Sq, h, D], [Sk, hkv, D] twice → [Sq, h, D], [h, Sq]. A row that sees nothing has lse +inf."""
    q, k, v = q.double(), k.double(), v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    score, _ = scores(q, k, scale, softcap)
    score = score.masked_fill(~visible(len(q), len(k), causal, left, right), float("-inf"))
    lse = score.logsumexp(-1)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    weights = (score - lse[..., None]).exp() * kept(score.shape, dropout, seed)
    return torch.einsum("hqk,khd->qhd", weights, v), lse


def backward(dout, q, k, v, out, lse, dropout, scale, causal, left, right, softcap, seed):
    """One sequence: the gradients of q, k and v, and the sums [h, Sq] of dout · out."""
    groups, kv_heads, size = q.shape[1] // k.shape[1], k.shape[1], q.shape[2]
    dout, q, k, v, out = (t.double() for t in (dout, q, k, v, out))
    score, slope = scores(q, k, scale, softcap)
    score = score.masked_fill(~visible(len(q), len(k), causal, left, right), float("-inf"))
    weights, drawn = (score - lse.double()[..., None]).exp(), kept(score.shape, dropout, seed)
    dv = torch.einsum("hqk,qhd->khd", weights * drawn, dout)
    down = torch.einsum("qhd,khd->hqk", dout, v.repeat_interleave(groups, 1)) * drawn
    total = (dout * out).sum(-1).T
    down = weights * (down - total[..., None]) * slope * scale
    dq = torch.einsum("hqk,khd->qhd", down, k.repeat_interleave(groups, 1))
    dk = torch.einsum("hqk,qhd->khd", down, q)
    dk, dv = (t.reshape(len(k), kv_heads, groups, size).sum(2) for t in (dk, dv))
    return dq, dk, dv, total


def seed_of(dropout: float) -> Tensor:
    return torch.stack([torch.randint(2**31, ()) if dropout else torch.zeros((), dtype=torch.int64), torch.tensor(0)])


def fwd(q, k, v, out, alibi, dropout, scale, causal, left, right, softcap, return_softmax, generator):
    check_arguments(q, k, v, softcap, dropout)
    check(not return_softmax or dropout > 0, "return_softmax is only supported when p_dropout > 0.0")
    check(out is None and alibi is None and not return_softmax and generator is None, "not in the stand-in")
    state = seed_of(dropout)
    pairs = [
        forward(q[b], k[b], v[b], dropout, scale, causal, left, right, softcap, int(state[0]) + b)
        for b in range(len(q))
    ]
    outs, lses = zip(*pairs, strict=True)
    return torch.stack(outs).to(q.dtype), torch.stack(lses).float(), q.new_empty(0), state


def varlen_fwd(
    q, k, v, out, edges_q, edges_k, used, leftpad, blocks, alibi, longest_q, longest_k, dropout, scale, zero, causal,
    left, right, softcap, return_softmax, generator,
):  # fmt: skip
    check_arguments(q, k, v, softcap, dropout, edges_q, edges_k)
    check(not return_softmax or dropout > 0, "return_softmax is only supported when p_dropout > 0.0")
    others = (out, used, leftpad, blocks, alibi, generator)
    check(all(other is None for other in others) and not return_softmax, "not in the stand-in")
    check_longest(edges_q, longest_q, edges_k, longest_k)
    state, result, lses = seed_of(dropout), torch.zeros_like(q), q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
    for n, (at_q, at_k) in enumerate(zip(pieces(edges_q), pieces(edges_k), strict=True)):
        part = (q[at_q], k[at_k], v[at_k], dropout, scale, causal, left, right, softcap, int(state[0]) + n)
        result[at_q], lses[:, at_q] = (t.to(like) for t, like in zip(forward(*part), (result, lses), strict=True))
    return result, lses, q.new_empty(0), state


def bwd(
    dout, q, k, v, out, lse, dq, dk, dv, alibi, dropout, scale, causal, left, right, softcap, deterministic, generator,
    state,
):  # fmt: skip
    check_arguments(q, k, v, softcap, dropout)
    check(alibi is None and generator is None and isinstance(deterministic, bool), "not in the stand-in")
    totals = torch.zeros(len(q), q.shape[2], -(-q.shape[1] // 128) * 128)
    for b in range(len(q)):
        part = (dout[b], q[b], k[b], v[b], out[b], lse[b], dropout, scale, causal, left, right, softcap)
        grads = backward(*part, int(state[0]) + b)
        for into, grad in zip((dq, dk, dv), grads[:3], strict=True):
            into[b] = grad
        totals[b, :, : q.shape[1]] = grads[3]
    return dq, dk, dv, totals


def varlen_bwd(
    dout, q, k, v, out, lse, dq, dk, dv, edges_q, edges_k, alibi, longest_q, longest_k, dropout, scale, zero, causal,
    left, right, softcap, deterministic, generator, state,
):  # fmt: skip
    check_arguments(q, k, v, softcap, dropout, edges_q, edges_k)
    check(alibi is None and generator is None and isinstance(deterministic, bool), "not in the stand-in")
    check_longest(edges_q, longest_q, edges_k, longest_k)
    for into in (dq, dk, dv):
        into.zero_()
    totals = torch.zeros(q.shape[1], len(q) + 128 * (len(edges_q) - 1))
    for n, (at_q, at_k) in enumerate(zip(pieces(edges_q), pieces(edges_k), strict=True)):
        part = (dout[at_q], q[at_q], k[at_k], v[at_k], out[at_q], lse[:, at_q])
        options = (dropout, scale, causal, left, right, softcap, int(state[0]) + n)
        dq[at_q], dk[at_k], dv[at_k], totals[:, at_q] = backward(*part, *options)
    return dq, dk, dv, totals


def pieces(edges: Tensor) -> list[slice]:
    bounds = edges.tolist()
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def check_longest(edges_q: Tensor, longest_q: int, edges_k: Tensor, longest_k: int) -> None:
    """What is beyond the longest sequence said, the kernel would not compute."""
    for edges, longest in ((edges_q, longest_q), (edges_k, longest_k)):
        check(isinstance(longest, int) and longest >= int(edges.diff().max()), "a sequence is longer than was said")
