"""Documents are true: their programs run and print what they say, and commands are those that are run."""

import contextlib
import io
import json
import re
import runpy
from pathlib import Path

import pytest

from sp_attention.launch import run_ranks

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"^(?P<indent> *)```python\n(?P<code>.*?)^ *```$(?:\n\n^```text\n(?P<output>.*?)^```$)?", re.DOTALL | re.MULTILINE
)


def programs() -> dict[str, tuple[str, str | None]]:
    """Every python block of every document, by file and line, with the text block that follows it as its output."""
    found = {}
    for file in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("backends/**/*.md")]):
        text = file.read_text()
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start()) + 1
            code = "".join(row.removeprefix(block["indent"]) for row in block["code"].splitlines(keepends=True))
            found[f"{file.relative_to(ROOT)}:{line}"] = (code, block["output"])
    return found


def printed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, {"__name__": "__main__"})
    return output.getvalue()


PROGRAMS = programs()


@pytest.mark.parametrize("place", PROGRAMS)
def test_programs_run_on_two_ranks_and_print_what_they_say(place: str) -> None:
    code, output = PROGRAMS[place]
    first = run_ranks(2, printed, code)[0]
    assert output is None or first == output


def test_there_are_programs_in_the_readme_and_in_contributing() -> None:
    assert {place.split(":")[0] for place in PROGRAMS} >= {"README.md", "CONTRIBUTING.md"}


def test_the_program_of_the_readme_is_short() -> None:
    (code,) = (code for place, (code, _) in PROGRAMS.items() if place.startswith("README.md"))
    assert len([line for line in code.splitlines() if line]) <= 10


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command in (ROOT / "README.md").read_text().splitlines()


def test_the_tree_of_the_readme_names_every_module_in_its_room_and_no_other() -> None:
    tree = (ROOT / "README.md").read_text().split("\nsp_attention/\n")[1].split("  integrations/ ")[0]
    top, *rooms = re.split(r"^  (?=\w+/ )", tree, flags=re.MULTILINE)
    named = {".": sorted(re.findall(r"\w+\.py", top))}
    named |= {room.split("/")[0]: sorted(set(re.findall(r"\w+\.py", room))) for room in rooms}
    folders = {".": ROOT / "sp_attention"} | {room: ROOT / "sp_attention" / room for room in named if room != "."}
    there = {
        room: sorted(path.name for path in folder.glob("*.py") if not path.name.startswith("__"))
        for room, folder in folders.items()
    }
    assert named == there
    assert set(named) == {".", "ulysses", "distributed", "kernels", "loss", "region", "rehearsal"}


def test_contributing_says_where_things_are_that_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = set(re.findall(r"`((?:ulysses|distributed|kernels|loss|region|rehearsal|integrations|cli)/\w+\.py)`", text))
    assert len(files) > 10
    assert [file for file in sorted(files) if not (ROOT / "sp_attention" / file).exists()] == []


def test_the_table_of_a_long_prompt_is_of_the_raw_numbers() -> None:
    table = runpy.run_path(str(ROOT / "bench" / "generation.py"))["table"]
    record = json.loads((ROOT / "docs" / "data" / "generation.json").read_text())
    assert table(record) in (ROOT / "docs" / "generation.md").read_text()


def test_the_page_of_speed_is_of_the_raw_numbers() -> None:
    speed = runpy.run_path(str(ROOT / "bench" / "speed.py"))
    assert speed["page"](speed["measured"]()) == (ROOT / "docs" / "speed.md").read_text()
