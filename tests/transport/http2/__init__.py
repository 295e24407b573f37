"""Tests of the parts of the HTTP/2 connection."""
