"""Command: measures a server from outside; see convserve_client/bench.py."""

import sys

from convserve_client.bench import main

if __name__ == "__main__":
    sys.exit(main())
