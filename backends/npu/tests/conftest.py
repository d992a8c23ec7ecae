"""The real torch-npu on a stand-in driver, for all tests here: nothing of it says what an NPU computes."""

from pathlib import Path

import driver

FOLDER = Path(__file__).parent / ".driver"
driver.build(FOLDER)
driver.load(FOLDER)
