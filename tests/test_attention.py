"""The attention function that models call: what it passes on, and what it refuses, on every rank."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import MODELS, Tiny, batch_of
from torch import Tensor, nn

import sp_attention
from sp_attention.distributed.peers import Peers
from sp_attention.errors import UnsupportedError
from sp_attention.kernels import registry
from sp_attention.kernels.request import Backend, Mask, Request
from sp_attention.launch import run_ranks
from sp_attention.region.attention import AttentionFunction
from sp_attention.region.context import Context, Scope, StackPass
from sp_attention.region.sequence_dims import Extent

LENGTH = 9
MASK = Mask(2, LENGTH, LENGTH, torch.device("cpu"))


def unused(request: Request) -> Tensor:
    raise AssertionError("a request that is refused must not reach the kernel")


def attention(
    attend: Any = unused, refuses: Any = lambda request: None, inside: bool = True, weights: bool = False
) -> AttentionFunction:
    """The attention function of a model, called from inside of its layers or, for whole tensors, from outside."""
    peers = Peers(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    context = Context(Scope(StackPass(Extent(2, LENGTH), peers) if inside else None, weights))
    return AttentionFunction(
        Backend("cpu", "test", attend, refuses=refuses), peers, context, lambda module: "layer.attn"
    )


def tensors(query_heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's span of queries, keys and values, as models pass them: [B, H, s, D]."""
    span = Peers(dist.group.WORLD, dist.get_rank(), dist.get_world_size()).span(LENGTH)
    return tuple(torch.randn(2, heads, len(span), 4) for heads in (query_heads, kv_heads, kv_heads))


def eager_attention_forward(flavour: str) -> None:
    """Where transformers looks for what attention in a file reads."""


class Reads(nn.Module):
    """Its attention, were it transformers', would read a flavour."""


def refusal(function: AttentionFunction, *arguments: Any, module: nn.Module | None = None, **options: Any) -> str:
    with pytest.raises(UnsupportedError) as refused:
        function(module or nn.Module(), *arguments, **options)
    return str(refused.value)


def refuse_two_heads(request: Request) -> str | None:
    return "it has no taste for two heads" if request.query.shape[2] == 2 else None


def refusals() -> dict[str, str]:
    query, key, value = tensors(5, 1)
    qkv = (query, key, value)
    return {
        # Rank 0 computes three heads and rank 1 two; both must refuse.
        "share": refusal(attention(refuses=refuse_two_heads), *qkv, MASK),
        "by head": refusal(attention(), *qkv, MASK, flavour=torch.ones(5)),
        "read": refusal(attention(), *qkv, MASK, module=Reads(), flavour="vanilla"),
        "weights": refusal(attention(weights=True), *qkv, MASK),
        "bias": refusal(attention(), *qkv, MASK, position_bias=torch.ones(1, 5, LENGTH, 4)),
        "mask": refusal(attention(), *qkv, torch.ones(2, 5, LENGTH, LENGTH, dtype=torch.int64)),
        "dtype": refusal(attention(), query.double(), key, value, MASK),
        "length": refusal(attention(), query[:, :, :-1], key[:, :, :-1], value[:, :, :-1], MASK),
        "keys": refusal(attention(), query, key[:, :, :-1], value[:, :, :-1], MASK),
    }


def test_refusals_are_those_of_every_rank_and_say_why() -> None:
    first, second = run_ranks(2, refusals)
    assert first["share"].startswith(
        "layer.attn: kernel 'test' on cpu cannot do this: it has no taste for two heads. "
        'Use enable(model, backend="sdpa"). Installed kernels that can: sdpa'
    )
    for name in ("share", "by head", "read", "weights", "bias", "mask", "dtype"):
        assert first[name] == second[name]
    assert "the attention argument 'flavour' is not covered" in first["by head"]
    assert "the attention argument 'flavour' is not covered" in first["read"]
    assert "it has no attention weights to return (output_attentions=True)" in first["weights"]
    assert first["bias"] == "layer.attn: a bias [1, 5, 9, 4] on the scores is not of 9 queries and 9 keys"
    assert first["mask"].startswith("layer.attn: the attention mask is a tensor torch.int64 [2, 5, 9, 9]; masks that")
    assert first["dtype"] == "query, key and value have different dtypes: torch.float64, torch.float32, torch.float32"
    assert "4 queries attend to 4 keys, with a mask for 9 and 9, in a sequence of 9 tokens of which" in first["length"]
    assert "5 queries attend to 4 keys, with a mask for 9 and 9, in a sequence of 9 tokens of which" in first["keys"]


