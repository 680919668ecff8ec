"""The command `minter`. Where only the client is installed, it says how to get the rest."""

import importlib.util
import sys

NEEDS = ("typer", "rich", "sqlalchemy", "psycopg", "celery", "falcon")
"""Libraries of the extra `server`, without which there is no command."""


def main() -> None:
    """Run the command; exit code 2 if only the client is installed."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(_client_alone(missing))
    from minter.cli.__main__ import main as run  # noqa: PLC0415 - its imports are what may be missing

    run()


def _client_alone(missing: list[str]) -> int:
    sys.stderr.write(
        f"minter: only the Python client is installed ({', '.join(missing)} missing); "
        "the command comes with: pip install 'gridminter[server]'\n"
    )
    return 2


if __name__ == "__main__":
    main()
