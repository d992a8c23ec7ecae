"""Faults for `python -m sweep.faults`: a rank that raises, dies, stops or differs, at a random point."""
