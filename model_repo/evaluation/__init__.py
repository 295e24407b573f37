"""Measures how well an engine classifies labelled images."""
