"""Load generator behind convserve-bench."""
