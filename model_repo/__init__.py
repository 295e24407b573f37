"""The build: turns networks into engines. May import torch; the server never imports it."""
