"""Command that measures how well a published model classifies labelled images.

    python -m model_repo.evaluate MODEL --data DIR [--repo DIR] [--version N] [--against eager] ...
    python -m model_repo.evaluate MODEL --data FILE.csv --server HOST:PORT ...

Images are decoded and classified as the server does it, or by a running server.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if the model can't be measured, 2 for wrong usage."""
    from model_repo.evaluation.command import run  # imports torch

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
