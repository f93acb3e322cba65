"""The `flash` command: imports nothing but the standard library until it knows that it can run."""

from __future__ import annotations

import importlib.util
import platform
import sys

NEEDED = ("rich", "typer")


def main() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"flash: the command line needs {' and '.join(missing)}, which the core does without:\n"
            "  pip install 'flash-generations[cli]'"
        )
    if importlib.util.find_spec("torch") is None:
        where = f"{platform.system()} {platform.machine()}"
        sys.exit(f"flash: there is no PyTorch here ({where}):\n  pip install 'torch>=2.6'")
    from flash.cli_app import app

    app()


if __name__ == "__main__":
    main()
