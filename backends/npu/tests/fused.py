"""A stand-in for the operators npu_fusion_attention, _v2, _v3 and their gradients: what is documented, in float64.

It is written from torch-npu's documentation (torch_npu/_op_plugin_docs.py, 2.13) and not from the adapter under test.
What the documentation does not allow raises, and so does what it says nothing about: a query that sees no key.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from host import _libraries, on_device, on_host
from torch import Tensor

UNLIMITED = 2**31 - 1
# Keywords of the calls since the last `calls.clear()`, for tests that look at them.
calls: list[dict[str, Any]] = []


def install() -> None:
    """Register the stand-ins for torch-npu's devices, under its own schemas and below its own gradient formulas."""
    library = torch.library.Library("npu", "IMPL")
    _libraries.append(library)
    for version in ("", "_v2", "_v3"):
        for name, function in (
            (f"npu_fusion_attention{version}", forward),
            (f"npu_fusion_attention_grad{version}", backward),
        ):
            schema = getattr(torch.ops.npu, name).default._schema
            library.impl(name, _bound(function, schema, version), "PrivateUse1", allow_override=True)


def _bound(function: Callable[..., Any], schema: Any, version: str) -> Callable[..., Any]:
    """The function, given all arguments by name, with tensors of the host for a device's; its results moved back."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = {argument.name: argument.default_value for argument in schema.arguments}
        given |= dict(zip(given, args, strict=False)) | kwargs
        device = given["query"].device
        # The versions spell some names in different ways.
        names = {"pre_tockens": "before", "pre_tokens": "before", "next_tockens": "after", "next_tokens": "after"}
        names["scale_value"] = "scale"
        called = {
            names.get(name, name): on_host(value) if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        results = function(version=version, **called)
        return tuple(on_device(result, device) if isinstance(result, Tensor) else result for result in results)

    return call


def forward(version: str, query: Tensor, value: Tensor, keep_prob: float, **others: Any) -> tuple[Any, ...]:
    given = {"query": query, "value": value, "keep_prob": keep_prob, **others}
    calls.append(given | {"version": version})
    seed = int(torch.randint(2**31, ())) if keep_prob < 1 else 0
    out = _whole(given, seed).to(query.dtype)
    heads, rows = others["head_num"], query.shape
    # For backward, which computes them again here.
    kind = {"TND": (rows[0], heads, 8), "BSND": (rows[0], heads, rows[1], 8), "BNSD": (*rows[:3], 8)}
    statistics = [torch.zeros(kind[others["input_layout"]]) for _ in range(2)]
    rest = (torch.tensor(seed), torch.tensor(0)) if version == "_v3" else (seed, 0, 0)
    return (out, *statistics, query.new_empty(0), *rest)


def backward(version: str, dy: Tensor, seed: int | Tensor, **given: Any) -> tuple[Any, ...]:
    names = ["query", "key", "value"] + ["sink"] * (given["sink"] is not None)
    tensors = [given[name].detach().requires_grad_() for name in names]
    with torch.enable_grad():
        out = _whole(given | dict(zip(names, tensors, strict=True)), int(seed))
        found = torch.autograd.grad(out, tensors, dy.to(out.dtype))
    sink = found[3] if len(found) > 3 else torch.empty(0)
    # It gives no gradient for pse: "reserved" in the documentation of aclnnFlashAttentionScoreGrad.
    pse = None if given["pse"] is None else torch.full_like(given["pse"], float("nan"))
    rope = (torch.empty(0), torch.empty(0)) if version == "_v2" else ()
    return (*found[:3], pse, *rope, sink)


def _whole(given: dict[str, Any], seed: int) -> Tensor:
    """[B, S, N, Dv] or [T, N, Dv], as the layout is, in float64."""
    _check(given)
    draws = torch.Generator().manual_seed(seed)
    outputs = [_attend(given, *parts, draws) for parts in _sequences(given)]
    layout = given["input_layout"]
    if layout == "BNSD":
        return outputs[0]
    parts = [out.transpose(1, 2) for out in outputs]
    return parts[0] if layout == "BSND" else torch.cat([part[0] for part in parts])


def _sequences(given: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values [B, N, S, D] that belong together."""
    tensors = [given[name].double() for name in ("query", "key", "value")]
    layout = given["input_layout"]
    if layout == "BNSD":
        yield tuple(tensors)
    elif layout == "BSND":
        yield tuple(tensor.transpose(1, 2) for tensor in tensors)
    else:
        ends = [list(given["actual_seq_qlen"]), *[list(given["actual_seq_kvlen"])] * 2]
        for index in range(len(ends[0])):
            starts = [end[index - 1] if index else 0 for end in ends]
            yield tuple(
                tensor[start : end[index]].transpose(0, 1)[None]
                for tensor, start, end in zip(tensors, starts, ends, strict=True)
            )


