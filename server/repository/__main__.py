"""Command to list, verify and clean a model repository, and to label versions.

    python -m server.repository list
    python -m server.repository verify resnet50/3
    python -m server.repository gc --keep 2 --delete
    python -m server.repository label resnet50 stable=3 canary=4 --canary-percent 5

`convserve repo` is the same command. A server that watches the repository applies changes itself.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec

from server.repository import reader
from server.repository.contents import IgnoredEntry, VersionEntry, list_contents, list_versions
from server.repository.garbage import delete, find_garbage
from server.repository.links import Links, printable
from server.repository.manifest import InvalidVersion
from server.repository.serving_config import (
    SERVING_CONFIG_FILE,
    VERSION_LABELS,
    Label,
    ServingConfig,
    VersionPolicy,
    read_serving_config,
    write_serving_config,
)
from server.settings import split_list

ASSIGNMENT = re.compile(rf"({'|'.join(VERSION_LABELS)})=([1-9][0-9]{{0,17}})?")


class CommandError(Exception):
    """The command can't be carried out; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except CommandError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        place = printable(os.fsdecode(error.filename or args.repo))
        print(f"{place}: {error.strerror or error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server.repository",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--repo",
        type=Path,
        default=Path("model_repo/engines"),
        help="folder of the repository (%(default)s)",
    )
    parser.add_argument(
        "--allowed-roots",
        type=_folders,
        default=[],
        help="folders outside the repository that symbolic links in it may lead into, separated by "
        "commas",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help, description=help)
        found.set_defaults(run=run)
        return found

    listing = command("list", _list, "list all versions, and why a version is invalid")
    listing.add_argument("--json", action="store_true", help="print JSON")
    verify = command("verify", _verify, "read all files and compare them with the checksums")
    verify.add_argument("names", nargs="*", metavar="MODEL[/VERSION]", help="what to verify (all)")
    gc = command("gc", _gc, "show old versions and leftover files; --delete deletes them")
    gc.add_argument("--keep", type=_count, default=2, help="valid versions to keep per model (2)")
    gc.add_argument("--delete", action="store_true", help="delete what is shown")
    label = command("label", _label, "set which versions are loaded and which requests they get")
    label.add_argument("model")
    label.add_argument(
        "labels", nargs="*", metavar="LABEL=VERSION", help="as stable=3; canary= removes the label"
    )
    label.add_argument(
        "--canary-percent",
        type=_percent,
        help="percentage of the requests without a version that the canary gets",
    )
    label.add_argument(
        "--versions",
        type=_policy,
        help="versions to load: latest:N, all, or named:N,N,...; '' for the server's setting",
    )
    return parser


