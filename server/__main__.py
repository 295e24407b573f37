"""`python -m server`: serves the models of a repository until a signal arrives."""

import sys

from server.process.early_signals import STOP_SIGNALS, exit_on


def main() -> int:
    exit_on(STOP_SIGNALS, status=0)
    from server.app.run import run  # imports everything else, so it comes after the signal handlers

    return run()


if __name__ == "__main__":
    sys.exit(main())