# Kernels of a third-party plugin that do a softcap: some not here, not in this dtype, or not when they are asked.
CAPPED = """
import sp_attention, torch
from sp_attention import Backend, testing


def narrow(request):
    return None if request.query.dtype == torch.bfloat16 else "it takes bfloat16 only"


def mute(request):
    raise LookupError("no table")


@sp_attention.hookimpl
def sp_attention_backends():
    return [
        Backend("cpu", "capped", testing.attend),
        Backend("cpu", "best", testing.attend, priority=20),
        Backend("cpu", "narrow", testing.attend, priority=30, refuses=narrow),
        Backend("cpu", "mute", testing.attend, priority=30, refuses=mute),
        Backend("cpu", "flag", testing.attend, priority=30, refuses=lambda request: False),
        Backend("cpu", "broken", testing.attend, priority=30, unavailable="it needs a moon; wait for one to rise"),
        Backend("moon", "far", testing.attend, priority=30),
    ]
"""


def refused_for_softcap() -> dict[str, str]:
    def refuses(request: Request) -> str | None:
        return "it has no softcap" if request.softcap else None

    found = {"capped": refusal(attention(refuses=refuses), *tensors(5, 1), MASK, softcap=30.0)}
    for kernel in ("mute", "flag"):
        backend = registry.find("cpu", kernel)
        found[kernel] = refusal(attention(refuses=backend.refuses), *tensors(5, 1), MASK, softcap=30.0)
    return found


def test_a_refusal_names_the_installed_kernels_that_can_the_best_first(
    write_plugin: Callable[[str, str], None],
) -> None:
    write_plugin("capped", CAPPED)
    first, second = run_ranks(2, refused_for_softcap)
    assert first == second
    cure = 'Use enable(model, backend="best"). Installed kernels that can: best, capped.'
    cannot = "layer.attn: kernel 'test' on cpu cannot do this: "
    assert first["capped"] == f"{cannot}it has no softcap. {cure}"
    # A mistake of a plugin is a reason of its kernel, on every rank.
    assert first["mute"] == f"{cannot}asking it raised LookupError: no table. {cure}"
    assert first["flag"] == f"{cannot}asked, it said False, which is neither None nor a reason. {cure}"


def test_a_refusal_says_when_no_kernel_can() -> None:
    for text in run_ranks(2, refused_without_strangers):
        assert text == (
            "layer.attn: kernel 'test' on cpu cannot do this: it has no softcap. Installed kernels that can: none."
        )


def refused_without_strangers() -> str:
    refuses = attention(refuses=lambda request: "it has no softcap")
    return refusal(refuses, *tensors(5, 1), MASK, softcap=30.0)


