"""The server's HTTP/2 against RFC 9113 and RFC 7541, section by section."""
