"""Classifies image files.

    convserve-classify cat.jpg dog.png --model resnet50 --top-k 3

Prints a table, or JSON with --json. Exit status: 0, 1 if there is no answer, 2 for wrong usage.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from convserve_client.async_client import DEFAULT_TIMEOUT_S
from convserve_client.client import Client
from convserve_client.errors import ClassifierError
from convserve_client.security.arguments import access_from, add_access_arguments
from convserve_client.values import Answer, ModelInfo

BAR_WIDTH = 20


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    try:
        with Client(
            args.target,
            timeout_s=args.timeout_s,
            tls=args.access.tls,
            token=args.access.token or None,
            allow_plaintext_token=args.access.allow_plaintext_token,
        ) as client:
            model = args.model or _only_ready_model(client.list_models())
            answer = client.classify(
                args.images,
                model=model,
                label=args.label,
                top_k=args.top_k,
                priority=args.priority,
            )
    except (ClassifierError, OSError) as error:
        return _fail(str(error))
    if args.json:
        print(json.dumps({"images": [str(path) for path in args.images], **asdict(answer)}))
        return 0
    try:
        _print_table(args.images, answer)
    except ImportError:
        return _fail("the table needs rich: pip install rich, or use --json")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    add("--model", help="name of the model; needed if the server has several ready models")
    add("--label", default="", help='"stable" or "canary" (default: the server chooses)')
    add("--priority", type=int, default=0, help="0 to 9; 9 is most urgent (%(default)s)")
    add("--target", default="127.0.0.1:8001", help="HOST:PORT of the server (%(default)s)")
    add("--top-k", type=int, default=5, help="number of classes per image (%(default)s)")
    add(
        "--timeout-s",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        help="seconds to wait for the answer (%(default)g)",
    )
    add("--json", action="store_true", help="print JSON instead of a table")
    add_access_arguments(parser)
    args = parser.parse_args(argv)
    try:
        args.access = access_from(args, os.environ, [args.target])
    except ValueError as error:
        parser.error(str(error))
    if not 0 < args.timeout_s < float("inf"):
        parser.error(f"--timeout-s {args.timeout_s} must be positive and finite")
    if args.top_k < 1:
        parser.error(f"--top-k {args.top_k} must be at least 1")
    return args


def _only_ready_model(models: Sequence[ModelInfo]) -> str:
    """Name of the only ready model. Raises ClassifierError if there are none or several."""
    ready = sorted({model.name for model in models if model.is_ready})
    if len(ready) == 1:
        return ready[0]
    if not ready:
        raise ClassifierError("the server has no ready model")
    raise ClassifierError(f"--model is needed; the server has {', '.join(ready)}")


def _print_table(images: Sequence[Path], answer: Answer) -> None:
    """Raises ImportError if rich is not installed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"{escape(answer.model)} version {answer.version}", highlight=False)
    if not answer.trained:
        console.print("UNTRAINED: random parameters, these classes mean nothing", style="bold red")
    table = Table("image", "rank", "class", "probability", "", highlight=False)
    for path, predictions in zip(images, answer.results, strict=True):
        for rank, prediction in enumerate(predictions, start=1):
            table.add_row(
                escape(str(path)) if rank == 1 else "",
                str(rank),
                escape(prediction.label or f"class {prediction.index}"),
                f"{prediction.probability:.2%}",
                "█" * round(prediction.probability * BAR_WIDTH),
            )
        table.add_section()
    console.print(table)


def _fail(message: str) -> int:
    print(f"classify: {' '.join(message.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
