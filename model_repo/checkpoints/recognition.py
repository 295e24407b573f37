"""Recognises the network that a checkpoint belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence

from model_repo.architectures.registry import architecture_names
from model_repo.checkpoints.fitting import Fit, best_fit
from model_repo.checkpoints.names import unwrapped
from model_repo.checkpoints.states import StateDict

ALIKE = 0.95  # likeness from which a checkpoint belongs to a network
VARIANT = 0.3  # likeness from which it is a variant of a network; the differences say which
MAX_NAMES = 3

# Networks that people use often and that are none of ours: a name of a parameter -> family.
FAMILIES = (
    (r"(^|\.)cls_token$|\.attn\.qkv\.|vit\.encoder\.|encoder_layer_\d+\.", "a vision transformer"),
    (r"relative_position_bias_table$", "a Swin transformer"),
    (r"denseblock\d+\.denselayer\d+", "a DenseNet"),
    (
        r"features\.\d+\.(\d+\.)?(block|conv)\.\d+\.|blocks\.\d+\.\d+\.conv_pw",
        "a MobileNet or EfficientNet",
    ),
    (r"_blocks\.\d+\._|conv_stem\.|_conv_stem\.", "an EfficientNet"),
    (r"Mixed_\d[a-e]\.|Conv2d_1a_3x3", "an Inception network of version 3 or later"),
    (r"stages\.\d+\.blocks\.\d+\.(gamma|conv_dw)|\.layer_scale$", "a ConvNeXt"),
    (r"(^|\.)features\.\d+\.running_mean$", "a VGG with batch norms"),
    (r"fire\d+\.|features\.\d+\.expand1x1\.", "a SqueezeNet"),
    (r"branch[12]\.\d+\.weight$|stage[234]\.\d+\.branch", "a ShuffleNet"),
    (r"layer\d\.\d+\.se\.|\.se\.fc\d", "a network with squeeze-and-excitation blocks"),
    (r"(^|\.)conv1\.0\.weight$", "a ResNet with another stem (timm's variant d)"),
    (r"(^|\.)model\.\d+\.cv\d\.", "a YOLO network"),
    (r"\.(decoder|up\d|upsample)\.", "a network for segmentation"),
)


def recognise(states: Sequence[StateDict]) -> Fit | None:
    """The best fit of all our networks. None if the checkpoint belongs to none of them."""
    found = best_of_ours(states)
    return found if found is not None and found.likeness >= ALIKE else None


def best_of_ours(states: Sequence[StateDict]) -> Fit | None:
    fits = [best_fit(states, name) for name in architecture_names()]
    return max((fit for fit in fits if fit is not None), key=lambda fit: fit.likeness, default=None)


def looks_like(states: Sequence[StateDict], wanted: str) -> str:
    """Which network the checkpoint seems to be, and what to do. Empty if it is the `wanted` one."""
    found = recognise(states)
    if found is not None:
        name = found.network.architecture
        if name == wanted:
            return ""
        classes = f" with {found.classes} classes" if found.classes else ""
        return f'it looks like {name}{classes}; use base = "{name}" (or --base {name})'
    largest = max(states, key=lambda state: len(state.tensors))
    names = [unwrapped(name) for name in largest.tensors]
    for pattern, family in FAMILIES:
        if any(re.search(pattern, name) for name in names):
            return (
                f"it looks like {family}, which is none of ours; export it as ONNX, or give its "
                "code as the architecture"
            )
    closest = best_of_ours(states)
    if closest is not None and closest.likeness >= VARIANT:
        name = closest.network.architecture
        return "" if name == wanted else f"it looks like a variant of {name}, but not like ours"
    return f"it looks like none of ours; its names begin with {', '.join(names[:MAX_NAMES])}"
