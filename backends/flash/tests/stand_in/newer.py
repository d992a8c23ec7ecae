"""Stand-ins for FlashAttention 3 and 4: their public functions' signatures, and plain float64 math.

The signatures are those of hopper/flash_attn_interface.py and of flash_attn/cute/interface.py (4.0.0b36). So what is
tested with them is our reading of these interfaces. Here, arguments that we never give are left out.
"""

import torch
from flash_attn_2_cuda import kept, pieces, scores, visible


def attention(q, k, v, scale, causal, window, softcap, sinks=None):
    """One sequence, differentiable: [Sq, h, D], [Sk, hkv, D] twice → [Sq, h, D], [h, Sq]; nothing seen is lse -inf."""
    dtype, groups = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double().repeat_interleave(groups, 1)
    score, _ = scores(q, k, scale, softcap)
    score = score.masked_fill(~visible(len(q), len(k), causal, *window), float("-inf"))
    if sinks is not None:
        score = torch.cat([score, sinks.double()[:, None, None].expand(-1, len(q), 1)], -1)
    lse = score.logsumexp(-1)
    weights = (score - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp() * kept(score.shape, 0.0, 0)
    return torch.einsum("hqk,khd->qhd", weights[..., : len(k)], v).to(dtype), lse.float()


def dense(q, k, v, *options):
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert q.shape[-1] % 8 == 0
    pairs = [attention(q[b], k[b], v[b], *options) for b in range(len(q))]
    return torch.stack([out for out, _ in pairs]), torch.stack([lse for _, lse in pairs])


def varlen(q, k, v, edges_q, edges_k, longest_q, longest_k, *options):
    assert edges_q.dtype == edges_k.dtype == torch.int32
    assert longest_q >= edges_q.diff().max()
    assert longest_k >= edges_k.diff().max()
    cuts = zip(pieces(edges_q), pieces(edges_k), strict=True)
    pairs = [attention(q[at_q], k[at_k], v[at_k], *options) for at_q, at_k in cuts]
    return torch.cat([out for out, _ in pairs]), torch.cat([lse for _, lse in pairs], 1)


def flash3_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
    return_attn_probs=False,
):  # fmt: skip
    out, lse = dense(q, k, v, softmax_scale, causal, window_size, softcap)
    return (out, lse.detach()) if return_attn_probs else out


def flash3_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    edges = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = varlen(q, k, v, *edges, softmax_scale, causal, window_size, softcap)
    return (out, lse.detach()) if return_attn_probs else out


def ends(window_size):
    assert all(end is None or end >= 0 for end in window_size)
    return tuple(-1 if end is None else end for end in window_size)


def flash4_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    deterministic=False, return_lse=False,
):  # fmt: skip
    out, lse = dense(q, k, v, softmax_scale, causal, ends(window_size), softcap, learnable_sink)
    return out, lse if return_lse else None


def flash4_varlen_func(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
    causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, deterministic=False, return_lse=False,
):  # fmt: skip
    edges = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = varlen(q, k, v, *edges, softmax_scale, causal, ends(window_size), softcap, learnable_sink)
    return out, lse if return_lse else None
