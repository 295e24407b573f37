"""Checkpoint files: download them, recognise them and read them."""
