"""Command: what is in a model repository, is it sound, what may go, and who gets the calls.

    python -m server.repository list
    python -m server.repository verify resnet50/3
    python -m server.repository gc --keep 2 --delete
    python -m server.repository label resnet50 stable=3 canary=4 --canary-percent 5

A server that watches the repository follows what is changed here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from server.repository import reader, writer
from server.repository.manifest import InvalidVersion
from server.repository.reader import IgnoredEntry, Version
from server.repository.serving_config import (
    SERVE_LATEST,
    VERSION_LABELS,
    ServingConfig,
    VersionPolicy,
    look,
    read_plan,
    write_plan,
)

STALE = re.compile(r"\.(staging|gone)-.*")  # what writers leave that died
ASSIGNMENT = re.compile(rf"({'|'.join(VERSION_LABELS)})=([1-9][0-9]{{0,17}})?")


class Refused(Exception):
    """The command can't be carried out; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m server.repository",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--repo", type=Path, default=Path("model_repo/engines"), help="its folder (%(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help, description=help)
        found.set_defaults(run=run)
        return found

    listing = command("list", _list, "list every version, with what is wrong with it")
    listing.add_argument("--json", action="store_true", help="as JSON")
    verify = command("verify", _verify, "read every file and compare it with what was published")
    verify.add_argument("names", nargs="*", metavar="MODEL[/VERSION]", help="which; all of them")
    gc = command("gc", _gc, "tell what may go: old versions, and what writers left that died")
    gc.add_argument("--keep", type=_count, default=2, help="sound versions of each model (2)")
    gc.add_argument("--delete", action="store_true", help="and have it go")
    label = command("label", _label, "say which versions of a model are served, and to whom")
    label.add_argument("model")
    label.add_argument(
        "labels", nargs="*", metavar="LABEL=VERSION", help="as stable=3; canary= takes it away"
    )
    label.add_argument("--canary-percent", type=_percent, help="of the calls that name no version")
    label.add_argument("--versions", type=_policy, help="latest:N, all, named:N,N,...; '' for none")
    args = parser.parse_args(argv)
    try:
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except Refused as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or args.repo}: {error.strerror}", file=sys.stderr)
    return 1


