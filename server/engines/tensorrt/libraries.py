"""The TensorRT libraries: TensorRT for datacenter GPUs, and TensorRT-RTX ("rtx").

Their Python interfaces are nearly the same, so one backend supports both variants. A compiled
engine (a plan) runs only with the variant and exact version that compiled it.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import cache
from typing import Any

log = logging.getLogger(__name__)

VARIANTS = ("auto", "tensorrt", "rtx")  # "auto" takes the first that is installed
NAMES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}


def import_library(variant: str) -> Any:
    """The Python module of a variant. Raises ImportError, also if a shared library is missing."""
    try:
        if variant == "tensorrt":
            import tensorrt

            return tensorrt
        if variant == "rtx":
            import tensorrt_rtx_libs  # noqa: F401, I001 (first: it loads what the bindings need)
            import tensorrt_rtx_bindings

            return tensorrt_rtx_bindings
    except OSError as error:
        raise ImportError(str(error)) from error
    raise ImportError(f"TensorRT variant {variant!r} is unknown; choose one of {', '.join(NAMES)}")


def installed_variant(variant: str) -> str:
    """Checks that a variant is installed; for "auto", finds one. "tensorrt" comes before "rtx".

    Raises ImportError, which says what to install.
    """
    for candidate in NAMES if variant == "auto" else (variant,):
        try:
            import_library(candidate)
        except ImportError:
            continue
        return candidate
    extra = "gpu-datacenter" if variant == "tensorrt" else "gpu"
    missing = (
        "neither TensorRT nor TensorRT-RTX is installed"
        if variant == "auto"
        else f"{NAMES[variant]} is not installed"
    )
    raise ImportError(f"{missing}: pip install 'convserve[{extra}]'")


def fresh_logger(trt: Any) -> Any:
    """The library's logger, without errors from before. `last_errors` explains a failure."""
    logger = _logger(trt)
    logger.errors.clear()
    return logger


@cache
def _logger(trt: Any) -> Any:
    """One logger for the process: TensorRT keeps using the first one it gets."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            log.debug("tensorrt", extra={"severity": severity.name, "text": message})

        def last_errors(self) -> str:
            return "; ".join(self.errors) or "TensorRT gives no reason"

    return Logger()
