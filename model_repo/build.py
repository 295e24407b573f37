"""Command that builds engines from model cards and publishes them.

    python -m model_repo.build CARD... | --all [--repo DIR] [--weights SRC] [--or-random] ...
    python -m model_repo.build --name NAME --base CARD --weights FILE --labels FILE ...
    python -m model_repo.build --new-card CARD --from FILE
    python -m model_repo.build CARD... --add-engine --backend tensorrt [--repo DIR] ...

If one model fails, the command still builds the others. With --add-engine it compiles another
engine for the newest published version. A signal ends it at once; it leaves no unfinished files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from model_repo.interruption import Interruption


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every model was published, 1 if one failed, 2 for wrong usage."""
    with Interruption() as interruption:
        from model_repo.build_command import run  # imports torch, so it comes after the handlers

        return run(arguments, interruption)


if __name__ == "__main__":
    sys.exit(main())
