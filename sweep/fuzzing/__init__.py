"""Random cases for `python -m sweep.fuzz`: models, batches, options and orders of calls, against one process."""
