"""What is fuzzed, by the kind of its input."""
