"""Quantises an OpenVINO model with NNCF (github.com/openvinotoolkit/nncf).

Weights are per channel and symmetric. Every layer gets NNCF's overflow fix: weights use half of the
8-bit range. Without it, processors that lack VNNI add products of u8 x s8 in 16 bits, which
saturate, and an engine would answer differently on two machines.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.images.input_spec import Pixels

LAYERS = ("Convolution", "GroupConvolution", "MatMul")
QUANTIZE = "FakeQuantize"
EIGHT_BITS = ("i8", "u8")

# From the numbers of check images and the classes that were found for them to an accuracy.
Validate = Callable[[Sequence[int], NDArray[np.int64]], float]


def quantized(model: Any, calibration: Pixels) -> Any:
    """The model with 8-bit layers, calibrated with [N, H, W, C] pixels."""
    import nncf

    with _quiet(nncf):
        return nncf.quantize(
            model,
            nncf.Dataset([row[np.newaxis] for row in calibration]),
            preset=nncf.QuantizationPreset.MIXED,  # asymmetric activations: not all are ReLU
            subset_size=len(calibration),
            advanced_parameters=_advanced(nncf),
        )


def quantized_within(
    model: Any, calibration: Pixels, check: Pixels, validate: Validate, max_drop: float
) -> Any:
    """As `quantized`, but returns layers to float32 until `validate` drops by `max_drop` at most.

    Tries one layer after another, so it takes many times as long.
    """
    import nncf

    def validation(compiled: Any, items: Any) -> float:
        numbers, classes = [], []
        for number, row in items:  # NNCF ranks the layers with a part of the images
            numbers.append(number)
            classes.append(compiled(row)["classes"][0, 0])
        return validate(numbers, np.array(classes, np.int64))

    numbered = [(number, row[np.newaxis]) for number, row in enumerate(check)]

    with _quiet(nncf):
        return nncf.quantize_with_accuracy_control(
            model,
            calibration_dataset=nncf.Dataset([row[np.newaxis] for row in calibration]),
            validation_dataset=nncf.Dataset(numbered, lambda item: item[1]),
            validation_fn=validation,
            max_drop=max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
            advanced_quantization_parameters=_advanced(nncf),
        )


def float_layers(model: Any) -> tuple[str, ...]:
    """The layers that compute in floating point."""
    return tuple(
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() in LAYERS and not _is_quantized(operation)
    )


def _is_quantized(operation: Any) -> bool:
    """Whether the layer's weights have 8 bits."""
    node = operation.input_value(1).get_node()
    while node.inputs():  # conversions, scales and reshapes between the weights and the layer
        if node.get_type_name() == QUANTIZE:
            return True
        node = node.input_value(0).get_node()
    return str(node.get_element_type().get_type_name()) in EIGHT_BITS


def _advanced(nncf: Any) -> Any:
    return nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)


@contextmanager
def _quiet(nncf: Any) -> Iterator[None]:
    """Hides NNCF's progress bars and messages."""
    nncf.set_log_level(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield
