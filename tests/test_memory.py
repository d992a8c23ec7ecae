"""Memory that is written again: never while somebody holds it, and little more than was in use at one time."""

import torch

from sp_attention.memory import Memory

LIKE = torch.zeros(1, dtype=torch.bfloat16)


def test_memory_is_used_again_only_when_nobody_holds_a_view_of_it() -> None:
    memory = Memory()
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


def test_little_more_is_held_than_was_in_use_at_one_time() -> None:
    memory = Memory()
    for length in range(400, 4000, 400):
        memory.empty((length, 500), LIKE)
        assert length * 1000 <= memory.held <= length * 1250
    several = [memory.empty((400, 500), LIKE) for _ in range(9)]
    assert 9 * 400 * 1000 <= memory.held <= 9 * 400 * 1250
    del several
    memory.empty((3600, 500), LIKE)
    assert 3600 * 1000 <= memory.held <= 3600 * 1250


def test_what_is_small_or_on_another_device_is_made_as_ever() -> None:
    memory = Memory()
    memory.empty((10, 10), LIKE)
    assert memory.empty((400, 500), LIKE.to("meta")).device.type == "meta"
    assert memory.held == 0
