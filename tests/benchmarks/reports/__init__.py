"""Pages in docs/benchmarks: Markdown and plots, written from measured figures."""
