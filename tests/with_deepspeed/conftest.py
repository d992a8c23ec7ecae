"""DeepSpeed on CPUs."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