# --- the commands ----------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    found = list_contents(args.repo, args.allowed_roots)
    rows = [
        _summary(version, found.configs.get(version.model, ServingConfig()))
        for version in found.versions
    ]
    if args.json:
        ignored = [_ignored_text(entry) for entry in found.ignored]
        text = msgspec.json.encode({"versions": rows, "strays": ignored})
        print(msgspec.json.format(text, indent=2).decode())
        return 0
    lines = [("MODEL", "VERSION", "VALID", "SIZE", "CREATED", "ENGINES", "LABELS")]
    lines += [
        (
            row.model,
            str(row.version),
            "yes" if row.sound else "no",
            f"{row.bytes / 1e6:.1f} MB",
            row.created,
            " ".join(row.engines),
            " ".join(row.labels) or row.reason,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
    for model, config in found.configs.items():
        if config != ServingConfig():
            print(f"{model}: {_config_text(config)}")
    for entry in found.ignored:
        print(f"ignored: {_ignored_text(entry)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    invalid = 0
    for version in _select(list_versions(args.repo, args.allowed_roots), args.names):
        try:
            if version.manifest is None:
                raise InvalidVersion(version.reason)
            reader.verify_files(version.folder, version.manifest)
            reader.open_version(version.folder, version.manifest)
        except InvalidVersion as error:
            invalid += 1
            print(f"{version.model}/{version.version}: INVALID: {error}")
        else:
            print(f"{version.model}/{version.version}: valid")
    return 1 if invalid else 0


def _gc(args: argparse.Namespace) -> int:
    found = list_contents(args.repo, args.allowed_roots)
    for model in dict.fromkeys(version.model for version in found.versions):
        if model not in found.configs:
            print(f"{model}: {SERVING_CONFIG_FILE} is invalid, so all versions are kept")
        if (args.repo / model).is_symlink():
            print(f"{model}: its folder is a symbolic link, so nothing in it is deleted")
    garbage = find_garbage(found, args.keep)
    action = "deleting" if args.delete else "would delete"
    for path, reason in garbage:
        print(f"{action}: {printable(path.relative_to(args.repo))}: {reason}")
        if args.delete:
            delete(path)
    if garbage and not args.delete:
        print("nothing was deleted; add --delete to delete these")
    return 0


def _label(args: argparse.Namespace) -> int:
    found = list_versions(args.repo, args.allowed_roots)
    versions = {entry.version: entry for entry in found if entry.model == args.model}
    if not versions:
        models = ", ".join(sorted({entry.model for entry in found})) or "none"
        raise CommandError(f"{args.repo} has no model {args.model!r}; it has {models}")
    try:
        links = Links.within(args.repo, args.allowed_roots)
        old = read_serving_config(args.repo / args.model, links)
    except InvalidVersion as error:
        raise CommandError(f"{args.model}: {error}; correct or remove the file") from None
    labels = dict(old.labels)
    for text in args.labels:
        _assign(labels, text, args.model, versions)
    percent = old.canary_percent if args.canary_percent is None else args.canary_percent
    policy = old.versions if args.versions is None else args.versions
    if args.canary_percent and "canary" not in labels:
        raise CommandError("--canary-percent needs a canary; add canary=VERSION")
    if "canary" not in labels:
        percent = 0.0
    new = ServingConfig(versions=policy, labels=labels, canary_percent=percent)
    if new != old:
        write_serving_config(args.repo, args.model, new)
    print(f"{args.model}: {_config_text(new)}")
    return 0


# --- helpers ---------------------------------------------------------------------------------


class VersionSummary(msgspec.Struct, frozen=True):
    """One version in the JSON of `list`."""

    model: str
    version: int
    sound: bool  # valid
    reason: str
    bytes: int
    created: str
    engines: list[str]
    trained: bool
    labels: list[str]


def _summary(version: VersionEntry, config: ServingConfig) -> VersionSummary:
    manifest = version.manifest
    return VersionSummary(
        model=version.model,
        version=version.version,
        sound=manifest is not None,
        reason=version.reason,
        bytes=sum(file.bytes for file in manifest.files()) if manifest else 0,
        created=manifest.created if manifest else "",
        engines=[engine.name for engine in manifest.engines] if manifest else [],
        trained=manifest.weights.trained if manifest else False,
        labels=[label for label in VERSION_LABELS if config.version(label) == version.version],
    )


def _select(versions: Sequence[VersionEntry], names: Sequence[str]) -> list[VersionEntry]:
    """The versions that the names (MODEL or MODEL/VERSION) select; all if there are no names."""
    if not names:
        return list(versions)
    selected: list[VersionEntry] = []
    for name in names:
        model, _, number = name.partition("/")
        matching = [
            entry
            for entry in versions
            if entry.model == model and number in ("", str(entry.version))
        ]
        if not matching:
            raise CommandError(f"there is no {name!r}")
        selected += [entry for entry in matching if entry not in selected]
    return selected


def _assign(
    labels: dict[Label, int], text: str, model: str, versions: Mapping[int, VersionEntry]
) -> None:
    """Applies LABEL=VERSION or LABEL= to `labels`. Raises CommandError."""
    match = ASSIGNMENT.fullmatch(text)
    if match is None:
        names = " or ".join(VERSION_LABELS)
        raise CommandError(
            f"{text!r} is not of the form LABEL=VERSION; a label is {names}, as in stable=3"
        )
    label, number = cast(Label, match[1]), match[2]
    if number is None:
        labels.pop(label, None)
        return
    version = versions.get(int(number))
    if version is None:
        known = ", ".join(map(str, versions))
        raise CommandError(f"{model} has no version {number}; it has {known}")
    if version.manifest is None:
        raise CommandError(f"{model} version {version.version} is invalid: {version.reason}")
    labels[label] = version.version


def _config_text(config: ServingConfig) -> str:
    parts = [f"{label}={version}" for label, version in config.labels.items()]
    if config.canary_percent:
        parts.append(f"{config.canary_percent:g}% of requests to canary")
    parts.append(f"versions {config.versions or 'as set in the server'}")
    return ", ".join(parts)


def _ignored_text(entry: IgnoredEntry) -> str:
    return f"{printable(entry.path)}: {entry.reason}"


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text[:9]) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text[:9])


def _folders(text: str) -> list[Path]:
    return [Path(name) for name in split_list(text)]


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 100")
    return value


def _policy(text: str) -> str:
    try:
        if text:
            VersionPolicy.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


if __name__ == "__main__":
    sys.exit(main())
