"""The networks, one file for each paper."""
