"""Start ranks on this machine: `run_ranks`."""

from sp_attention.distributed.launch import RanksError, run_ranks

__all__ = ["RanksError", "run_ranks"]
