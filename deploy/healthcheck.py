"""Ends with status 0 when the server in this container answers calls, else with 1 and the reason.

Only the standard library: the image has no curl.
"""

import os
import sys
import urllib.request


def main() -> int:
    port = os.environ.get("CONVSERVE_HTTP_PORT", "")
    if not port.isdecimal():  # empty, or what Kubernetes sets for a service: the server takes 8000
        port = "8000"
    # A proxy that the container has for the outside would not find the way back in.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/readyz", timeout=3):
            return 0
    except OSError as error:  # any status but 2xx is one too
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
