"""Results of the bench command as tables, HTML and files."""
