"""What hypothesis draws for several tests."""

import torch
from hypothesis import strategies as st

from sp_attention import Mask


@st.composite
def masks(draw: st.DrawFn, rows: int = 3) -> Mask:
    """Causality, windows, documents and padding, of all or some of up to 12 queries in up to `rows` rows."""
    batch, length = draw(st.integers(1, rows)), draw(st.integers(1, 12))
    padding = documents = None
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    if draw(st.booleans()):
        padding = torch.tensor([draw(bits) for _ in range(batch)])
    if draw(st.booleans()):
        documents = torch.tensor([draw(bits) for _ in range(batch)]).int().cumsum(1)
    causal, window = draw(st.booleans()), draw(st.none() | st.integers(1, 14))
    offset, queries = 0, length
    if draw(st.booleans()):
        offset = draw(st.integers(0, length - 1))
        queries = draw(st.integers(1, length - offset))
    return Mask(
        batch, queries, length, torch.device("cpu"), causal=causal, window=window, padding=padding,
        documents=documents, offset=offset,
    )  # fmt: skip
