"""Buffers that are written again: never while somebody holds it, and little of it lies ready."""

import torch

from sp_attention.distributed.buffer_pool import BufferPool

LIKE = torch.zeros(1, dtype=torch.bfloat16)


def test_memory_is_used_again_only_when_nobody_holds_a_view_of_it() -> None:
    memory = BufferPool()
    first = memory.empty((400, 500), LIKE)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((400, 500), torch.bfloat16, True)
    place, view = first.data_ptr(), first[3:, 7:].detach().transpose(0, 1)
    del first
    second = memory.empty((400, 500), LIKE)
    assert second.data_ptr() != place
    del view
    assert memory.empty((400, 490), LIKE).data_ptr() == place
    # A fifth of it would be wasted, and more.
    assert memory.empty((400, 300), LIKE).data_ptr() != place


def test_no_more_than_256_mib_lie_ready_and_what_lay_longest_goes_first() -> None:
    memory = BufferPool()
    places = {}
    for size in (100, 120, 40, 80):
        tensor = memory.empty((size * 2**19,), LIKE)
        places[size] = tensor.data_ptr()
        assert memory.ready <= 2**28
        del tensor
    assert memory.ready == (120 + 40 + 80) * 2**20
    assert memory.empty((40 * 2**19,), LIKE).data_ptr() == places[40]
    assert memory.ready == (120 + 40 + 80) * 2**20
    memory.empty((257 * 2**19,), LIKE)
    assert memory.ready == (120 + 40 + 80) * 2**20
    memory.clear()
    assert memory.ready == 0


def test_what_is_small_or_on_another_device_is_made_as_ever() -> None:
    memory = BufferPool()
    memory.empty((10, 10), LIKE)
    assert memory.empty((400, 500), LIKE.to("meta")).device.type == "meta"
    assert memory.ready == 0
