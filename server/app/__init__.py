"""Puts the server together, starts and stops it, and runs it as a process."""
