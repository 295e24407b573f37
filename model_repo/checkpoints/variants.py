"""Recognises networks that have our names and shapes, but compute something else.

Names and shapes cannot tell a stride. So this looks at what lies beside the checkpoint, and at how
the library of the checkpoint treats the size of the images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from model_repo.checkpoints.reader import WrongCheckpoint

VGG_STRIDE = 32
VGG_FEATURES = 7  # height and width of the last feature map that the dense layers take
CONFIG = "config.json"  # of Hugging Face, beside the checkpoint
MAX_CONFIG_BYTES = 1 << 20
# Settings of transformers' ResNet that change what it computes -> the value that ours has.
RESNET_SETTINGS = {
    "downsample_in_bottleneck": False,
    "downsample_in_first_stage": False,
    "hidden_act": "relu",
    "num_channels": 3,
}


def check_variant(path: Path, architecture: str, style: str, height: int, width: int) -> None:
    """Raises WrongCheckpoint; the message continues a sentence."""
    if style == "timm" and architecture == "vgg16":
        largest = VGG_STRIDE * (VGG_FEATURES + 1) - 1
        if max(height, width) > largest:
            raise WrongCheckpoint(
                f"is of timm, whose VGG computes larger images in another way; the input must be "
                f"at most {largest}x{largest} pixels, not {height}x{width}"
            )
    if style == "transformers":
        _check_config(path.parent / CONFIG)


def _check_config(path: Path) -> None:
    settings = _read(path)
    for name, ours in RESNET_SETTINGS.items():
        if settings.get(name, ours) != ours:
            raise WrongCheckpoint(
                f"is of a variant that is none of ours: {CONFIG} beside it sets {name} to "
                f"{settings[name]!r}, ours has {ours!r}; export it as ONNX"
            )


def _read(path: Path) -> dict[str, Any]:
    """The settings; none if the file is missing or is something else."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        content = msgspec.json.decode(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    is_resnet = isinstance(content, dict) and content.get("model_type") == "resnet"
    return content if is_resnet else {}
