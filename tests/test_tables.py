"""Tables of the documents."""

from sp_attention.cli.tables import markdown_table


def test_whatever_is_in_a_cell_stays_in_it() -> None:
    table = markdown_table(["", "result"], [["a | b", "two\n  lines"], ["", ""]])
    assert table.splitlines() == ["|  | result |", "| --- | --- |", "| a \\| b | two lines |", "|  |  |"]
