"""The exchange around flash-attn at scale: shapes and bytes of 8 to 1,024 ranks, on meta tensors and a fake group.

flash-attn's own registered fakes tell the shapes, and nothing is computed or sent.
"""

from collections.abc import Iterator
from typing import Any

import cpu
import pytest
import torch
import torch.distributed as dist
from sp_attention_flash import attending
from sp_attention_flash.packages import FLASH2
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sp_attention import Mask, Request
from sp_attention.distributed.partition import span_of
from sp_attention.distributed.peers import Peers
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

META = torch.device("meta")
LENGTH, SIZE, KV_HEADS = 2**20 + 7, 128, 8


@pytest.fixture(params=[8, 64, 1024], ids="P{}".format)
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each collective sends."""
    cpu.import_flash2()
    found: list[int] = []
    right = dist.all_to_all_single

    def counted(received: Tensor, given: Tensor, *sizes: Any, **options: Any) -> Any:
        found.append(given.numel() * given.element_size())
        return right(received, given, *sizes, **options)

    monkeypatch.setattr(dist, "all_to_all_single", counted)
    return found


def bytes_of(plan: HeadPlan, rank: int, span: int) -> list[int]:
    """What a rank at either end sends: before and after the kernel, and in backward, after and before it.

    Of few ranks, up to 8, a rank's own tokens stay where they are.
    """
    kinds = {"before": (plan.query, plan.kv, plan.kv), "after": (plan.query,)}
    own = span if len(plan.query) <= 8 else 0
    width = {when: sum(len(heads[rank]) for heads in each) * SIZE * 2 for when, each in kinds.items()}
    widths = {when: sum(sum(map(len, heads)) for heads in each) * SIZE * 2 for when, each in kinds.items()}
    # Of all heads my tokens go out, and of mine the tokens of all; backward sends back what came.
    out = {when: span * widths[when] - own * width[when] for when in kinds}
    back = {when: (LENGTH - own) * width[when] for when in kinds}
    return [out["before"], back["after"], out["after"], back["before"]]


@pytest.mark.parametrize("kind", ["causal", "window, packed", "window, sinks"])
def test_shapes_and_bytes_at_scale(kind: str, ranks: int, sent: list[int]) -> None:
    heads = max(64, ranks)
    plan = head_plan(heads, KV_HEADS, ranks)
    for rank in (0, ranks - 1):
        sent.clear()
        peers = Peers(dist.group.WORLD, rank, ranks)
        span = len(span_of(rank, LENGTH, ranks))
        query, key, value = (
            torch.empty(1, span, n, SIZE, dtype=torch.bfloat16, device=META, requires_grad=True)
            for n in (heads, KV_HEADS, KV_HEADS)
        )
        # Documents are read on the host, and the sequences made of them are of the mask's device.
        documents = (torch.arange(LENGTH) // 1000)[None] if "packed" in kind else None
        mask = Mask(1, LENGTH, LENGTH, META, window=4096 if "window" in kind else None, documents=documents)
        mine = len(plan.query[rank])
        sinks = torch.empty(mine, device=META, requires_grad=True) if "sinks" in kind else None
        whole = seq_to_head(query, key, value, LENGTH, plan, peers)
        out = attending.attend(FLASH2, Request(*whole, mask, SIZE**-0.5, sinks=sinks))
        assert out.shape == (1, LENGTH, mine, SIZE)
        assert out.dtype == torch.bfloat16
        back = head_to_seq(out, plan, peers)
        assert back.shape == query.shape
        back.backward(torch.empty_like(back))
        for tensor in (query, key, value, *([] if sinks is None else [sinks])):
            assert tensor.grad is not None
            assert tensor.grad.shape == tensor.shape
        assert sent == bytes_of(plan, rank, span)