# What kernels that come along do not do, in the models that ask for it, and who can.
UNABLE = {
    "softcap": (Tiny("Gemma2ForCausalLM"), "sdpa", ["transformers:eager"]),
    "sinks": (
        Tiny(
            "GptOssForCausalLM",
            {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"},
            tolerance=1e-3,
        ),
        "transformers:sdpa",
        ["sdpa", "transformers:eager"],
    ),
}


def cured(feature: str) -> tuple[list[str], float]:
    """Who can, according to the refusal, and the error of the loss with the kernel that it says is to be used."""
    tiny, kernel, _ = UNABLE[feature]
    with pytest.raises(UnsupportedError) as refused:
        sp_attention.enable(tiny.build(), backend=kernel)
    (cure, able) = re.search(r'Use enable\(model, backend="(.*)"\)\. .* can: (.*)\.', str(refused.value)).groups()
    reference, model = tiny.build(), tiny.build()
    reference.set_attn_implementation("eager")  # transformers' sdpa drops a softcap
    sp_attention.enable(model, backend=cure)
    losses = [each(**batch_of("plain", 33)).loss.item() for each in (reference, model)]
    return able.split(", "), abs(losses[1] / losses[0] - 1)


@pytest.mark.parametrize("feature", UNABLE)
def test_the_kernel_that_a_refusal_recommends_is_exact(feature: str) -> None:
    tiny, _, able = UNABLE[feature]
    for named, error in run_ranks(2, cured, feature):
        assert named == able
        assert error < tiny.tolerance


def seen_by_kernels() -> list[tuple[Any, ...]]:
    """Shapes, scale and mask that a kernel is given inside and outside the region."""
    seen = []

    def attend(request: Request) -> Tensor:
        shapes = tuple(tuple(tensor.shape) for tensor in (request.query, request.key, request.value))
        seen.append((*shapes, request.scale, request.mask is MASK))
        return request.query

    query, key, value = tensors(5, 1)
    attention(attend)(nn.Module(), query, key, value, MASK, scaling=0.5)
    whole = torch.randn(2, 5, LENGTH, 4)
    attention(attend, inside=False)(nn.Module(), whole, whole, whole, MASK)
    attention(attend)(nn.Module(), *tensors(8, 4), MASK, sliding_window=3, position_ids=torch.zeros(1))
    attention(attend)(nn.Module(), *tensors(6, 2), MASK, use_cache=None, output_attentions=False)
    return seen


def test_kernels_are_given_whole_sequences_and_some_heads() -> None:
    for rank, seen in enumerate(run_ranks(2, seen_by_kernels)):
        heads = (3, 2)[rank]
        assert seen[0] == ((2, 9, heads, 4), (2, 9, 1, 4), (2, 9, 1, 4), 0.5, True)
        assert seen[1] == (*[(2, 9, 5, 4)] * 3, 0.5, True)
        assert seen[2] == ((2, 9, 4, 4), (2, 9, 2, 4), (2, 9, 2, 4), 0.5, True)
        assert seen[3] == ((2, 9, 3, 4), (2, 9, 1, 4), (2, 9, 1, 4), 0.5, True)


def cut_by_head() -> dict[str, Any]:
    """What a rank's kernel is given of sinks, biases and masks that differ by head, as the first number of each."""
    seen: dict[str, Any] = {}

    def attend(request: Request) -> Tensor:
        seen["heads"] = (request.heads.start, request.heads.stop, request.all_heads)
        for name, value in (("sinks", request.sinks), ("bias", request.bias), ("mask", request.mask.explicit)):
            if value is not None:
                seen[name] = (value if name == "sinks" else value[0, :, 0, 0]).tolist()
        return request.query

    heads = torch.arange(5.0)
    bias = heads[None, :, None, None].expand(2, 5, LENGTH, LENGTH)
    attention(attend)(nn.Module(), *tensors(5, 1), MASK, s_aux=heads, position_bias=bias)
    # Sinks of another shape, and a mask of bools by head; one that adds counts as a bias.
    attention(attend)(nn.Module(), *tensors(5, 1), bias > 2, s_aux=heads[None, :, None, None])
    both = dict(seen)
    attention(attend)(nn.Module(), *tensors(5, 1), bias, position_bias=bias)
    return both | {"sum": seen["bias"]}


def test_what_is_by_head_is_cut_to_the_heads_of_the_rank() -> None:
    first, second = run_ranks(2, cut_by_head)
    assert first == {
        "heads": (0, 3, 5), "sinks": [0, 1, 2], "bias": [0, 1, 2], "mask": [False] * 3, "sum": [0, 2, 4],
    }  # fmt: skip
    assert second == {"heads": (3, 5, 5), "sinks": [3, 4], "bias": [3, 4], "mask": [True] * 2, "sum": [6, 8]}


def uneven_groups() -> list[tuple[int, ...]]:
    seen = []

    def attend(request: Request) -> Tensor:
        seen.append((request.query.shape[2], request.key.shape[2]))
        return request.query

    attention(attend)(nn.Module(), *tensors(6, 2), MASK)
    return seen


def test_a_torn_group_gets_a_kv_head_for_each_query_head() -> None:
    # 6 heads, 3 to a KV head, on 4 ranks: heads 0-1, 2-3, 4, 5; the second rank's two belong to different groups.
    assert run_ranks(4, uneven_groups) == [[(2, 1)], [(2, 2)], [(1, 1)], [(1, 1)]]


# A kernel that does the whole of a sequence only.
EARLY = """
import sp_attention
from sp_attention import Backend, testing


def refuses(request):
    return "it has no later queries" if request.mask.offset else None


@sp_attention.hookimpl
def sp_attention_backends():
    return [Backend("cpu", "early", testing.attend, refuses=refuses)]
"""


def told_of_sharing() -> list[str]:
    """What reports say of two heads on three ranks: of a kernel that does later queries, and of one that does not."""
    reports = [sp_attention.enable(MODELS["llama-2q1kv"].build(), backend=name).report() for name in ("sdpa", "early")]
    return [line for report in reports for line in report.splitlines() if "ranks = " in line or "shared by 2" in line]


def test_a_report_says_how_fewer_heads_than_ranks_are_shared(write_plugin: Callable[[str, str], None]) -> None:
    write_plugin("early", EARLY)
    for told in run_ranks(3, told_of_sharing, timeout=60):
        assert told == [
            "  3 ranks = 1 head groups x 3 query blocks, in attention of 2 heads",
            "  attention of 2 heads is shared by 2 of 3 ranks: the kernel does not do queries that are later in a "
            "sequence",
        ]
