"""HTTP/2 by libnghttp2: connections, streams, limits on what a client may do."""
