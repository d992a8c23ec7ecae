"""What these tests share: collectives among threads, and plans that are made anew for each test."""

import pytest
import thread_ranks
import torch.distributed as dist

from sp_attention.ulysses.buffer_layout import buffer_layout
from sp_attention.ulysses.head_plan import head_plan


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for collective in thread_ranks.COLLECTIVES:
        monkeypatch.setattr(dist, collective.__name__, collective)
    head_plan.cache_clear()
    buffer_layout.cache_clear()
