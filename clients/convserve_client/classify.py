"""Command: what is in these pictures?

    python clients/classify.py cat.jpg dog.png --model resnet50 --top-k 3

Prints a table, or JSON with --json. Exit status: 0, 1 when there is no answer, 2 for wrong usage.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convserve_client.client import (
    DEFAULT_TIMEOUT_S,
    Answer,
    ClassifierError,
    Client,
    ModelInfo,
)

BAR_WIDTH = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--model", help="needed where the server has more than one ready")
    parser.add_argument("--label", default="", help='"stable" or "canary"; else the server chooses')
    parser.add_argument(
        "--priority", type=int, default=0, help="0 to 9, the most urgent (%(default)s)"
    )
    parser.add_argument("--target", default="127.0.0.1:8001", help="HOST:PORT (%(default)s)")
    parser.add_argument("--top-k", type=int, default=5, help="classes an image (%(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=DEFAULT_TIMEOUT_S, help="seconds (%(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    args = parser.parse_args(argv)
    if not 0 < args.timeout < float("inf"):
        parser.error(f"--timeout {args.timeout} must be positive and finite")
    if args.top_k < 1:
        parser.error(f"--top-k {args.top_k} must be at least 1")
    try:
        with Client(args.target, timeout_s=args.timeout) as client:
            model = args.model or _only_ready(client.list_models())
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
        from rich.console import Console
    except ImportError:
        return _fail("the table needs rich (pip install 'convserve[client]'); --json does not")
    _print_table(args.images, answer, Console())
    return 0


def _only_ready(models: Sequence[ModelInfo]) -> str:
    """The one model there is to choose. Raises ClassifierError naming those there are."""
    ready = sorted({model.name for model in models if model.ready})
    if len(ready) == 1:
        return ready[0]
    if not ready:
        raise ClassifierError("the server has no model ready")
    raise ClassifierError(f"--model is needed; the server has {', '.join(ready)}")


def _print_table(images: Sequence[Path], answer: Answer, console: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

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
