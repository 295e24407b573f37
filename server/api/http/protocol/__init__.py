"""HTTP/1.1 connections: uvicorn, with limits on what a client may cost."""
