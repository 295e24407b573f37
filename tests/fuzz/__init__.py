"""Fuzzing: random inputs, most of them almost valid, for everything that reads foreign bytes."""
