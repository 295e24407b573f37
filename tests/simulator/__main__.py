"""Command: `python -m tests.simulator` compares schedulers in virtual time."""

from tests.simulator.simulation import main

if __name__ == "__main__":
    main()
