"""Command that makes bearer tokens.

    convserve token new team-a
    convserve token new team-a --auth /etc/convserve/auth.toml --expires 2027-01-01

The first form prints the token, which is stored nowhere, and the lines for the auth file. The
second adds the lines itself and prints only the token. A server that uses the file reads it again.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from server.security.identity.auth_file import NAME, InvalidAuthFile, parse_auth_file
from server.security.identity.tokens import NewToken, new_token
from server.security.principal import RESERVED_NAMES, Role


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    token = new_token()
    if args.auth is None:
        print(f"token, shown once: {token.text}\n")
        print("Add these lines to the auth file; the first table only if it is not there yet:\n")
        print(_principal_lines(args) + _token_lines(args, token), end="")
        return 0
    try:
        _append(args, token)
    except InvalidAuthFile as error:
        print(f"{args.auth}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or args.auth}: {error.strerror or error}", file=sys.stderr)
    else:
        print(token.text)
        return 0
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convserve token",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    new = commands.add_parser("new", help="make a token", description="Makes a token.")
    new.add_argument("name", type=_name, metavar="NAME", help="name of the principal")
    new.add_argument("--auth", type=Path, metavar="FILE", help="auth file to add the token to")
    new.add_argument(
        "--expires",
        type=_time,
        metavar="DATE",
        help="end of the token, as 2027-01-01 or 2027-01-01T12:00:00+01:00; the default is never",
    )
    new.add_argument(
        "--role",
        type=Role,
        choices=list(Role),
        action="append",
        help="role of a new principal; may be repeated; the default is classify",
    )
    new.add_argument(
        "--model",
        action="append",
        metavar="GLOB",
        help="models that a new principal sees; may be repeated; the default is all",
    )
    return parser


def _append(args: argparse.Namespace, token: NewToken) -> None:
    """Adds the token to the file. Raises InvalidAuthFile, OSError."""
    path = Path(os.path.realpath(args.auth))  # a link stays a link
    text, mode = "", 0o600
    if path.exists():
        data = path.read_bytes()
        known = parse_auth_file(data).principals
        text, mode = data.decode("utf-8"), stat.S_IMODE(path.stat().st_mode)
        if text and not text.endswith("\n"):
            text += "\n"
    else:
        known = {}
    if args.name in known and (args.role or args.model):
        raise InvalidAuthFile(
            f"principals.{args.name} is there already; change its roles and models in the file"
        )
    added = _token_lines(args, token)
    if args.name not in known:
        added = _principal_lines(args) + added
    text += "\n" + added if text else added
    parse_auth_file(text.encode("utf-8"))
    _replace(path, text, mode)


def _replace(path: Path, text: str, mode: int) -> None:
    """Writes the file in one step: a server never reads half of it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _principal_lines(args: argparse.Namespace) -> str:
    roles = json.dumps(args.role or [Role.CLASSIFY])  # TOML writes such lists as JSON does
    models = json.dumps(args.model or ["*"])
    return f'[principals."{args.name}"]\nroles = {roles}\nmodels = {models}\n\n'


def _token_lines(args: argparse.Namespace, token: NewToken) -> str:
    lines = [
        "[[tokens]]",
        f'principal = "{args.name}"',
        f'id = "{token.id}"',
        f'sha256 = "{token.sha256}"',
    ]
    if args.expires is not None:
        lines.append(f"expires = {args.expires.isoformat()}")
    return "\n".join(lines) + "\n"


def _name(text: str) -> str:
    if not NAME.fullmatch(text) or text in RESERVED_NAMES:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be 1 to 64 letters, digits and . _ @ -, and not "
            f"{' or '.join(sorted(RESERVED_NAMES))}"
        )
    return text


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a date, as 2027-01-01") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


if __name__ == "__main__":
    sys.exit(main())
