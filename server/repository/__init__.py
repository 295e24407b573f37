"""Model repository: the folders that the build writes and the server reads."""