def _attend(given: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, draws: torch.Generator) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores, scale, pse = query @ key.mT, given["scale"], given["pse"]
    if pse is None:
        scores = scores * scale
    elif given.get("pse_type", 1) == 1:
        scores = (scores + pse.double()) * scale
    else:
        scores = scores * scale + pse.double()
    hidden = _hidden(given, *scores.shape[2:])
    if bool(hidden.all(-1).any()):
        raise ValueError("a query sees no key: what the operator does then is not documented")
    scores = scores.masked_fill(hidden, float("-inf"))
    sink = given["sink"]
    if sink is not None:
        column = sink.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    if given["keep_prob"] < 1:
        kept = torch.rand(weights.shape, dtype=weights.dtype, generator=draws) < given["keep_prob"]
        weights = weights * kept / given["keep_prob"]
    return weights @ value


def _hidden(given: dict[str, Any], queries: int, keys: int) -> Tensor:
    """bool, broadcasts to [B, N, Sq, Sk]: which keys a query does not see. Table 1 of the documentation."""
    mask, mode = given["atten_mask"], given["sparse_mode"]
    if mask is None:
        # "sparse_mode, pre_tockens and next_tockens have no effect then, and all is computed."
        return torch.zeros(1, 1, queries, keys, dtype=torch.bool)
    # How far a key is behind its query, from the upper left corner, or the lower right one.
    left = torch.arange(keys) - torch.arange(queries)[:, None]
    right = left - (keys - queries)
    if mode in (2, 3, 4) and not (
        mask.dtype == torch.bool and torch.equal(mask, torch.ones(2048, 2048).triu(1).bool())
    ):
        raise ValueError(f"sparse mode {mode} wants the upper triangle of 2048 x 2048")
    if mode == 2:
        return left > 0
    if mode == 3:
        return right > 0
    if mode == 4:
        if given["before"] + given["after"] < 0:
            raise ValueError("the band is empty")
        return (right > given["after"]) | (right < -given["before"])
    if mode not in (0, 1):
        raise ValueError(f"the stand-in has no sparse mode {mode}")
    batch, heads = given["query"].shape[0], given["head_num"]
    dense = [(batch, heads), (batch, 1), (1, 1)]
    shapes = [(*first, queries, keys) for first in dense] + [(queries, keys)]
    if given["input_layout"] == "TND":
        shapes = shapes[-1:]
    if tuple(mask.shape) not in shapes or mask.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"atten_mask {mask.dtype} {list(mask.shape)} is none of {shapes}")
    outside = (left > given["after"]) | (left < -given["before"])
    return mask.bool() | outside if mode == 0 else mask.bool()


def _check(given: dict[str, Any]) -> None:
    """What the documentation demands of arguments, one line each."""
    query, key, value, layout = (given[name] for name in ("query", "key", "value", "input_layout"))
    heads_at = {"BSND": 2, "BNSD": 1, "TND": 1}[layout]
    heads, kv_heads = query.shape[heads_at], key.shape[heads_at]
    demands = {
        "head_num is the number of query heads": given["head_num"] == heads,
        "query heads are a multiple of KV heads": kv_heads == value.shape[heads_at] and heads % kv_heads == 0,
        "1 to 256 heads": heads <= 256,
        "one dtype of three": query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32),
        "heads of 1 to 768, no wider in values": query.shape[-1]
        == key.shape[-1]
        >= value.shape[-1]
        <= 768
        >= key.shape[-1],
        "keep_prob in (0, 1]": 0 < given["keep_prob"] <= 1,
        "no padding_mask": given["padding_mask"] is None,
        "a sink per head in float32": given["sink"] is None
        or (given["sink"].shape == (heads,) and given["sink"].dtype == torch.float32),
        "a tensor for each batch": layout == "TND" or query.shape[0] == key.shape[0] == value.shape[0],
    }
    pse = given["pse"]
    if pse is not None:
        batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        shapes = [(batch, heads, queries, keys), (batch, heads, 1, keys), (1, heads, queries, keys)]
        demands["pse of the queries' dtype"] = pse.dtype == query.dtype
        demands["pse BNSS, BN1S or 1NSS"] = layout == "BSND" and tuple(pse.shape) in shapes
    if layout == "TND":
        query_ends, key_ends = list(given["actual_seq_qlen"]), list(given["actual_seq_kvlen"])
        demands |= {
            "as many sequences of queries as of keys": len(query_ends) == len(key_ends) > 0,
            "1024 sequences at most": len(query_ends) <= 1024,
            "lengths that add up to the tokens": query_ends[-1] == query.shape[0] and key_ends[-1] == key.shape[0],
            "lengths that are not negative": query_ends == sorted(query_ends) and key_ends == sorted(key_ends),
            # Allowed, and nothing that the adapter needs.
            "no sequence without tokens": len(set(query_ends)) == len(query_ends) and query_ends[0] > 0 < key_ends[0],
        }
    broken = [demand for demand, met in demands.items() if not met]
    if broken:
        raise ValueError(f"npu_fusion_attention wants: {'; '.join(broken)}")
