"""English that every Python comes with, as bytes: something to train on without a download."""

from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Bytes(Dataset[dict[str, Tensor]]):
    """Rows of `length` bytes, the labels being the bytes themselves."""

    def __init__(self, rows: int, length: int) -> None:
        text = "\n".join(topics.values()).encode()[: rows * length]
        self.rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(rows, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[number], "labels": self.rows[number]}
