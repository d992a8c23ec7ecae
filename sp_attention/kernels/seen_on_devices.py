"""What torch's attention was seen to do with masks in half precision: data, written by `ci/gpu --verdicts FILE`.

kernel: ours, of whose calls it is. torch: its version, without the patch. device: compute capability.
backend: of torch's, alone; "chosen", by torch among all but cuDNN's, as in use; "any", by torch among all.
kind: what torch is given a mask for, as the kernel's own `kind` says.
right: all outputs and gradients were, at all lengths. date, name: of the run, and of its device.
"""

from typing import NamedTuple


class Seen(NamedTuple):
    kernel: str
    torch: str
    device: str
    backend: str
    kind: str
    dtype: str
    right: bool
    date: str
    name: str


SEEN: tuple[Seen, ...] = (
    Seen("sdpa", "2.11", "9.0", "any", "window", "bfloat16", False, "2026-11-27", "NVIDIA H200"),
    Seen("sdpa", "2.11", "9.0", "any", "window", "float16", False, "2026-11-27", "NVIDIA H200"),
)
