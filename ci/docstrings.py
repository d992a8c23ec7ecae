"""For the site: lines of a docstring that say what a name is become a list, which Markdown would run together."""

import re

from griffe import Extension, Object

# The first line of what is said of a name, or of several; what follows of it is set in, or is the next name's.
NAMED = re.compile(r"^[a-z_]\w*(, [a-z_]\w*)*: ")


def as_list(docstring: str) -> str:
    """The docstring, with its lines `name: text` as list items."""
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        starts = NAMED.match(line) is not None
        if starts:
            lines += [] if inside else [""]
            names, said = line.split(": ", 1)
            lines.append(f"- `{names}`: {said}")
        elif inside and line.startswith("    "):
            lines.append(f"  {line.strip()}")
        elif inside and line:
            lines.append(f"  {line}")
        else:
            lines.append(line)
        inside = starts or (inside and bool(line))
    return "\n".join(lines)


class Docstrings(Extension):
    """Runs on every object that has a docstring."""

    def on_object(self, *, obj: Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)