# --- the commands ----------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    found = look(args.repo)
    plans = found.plans
    rows = [
        _facts(version, plans.get(version.model, ServingConfig())) for version in found.versions
    ]
    if args.json:
        strays = [_told(stray) for stray in found.strays]
        text = msgspec.json.encode({"versions": rows, "strays": strays})
        print(msgspec.json.format(text, indent=2).decode())
        return 0
    lines = [("MODEL", "VERSION", "SOUND", "SIZE", "CREATED", "ENGINES", "LABELS")]
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
    for model, plan in plans.items():
        if plan != ServingConfig():
            print(f"{model}: {_plan(plan)}")
    for stray in found.strays:
        print(f"passed over: {_told(stray)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    unsound = 0
    for version in _named(reader.scan(args.repo), args.names):
        try:
            if version.manifest is None:
                raise InvalidVersion(version.reason)
            reader.verify(version.folder, version.manifest)
            reader.read_labels(version.folder, version.manifest)
            reader.read_golden(version.folder, version.manifest)
        except InvalidVersion as error:
            unsound += 1
            print(f"{version.model}/{version.version}: UNSOUND: {error}")
        else:
            print(f"{version.model}/{version.version}: sound")
    return 1 if unsound else 0


def _gc(args: argparse.Namespace) -> int:
    """Versions go whole: a reader sees all of one or nothing."""
    found = look(args.repo)
    doomed: list[tuple[Path, str]] = []
    for home in dict.fromkeys(version.folder.parent for version in found.versions):
        doomed += _left_by_writers(home)
        if home.name not in found.plans:  # it can't be read: who knows what it names
            print(f"{home.name}: its plan can't be read, so all of its versions stay")
            continue
        mine = [version for version in found.versions if version.folder.parent == home]
        doomed += _superseded(mine, found.plans[home.name], args.keep)
    for path, reason in doomed:
        print(f"{'deleting' if args.delete else 'may go'}: {path.relative_to(args.repo)}: {reason}")
        if args.delete:
            _delete(path)
    if doomed and not args.delete:
        print("nothing was deleted; --delete has them go")
    return 0


def _label(args: argparse.Namespace) -> int:
    home = args.repo / args.model
    versions = {one.version: one for one in reader.scan(args.repo) if one.model == args.model}
    if not versions:
        there = ", ".join(sorted({one.model for one in reader.scan(args.repo)})) or "none"
        raise Refused(f"{args.repo} has no model {args.model!r}; it has {there}")
    try:
        old = read_plan(home)
    except InvalidVersion as error:
        raise Refused(f"{args.model}: {error}; mend or remove it") from None
    labels = dict(old.labels)
    for text in args.labels:
        match = ASSIGNMENT.fullmatch(text)
        if match is None:
            names = " or ".join(VERSION_LABELS)
            raise Refused(f"{text!r} is no LABEL=VERSION; a label is {names}, as in stable=3")
        name: str = match[1]
        if match[2] is None:
            labels.pop(name, None)  # type: ignore[call-overload]
            continue
        version = versions.get(int(match[2]))
        if version is None:
            known = ", ".join(map(str, versions))
            raise Refused(f"{args.model} has no version {match[2]}; it has {known}")
        if version.manifest is None:
            raise Refused(f"{args.model} version {version.version} is unsound: {version.reason}")
        labels[name] = version.version  # type: ignore[index]
    percent = old.canary_percent if args.canary_percent is None else args.canary_percent
    policy = old.versions if args.versions is None else args.versions
    if args.canary_percent and "canary" not in labels:
        raise Refused("--canary-percent needs a canary: give canary=VERSION too")
    if "canary" not in labels:
        percent = 0.0
    new = ServingConfig(versions=policy, labels=labels, canary_percent=percent)
    if new != old:
        write_plan(args.repo, args.model, new)
    print(f"{args.model}: {_plan(new)}")
    return 0


# --- what they need --------------------------------------------------------------------------


class Facts(msgspec.Struct, frozen=True):
    """What the list says of a version."""

    model: str
    version: int
    sound: bool
    reason: str
    bytes: int
    created: str
    engines: list[str]
    trained: bool
    labels: list[str]


def _facts(version: Version, plan: ServingConfig) -> Facts:
    manifest = version.manifest
    return Facts(
        model=version.model,
        version=version.version,
        sound=manifest is not None,
        reason=version.reason,
        bytes=sum(file.bytes for file in manifest.files()) if manifest else 0,
        created=manifest.created if manifest else "",
        engines=[engine.name for engine in manifest.engines] if manifest else [],
        trained=manifest.weights.trained if manifest else False,
        labels=[label for label in VERSION_LABELS if plan.version(label) == version.version],
    )


def _named(versions: Sequence[Version], names: Sequence[str]) -> list[Version]:
    """The versions that MODEL or MODEL/VERSION name; all where there are no names."""
    chosen = []
    for name in names:
        model, _, number = name.partition("/")
        mine = [
            one
            for one in versions
            if one.model == model and number in ("", str(one.version)) and one not in chosen
        ]
        if not any(one.model == model and number in ("", str(one.version)) for one in versions):
            raise Refused(f"there is no {name!r}")
        chosen += mine
    return chosen if names else list(versions)


def _superseded(
    versions: Sequence[Version], plan: ServingConfig, keep: int
) -> list[tuple[Path, str]]:
    """The versions of one model, the newest first, that nobody asks for any more."""
    sound = [one.version for one in versions if one.manifest is not None]
    kept = {*sound[:keep], *plan.labels.values(), *plan.policy(SERVE_LATEST).choose(sound)}
    newest = sound[0] if sound else 0
    doomed = []
    for one in versions:
        if one.version in kept:
            continue
        if one.manifest is not None:
            doomed.append((one.folder, f"superseded; {keep} are kept"))
        elif one.version < newest:  # a newer one may still be on its way here
            doomed.append((one.folder, f"unsound: {one.reason}"))
    return doomed


def _left_by_writers(home: Path) -> list[tuple[Path, str]]:
    """What writers that died have left; those of living writers are locked."""
    left = []
    for path in sorted(home.iterdir()):
        if STALE.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with suppress(OSError), writer.locked(path, wait=False):
                left.append((path, "left by a writer that died"))
    return left


def _delete(path: Path) -> None:
    """A version is first hidden, in one step."""
    hidden = path
    if not path.name.startswith("."):
        hidden = Path(tempfile.mkdtemp(prefix=".gone-", dir=path.parent))
        path.rename(hidden / path.name)
        writer.sync(path.parent)
    shutil.rmtree(hidden, ignore_errors=True)  # another one may be at it


def _plan(plan: ServingConfig) -> str:
    parts = [f"{label}={version}" for label, version in plan.labels.items()]
    if plan.canary_percent:
        parts.append(f"{plan.canary_percent:g} % of the calls to canary")
    parts.append(f"versions {plan.versions or 'as the server is set'}")
    return ", ".join(parts)


def _told(stray: IgnoredEntry) -> str:
    return f"{stray.path}: {stray.reason}"


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text[:9]) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text[:9])


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 100")
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
