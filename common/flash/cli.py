"""The `flash` command: looks for its own dependencies before it imports them."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("rich", "typer")


def main() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"flash: the command line needs {' and '.join(missing)}, which the core does without:\n"
            "  pip install 'flash-generations[cli]'"
        )
    from flash.cli_app import app

    app()


if __name__ == "__main__":
    main()
