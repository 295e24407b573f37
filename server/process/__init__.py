"""The operating system process: memory, processor cores, thread priority, threads at exit."""
