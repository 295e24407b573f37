"""Compares schedulers in virtual time: `python -m tests.simulator [DEADLINES]`.

DEADLINES is the length of each run as a multiple of the deadline, 100 by default.
"""

import sys

from tests.simulator.comparison import print_table

if __name__ == "__main__":
    print_table(*map(int, sys.argv[1:]))
