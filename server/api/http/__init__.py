"""HTTP: REST calls, metrics, probes."""
