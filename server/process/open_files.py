"""How many files and sockets the process may have open."""

from __future__ import annotations

import resource


def raise_open_files_limit() -> int:
    """Raises the limit as far as the system allows, and returns it.

    The usual limit of 1,024 exists for programs that use select(), which this server does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # some systems have a lower limit than they report
            return soft
    return hard
