"""The options that both processes of the GPU lane accept."""

from __future__ import annotations

import argparse
from pathlib import Path


def lane_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for the two result files")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder for engines and packages (default: a temporary folder)",
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels")
    parser.add_argument(
        "--models", default="", help="comma-separated (default: all, the most important first)"
    )
    parser.add_argument(
        "--precisions",
        default="",
        help="comma-separated (default: fp16,bf16; with inductor: bf16)",
    )
    parser.add_argument("--backend", default="auto", help="auto, tensorrt, inductor or openvino")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="start no step after this time (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="duration of each measurement (%(default)s)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=990.0,
        help="the GPU's peak in half precision, dense, for the roofline (H200: %(default)s)",
    )
    return parser
