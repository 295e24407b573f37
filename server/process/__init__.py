"""The process itself: memory, thread priority, processor cores."""
