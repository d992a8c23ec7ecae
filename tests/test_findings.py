"""The report on layers: a line for each kind, with the layers that are of it."""

import pytest

from sp_attention.rehearsal.findings import _numbered


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["0"], "layer 0"),
        ([str(number) for number in range(32)], "layers 0 to 31"),
        (["0", "1", "2", "7", "9", "10"], "layers 0 to 2, 7, 9 to 10"),
        (["first", "second"], "layers first, second"),
    ],
)
def test_neighbouring_layers_are_a_range(names: list[str], text: str) -> None:
    assert _numbered(names) == text
