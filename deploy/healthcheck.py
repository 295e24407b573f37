"""Container health check: exit status 0 if the server is ready, else 1 with the reason.

Uses only the standard library, because the image has no curl.
"""

import os
import sys
import urllib.request


def main() -> int:
    port = os.environ.get("CONVSERVE_HTTP_PORT", "")
    if not port.isdecimal():  # empty, or an address that Kubernetes sets: the server uses 8000
        port = "8000"
    # Ignore proxy settings: a proxy cannot reach this container's loopback address.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/readyz", timeout=3):
            return 0
    except OSError as error:  # includes every HTTP status other than 2xx
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
