"""CPU time of a request in the server, by phase. Command: `python -m tests.benchmarks.cost`."""
