"""What a client sends, and what the RFCs demand of the server then."""
