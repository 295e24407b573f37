"""The options of commands for TLS and tokens."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from convserve_client.security.access import Access
from convserve_client.security.tls import TlsOptions
from convserve_client.security.token import bearer

TOKEN_VARIABLE = "CONVSERVE_TOKEN"


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "TLS and identity",
        "--tls, --tls-ca, --tls-cert or --server-name turns TLS on. A token comes from --token-file"
        f" or from the environment variable {TOKEN_VARIABLE}, never from the command line, which"
        " other users of the machine can read.",
    ).add_argument
    add("--tls", action="store_true", help="use TLS, and trust the CAs of the system")
    add("--tls-ca", metavar="FILE", help="use TLS, and trust the CAs in this PEM file")
    add("--tls-cert", metavar="FILE", help="the client's certificate, for servers with mTLS")
    add("--tls-key", metavar="FILE", help="private key of --tls-cert, without a passphrase")
    add(
        "--server-name",
        default="",
        metavar="NAME",
        help="name in the server's certificate (default: the host of the target)",
    )
    add("--token-file", metavar="FILE", help="file with the bearer token")
    add(
        "--allow-plaintext-token",
        action="store_true",
        help="send the token without TLS to another machine; anyone on the way can read it",
    )


def access_from(
    args: argparse.Namespace, environ: Mapping[str, str], targets: Sequence[str]
) -> Access:
    """Raises ValueError if a file cannot be used, or options contradict each other."""
    if bool(args.tls_cert) != bool(args.tls_key):
        given, missing = ("cert", "key") if args.tls_cert else ("key", "cert")
        raise ValueError(f"--tls-{given} needs --tls-{missing}")
    has_tls = args.tls or args.tls_ca or args.tls_cert or args.tls_key or args.server_name
    tls = None
    if has_tls:
        tls = TlsOptions(
            ca_file=args.tls_ca,
            cert_file=args.tls_cert,
            key_file=args.tls_key,
            server_name=args.server_name,
        )
    access = Access(
        tls=tls,
        token=_token(args.token_file, environ),
        allow_plaintext_token=args.allow_plaintext_token,
    )
    for target in targets:
        access.check(target)
    return access


def _token(name: str | None, environ: Mapping[str, str]) -> str:
    """The token, or "" if there is none. Errors name where it comes from, never the token."""
    source = f"--token-file {name}" if name else TOKEN_VARIABLE
    try:
        token = Path(name).read_text("utf-8") if name else environ.get(TOKEN_VARIABLE, "")
        token = token.strip()
        if token or name:
            bearer(token)
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not a text file") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return token
