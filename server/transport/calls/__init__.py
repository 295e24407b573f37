"""Calls: their messages, their life, unary and streaming ones."""
