"""Inputs of the Open Inference Protocol as the content of a request."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from server.api.content import Content, check_count
from server.api.decode_time import Data
from server.api.decoders import Decoders
from server.api.in_flight import InFlightLimits
from server.api.v2.shared_memory import CallWindows, SharedData
from server.api.v2.tensors import (
    ENCODED,
    INPUTS,
    REGION,
    InputTensor,
    RawData,
    TensorData,
    dimensions,
    input_to_classify,
    refuse_parameters,
)
from server.api.v2.versions import MAX_QUOTED
from server.engines.base import RowSource
from server.errors import InvalidInput
from server.images.input_spec import InputSpec, Pixels
from server.models.version import LoadedModel
from server.security.principal import Principal

SHOWN_DIMENSIONS = 8  # of a shape in an error


class TensorContent(Content):
    """The input tensors of one request, of which one is classified."""

    __slots__ = (
        "_data",
        "_in_flight",
        "_inputs",
        "_position",
        "_principal",
        "_raw_contents",
        "_windows",
    )

    def __init__(
        self,
        inputs: Sequence[InputTensor],
        raw_contents: Sequence[bytes],
        windows: CallWindows,
        in_flight: InFlightLimits,
        principal: Principal,
    ) -> None:
        self._inputs = inputs
        self._raw_contents = raw_contents
        self._windows = windows
        self._in_flight = in_flight
        self._principal = principal
        self._position = 0  # of the input to classify
        self._data: TensorData | None = None  # of that input, once the model is known

    @property
    def ignored(self) -> str:
        """Name of the input that is not classified; empty if there is only one."""
        return self._inputs[1 - self._position].name if len(self._inputs) > 1 else ""

    def count(self, model: LoadedModel, max_images: int) -> int:
        position = self._position = input_to_classify([tensor.name for tensor in self._inputs])
        tensor, field = self._inputs[position], f"inputs[{position}]"
        refuse_parameters(f"{field}.parameters", tensor.parameters)
        needed = INPUTS[tensor.name]
        if tensor.datatype != needed:
            given = repr(tensor.datatype[:MAX_QUOTED])
            raise _mismatch(tensor, f"{field}.datatype", given, needed)
        row = dimensions(model)[tensor.name]
        allowed = (row, ()) if tensor.name == ENCODED else (row,)
        if not tensor.shape or tensor.shape[1:] not in allowed:
            needed = " or ".join(
                f"[{', '.join(map(str, ('images', *sizes)))}]" for sizes in reversed(allowed)
            )
            raise _mismatch(tensor, f"{field}.shape", _shortened(tensor.shape), needed)
        check_count(f"{field}.shape[0]", tensor.shape[0], max_images)
        self._data = self._find_data(position)
        return tensor.shape[0]

    def thread_work(self, spec: InputSpec) -> Sequence[Data]:
        tensor, data = self._inputs[self._position], self._data
        assert data is not None, "the request is checked before its pixels are made"
        return data.thread_work(is_encoded=tensor.name == ENCODED)

    def pixels(
        self, spec: InputSpec, decoders: Decoders
    ) -> Pixels | RowSource | Awaitable[Pixels | RowSource]:
        tensor, data = self._inputs[self._position], self._data
        assert data is not None, "the request is checked before its pixels are made"
        if tensor.name == ENCODED:
            return data.decode(tensor, spec, decoders)
        return data.pixels(tensor, spec, decoders)

    def _find_data(self, position: int) -> TensorData:
        """The data of the input at that position. Raises InvalidInput."""
        tensor = self._inputs[position]
        window = self._windows.open(f"inputs[{position}].parameters", tensor.parameters)
        if window is not None:
            if self._raw_contents or any(other.data is not None for other in self._inputs):
                self._raw_positions()  # checks that the data of all inputs is unambiguous
            return SharedData(window, self._in_flight, self._principal)
        if tensor.data is not None and not self._raw_contents:
            return tensor.data
        entry = self._raw_positions().index(position)
        return RawData(f"raw_input_contents[{entry}]", self._raw_contents[entry])

    def _raw_positions(self) -> list[int]:
        """The positions of the inputs whose data is in the raw contents, in their order.

        Each input's data is in one place, and raw contents exclude other data. The input that is
        not classified is checked too, because entries are matched by position. Raises
        InvalidInput.
        """
        raw = len(self._raw_contents)
        positions = []
        for index, tensor in enumerate(self._inputs):
            is_shared = REGION in tensor.parameters
            if tensor.data is not None and (is_shared or raw):
                field = f"inputs[{index}].parameters[{REGION}]"
                raise InvalidInput(
                    field if is_shared else "raw_input_contents",
                    f"is given, and the {tensor.data.NOUN} of {tensor.name!r} too; "
                    "give one of them",
                )
            if not is_shared and tensor.data is None:
                positions.append(index)
        if raw == len(positions):
            return positions
        names = " and ".join(repr(self._inputs[index].name) for index in positions)
        needed = (
            "none is needed, all data is in shared memory",
            f"one is needed, for {names}",
            f"two are needed, for {names}",
        )[len(positions)]
        raise InvalidInput("raw_input_contents", f"has {raw} entries; {needed}")


def _mismatch(tensor: InputTensor, field: str, given: str, needed: str) -> InvalidInput:
    return InvalidInput(field, f"of {tensor.name!r} is {given}; {needed} is needed")


def _shortened(shape: Sequence[int]) -> str:
    """A shape for an error, however long it is."""
    first = ", ".join(map(str, shape[:SHOWN_DIMENSIONS]))
    return f"[{first}{', ...' if len(shape) > SHOWN_DIMENSIONS else ''}]"
