"""Image files and raw pixels become the pixels a model takes."""
