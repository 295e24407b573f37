"""What the server tells its operators: logs, metrics, traces, and how far the event loop lags."""
