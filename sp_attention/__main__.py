"""`sp-attention`, which is `python -m sp_attention` too: the command line, where the extra `cli` is installed."""

import sys
from importlib.util import find_spec

EXTRA = ("click", "rich", "matplotlib")


def main() -> None:
    """Run the command line; without what it needs, say what to install, and exit with status 2."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        needed = f"the command line needs {', '.join(missing)}"
        sys.stderr.write(f"sp-attention: {needed}: pip install 'sp-attention[cli]' (in a checkout: '.[cli]')\n")
        sys.exit(2)
    from sp_attention.cli import main as run

    run()


if __name__ == "__main__":
    main()
