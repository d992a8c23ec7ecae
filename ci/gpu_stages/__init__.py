"""What `ci/gpu` runs: one module a stage, with `run`; `plan.py` has their order, `results.py` what they write."""
