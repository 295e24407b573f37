"""Command: classifies image files; see convserve_client/classify.py."""

import sys

from convserve_client.classify import main

if __name__ == "__main__":
    sys.exit(main())
