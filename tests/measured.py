"""Lines of the library that a rank ran: `--cov` sees the tests' own process only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sp_attention.distributed import launch

ROOT = Path(__file__).parent.parent
WORK = launch._work
# Of each part of the library one, and of two ranks the first: in a rank, counting lines takes a third of its time.
MODULES = {
    "test_activation_checkpoint", "test_all_to_all", "test_api", "test_attention", "test_buffer_pool",
    "test_collectives", "test_consistency", "test_context", "test_forward", "test_gradients", "test_handle",
    "test_hooks", "test_layer_hooks", "test_offload", "test_peers", "test_process_groups", "test_rehearsal", "test_rng",
    "test_sharded_logits",
}  # fmt: skip


def work(rank: int, ranks: int, *others: Any) -> None:
    """What `launch._work` does; its last two arguments are the function and its arguments."""
    *others, function, arguments = others
    if (rank, ranks) == (0, 2):
        function, arguments = measured, (function, arguments)
    WORK(rank, ranks, *others, function, arguments)


def measured(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import coverage

    # Before the rank answers, after which it may be ended at once.
    counting = coverage.Coverage(config_file=ROOT / "pyproject.toml", data_file=ROOT / ".coverage", data_suffix=True)
    with counting.collect():
        result = function(*arguments)
    counting.save()
    return result
