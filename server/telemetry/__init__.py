"""Logs, metrics, traces, GPU readings, and the lag of the event loop."""
