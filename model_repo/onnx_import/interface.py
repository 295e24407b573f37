"""The ends of an ONNX graph: the one image that goes in, and the scores that come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

from model_repo.onnx_import.errors import UnusableGraph

IMAGE_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.UINT8: "uint8",
}
NAMES = 6  # shown in a message

Size = int | None  # None: any


class ImageInput(NamedTuple):
    """The input of a classifier."""

    name: str
    dtype: str  # of numpy
    is_channels_last: bool  # [N, H, W, C], not [N, C, H, W]
    batch: Size
    height: Size
    width: Size
    channels: Size


def image_input(model: ModelProto, shape: tuple[int, int, int]) -> ImageInput:
    """Finds the image among the inputs, for images of `shape` (H, W, C). Raises UnusableGraph."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in constants]
    if len(inputs) != 1:
        listed = "; ".join(_described(each) for each in inputs[:NAMES])
        raise UnusableGraph(
            f"has {len(inputs)} inputs ({listed}); a classifier with one image as its input is "
            "needed"
        )
    (given,) = inputs
    sizes = sizes_of(given)
    kind = given.type.tensor_type.elem_type
    if len(sizes) != 4 or kind not in IMAGE_TYPES:
        raise UnusableGraph(
            f"takes {_described(given)}; an image [N, C, H, W] or [N, H, W, C] of "
            f"{', '.join(IMAGE_TYPES.values())} is needed"
        )
    last = _is_channels_last(sizes, shape[2])
    batch, *rest = sizes
    height, width, channels = rest if last else (rest[1], rest[2], rest[0])
    for name, size, own in zip(
        ("height", "width", "channels"), (height, width, channels), shape, strict=True
    ):
        if size not in (None, own):
            raise UnusableGraph(
                f"takes {_described(given)}, so input.{name} must be {size}, not {own}"
            )
    return ImageInput(given.name, IMAGE_TYPES[kind], last, batch, height, width, channels)


def _is_channels_last(sizes: Sequence[Size], channels: int) -> bool:
    """Where the channels are. If nothing tells, first, as PyTorch has them."""
    first, last = sizes[1], sizes[3]
    if (first == channels) != (last == channels):
        return last == channels
    return first is None and last in (1, 3)


def sizes_of(value: ValueInfoProto) -> list[Size]:
    """The dimensions; None for one that is not fixed."""
    return [
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
        for dim in value.type.tensor_type.shape.dim
    ]


def _described(value: ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    try:
        name = onnx.helper.tensor_dtype_to_np_dtype(kind).name
    except KeyError:
        name = "a value that is no tensor"
    sizes = ", ".join("?" if size is None else str(size) for size in sizes_of(value))
    return f"{value.name!r}: {name} [{sizes}]"


def choose_output(
    shapes: Sequence[tuple[str, tuple[int, ...]]], classes: int, rows: int, wanted: str
) -> tuple[str, int]:
    """The output with the scores of the classes, and how many scores it has for an image.

    `shapes` are those of a trial with `rows` images. Raises UnusableGraph.
    """
    listed = "; ".join(f"{name!r}: {list(shape)}" for name, shape in shapes[:NAMES])
    if wanted:
        shapes = [(name, shape) for name, shape in shapes if name == wanted]
        if not shapes:
            raise UnusableGraph(f"has no output {wanted!r}; its outputs are {listed}")
    widths = {name: width for name, shape in shapes if (width := _width(shape, rows))}
    # A sigmoid for two classes may have one score: that of the second class.
    fitting = [name for name, width in widths.items() if width == classes]
    fitting = fitting or [name for name, width in widths.items() if (width, classes) == (1, 2)]
    if len(fitting) == 1:
        return fitting[0], widths[fitting[0]]
    if fitting:
        raise UnusableGraph(
            f"has several outputs for {classes} classes ({', '.join(map(repr, fitting))}); choose "
            f'one in the card: output = "{fitting[0]}"'
        )
    if len(widths) == 1:
        ((name, width),) = widths.items()
        raise UnusableGraph(
            f"has {width} classes (output {name!r}), but the labels name {classes}; give a label "
            f"file with {width} names in the order of the training"
        )
    raise UnusableGraph(
        f"is not a classifier: no output is [N, {classes}], as many scores as the labels name; its "
        f"outputs are {listed} for {rows} images"
    )


def _width(shape: tuple[int, ...], rows: int) -> int:
    """The scores of an image; 0 if the output has another meaning."""
    sizes = [size for size in shape[1:] if size != 1]
    if len(shape) < 2 or shape[0] != rows or len(sizes) > 1:
        return 0
    return sizes[0] if sizes else 1
