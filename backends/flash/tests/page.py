"""The table of docs/flash.md, from what the kernels say to the features of the kit. Prints it when run as a program."""

import sys
from unittest import mock

import torch
from sp_attention_flash import refusing
from sp_attention_flash.packages import PACKAGES

from sp_attention import Request, testing


def table() -> str:
    """Yes is what the tests of the kit check; anything else is the reason of the refusal."""
    with mock.patch.object(refusing, "DEVICE", "cpu"):
        rows = [
            f"| {feature} | {' | '.join(refusing.refuses(package, low(build())) or 'yes' for package in PACKAGES)} |"
            for feature, build in testing.FEATURES.items()
        ]
    head = f"|  | {' | '.join(f'`{package.kernel}`' for package in PACKAGES)} |"
    return "\n".join([head, "| --- " * (len(PACKAGES) + 1) + "|", *rows])


def low(request: Request) -> Request:
    return testing.moved(request, torch.device("cpu"), torch.bfloat16)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
