"""The size of attention that a stage tries."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Of the whole: sequences, tokens, query heads, KV heads, head size."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    size: int
