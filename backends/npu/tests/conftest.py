"""The real torch-npu on a stand-in driver, for all tests here: nothing of it says what an NPU computes."""

import sys
from pathlib import Path

import driver

# Tiny models, and batches for them, are those of the library's own tests.
sys.path.append(str(Path(__file__).parents[3] / "tests"))
FOLDER = Path(__file__).parent / ".driver"
driver.build(FOLDER)
driver.load(FOLDER)
