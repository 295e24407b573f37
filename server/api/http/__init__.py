"""REST, metrics and probes by HTTP."""
