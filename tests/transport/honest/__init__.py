"""Honest clients with unusual loads, which the default limits must not hurt."""
