"""Results of a benchmark as tables, pages and files."""
