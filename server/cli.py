"""Command `convserve`: one entry to all commands of the application.

Each subcommand is the `main` of another module, imported only when it is called: `convserve serve`
never imports torch, and `convserve bench` needs the distribution convserve-client.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from signal import SIGTERM
from typing import NamedTuple

from server.process.early_signals import exit_on


class Subcommand(NamedTuple):
    """A module whose `main()` reads sys.argv and returns the exit status."""

    module: str
    help: str


COMMANDS = {
    "serve": Subcommand("server.__main__", "serve the models of a repository"),
    "build": Subcommand("model_repo.build", "build models into a repository (needs torch)"),
    "evaluate": Subcommand(
        "model_repo.evaluate", "measure a model on labelled images (needs torch)"
    ),
    "repo": Subcommand("server.repository.__main__", "list, verify, clean up, label versions"),
    "token": Subcommand("server.security.identity.token_command", "make bearer tokens for callers"),
    "classify": Subcommand("convserve_client.classify", "classify image files"),
    "bench": Subcommand("convserve_client.bench", "measure a server under load"),
}
INSTALL = {  # top-level package that may be missing -> how to get it
    "convserve_client": "pip install 'convserve-client[bench]', or pip install "
    "'./clients/convserve_client[bench]' in a checkout",
    "torch": "pip install 'convserve[build]'",
}


def usage() -> str:
    lines = [f"  {name:10}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: convserve COMMAND [OPTION ...]",
            "",
            *lines,
            "",
            "`convserve COMMAND --help` lists the options of a command.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the subcommand that the first argument names. Returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if given else 2
    name, *rest = given
    if name not in COMMANDS:
        print(f"convserve: {name!r} is not a command\n\n{usage()}", file=sys.stderr)
        return 2
    exit_on((SIGTERM,))
    sys.argv = [f"convserve {name}", *rest]
    try:  # some modules import their libraries in main()
        status: int = import_module(COMMANDS[name].module).main() or 0
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in INSTALL:
            raise
        print(f"convserve {name} needs {missing}: {INSTALL[missing]}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
