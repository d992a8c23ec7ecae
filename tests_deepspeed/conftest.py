"""DeepSpeed on CPUs; tiny models are those of the library's own tests."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))
os.environ["DS_ACCELERATOR"] = "cpu"
