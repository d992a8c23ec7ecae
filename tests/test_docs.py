"""Documents are true: their programs run and print what they say, and commands are those that are run."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest
from documents import ROOT, outcomes, programs
from helpers import Selected, run_once, slow_but

PROGRAMS = programs()


@pytest.mark.parametrize("place", slow_but(PROGRAMS, *(place for place in PROGRAMS if place.startswith("README.md"))))
def test_programs_run_on_two_ranks_and_print_what_they_say(place: str, selected: Selected) -> None:
    first, second = (found[place] for found in run_once(2, outcomes, selected("place"), timeout=300))
    assert (first[1], second[1]) == ("", "")
    assert PROGRAMS[place][1] in (None, first[0])


def test_the_readme_is_short_and_so_is_its_program() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    (whole,) = (
        code for place, (code, _) in PROGRAMS.items() if place.startswith("README.md") and "import " in code[:7]
    )
    assert len([line for line in whole.splitlines() if line]) <= 10
    quickstarts = [code for place, (code, _) in programs().items() if place.startswith("README.md") and code != whole]
    assert [len([line for line in code.splitlines() if line]) <= 5 for code in quickstarts] == [True] * 4


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command in (ROOT / "README.md").read_text().splitlines()


def test_the_tree_names_every_module_in_its_room_and_no_other() -> None:
    tree = (ROOT / "docs" / "tree.md").read_text().split("\nsp_attention/\n")[1].split("  integrations/ ")[0]
    top, *rooms = re.split(r"^  (?=\w+/ )", tree, flags=re.MULTILINE)
    named = {".": sorted(re.findall(r"\w+\.py", top))}
    named |= {room.split("/")[0]: sorted(set(re.findall(r"\w+\.py", room))) for room in rooms}
    folders = {".": ROOT / "sp_attention"} | {room: ROOT / "sp_attention" / room for room in named if room != "."}
    there = {
        room: sorted(path.name for path in folder.glob("*.py") if not path.name.startswith("__"))
        for room, folder in folders.items()
    }
    assert named == there
    assert set(named) == {".", "ulysses", "mixers", "distributed", "kernels", "loss", "region", "rehearsal"}


def test_tested_environments_are_those_of_tox() -> None:
    table = re.findall(r"^\| (`.+?`) \|", (ROOT / "docs" / "testing.md").read_text(), re.MULTILINE)
    named = {name.split("-")[-1] for cell in table for name in re.findall(r"`([\w-]+)`", cell)}
    tox = re.findall(r"^\[testenv:(.+)\]$", (ROOT / "tox.ini").read_text(), re.MULTILINE)
    there = {name for environment in tox for name in environment.split("-")[-1].strip("{}").split(",")}
    assert named == there


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("backends/**/*.md")]


def anchors(text: str) -> set[str]:
    """Those of the headings of a page, as GitHub and MkDocs make them, where these agree."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    names = [re.sub(r"\[(.+?)\]\(.*?\)|`", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w -]", "", name).strip().lower().replace(" ", "-") for name in names}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        if re.match(r"\w+:", link) is None and (
            not target.exists() or (anchor and anchor not in anchors(target.read_text()))
        ):
            broken.append(link)
    assert broken == []


ERRORS = {"UnsupportedError", "BackendError", "BatchError", "ShardedLogitsError", "CheckpointError"}
# Modules whose functions return the texts of refusals, which others raise.
REASONS = ("region/forward.py", "region/others.py", "rehearsal/options.py", "distributed/other_meshes.py")


def literal(node: ast.AST, constants: dict[str, str]) -> str:
    """The text that an expression is, with a line for each part that is literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(one.value if isinstance(one, ast.Constant) else "\n" for one in node.values)
    if isinstance(node, ast.Name):
        return constants.get(node.id, "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        first = next(iter(getattr(node.args[0], "elts", [])), node)
        return "" if first is node else literal(first, constants)
    return ""


def refusals() -> dict[str, str]:
    """By their place: the first words of the text of each refusal in the library, four to seven of them."""
    found = {}
    for file in sorted((ROOT / "sp_attention").rglob("*.py")):
        tree, name = ast.parse(file.read_text()), str(file.relative_to(ROOT / "sp_attention"))
        constants = {
            one.targets[0].id: literal(one.value, {})
            for one in tree.body
            if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            is_error = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS
            is_shared = (
                isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require_same" and len(node.args) > 3
            )
            if is_error and node.args:
                text = literal(node.args[0], constants)
            elif is_shared:
                text = literal(node.args[2], constants)
            elif isinstance(node, (ast.Return, ast.Yield)) and node.value is not None and name in REASONS:
                text = literal(node.value, constants)
            else:
                continue
            parts = [part.strip(" :,.;)").split() for part in text.split("\n")]
            words = next((part for part in parts if len(part) >= 4), max(parts, key=len))
            if len(words) > 2:
                found[f"{name}:{node.lineno}"] = " ".join(words[:7])
    return found


def test_every_refusal_is_found_on_the_page_of_troubleshooting() -> None:
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    found = refusals()
    assert len(found) > 60
    assert {place: words for place, words in found.items() if words not in page} == {}


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
