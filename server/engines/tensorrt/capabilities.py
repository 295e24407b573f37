"""GPU compute capabilities, such as "sm89": which ones an engine is compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.engines.tensorrt.cuda import Gpu
from server.errors import EngineFailure

# The default on a machine without a GPU: Ampere and later, all that TensorRT-RTX supports.
# (Turing, sm75, has no bf16, so it must be requested.)
PORTABLE = ("sm80", "sm86", "sm89", "sm120", "sm121")


def target_capabilities(
    trt: Any, variant: str, requested: Sequence[str], gpu: Gpu | None
) -> tuple[str, ...]:
    """The capabilities to compile for: those requested, or this GPU's, or PORTABLE.

    Raises EngineFailure.
    """
    if variant == "tensorrt":
        return _this_gpu_only(requested, gpu)
    known = _known(trt)
    if requested:
        names = tuple(sorted(set(map(_normalized, requested)), key=lambda name: (len(name), name)))
        if unknown := [name for name in names if name not in known]:
            raise EngineFailure(
                f"TensorRT-RTX {trt.__version__} does not support compute capability "
                f"{', '.join(unknown)}; it supports {', '.join(known)}"
            )
        return names
    if gpu is not None:
        return (gpu.capability,)
    return tuple(name for name in PORTABLE if name in known)


def short_name(trt: Any, capabilities: Sequence[str]) -> str:
    """For a file name: "sm89", "sm75-120", or the ends of a range without gaps, "sm80-121"."""
    if len(capabilities) > 2 and list(capabilities) == [
        name
        for name in _known(trt)
        if _number(capabilities[0]) <= _number(name) <= _number(capabilities[-1])
    ]:
        capabilities = (capabilities[0], capabilities[-1])
    return "-".join([capabilities[0], *(name.removeprefix("sm") for name in capabilities[1:])])


def _this_gpu_only(requested: Sequence[str], gpu: Gpu | None) -> tuple[str, ...]:
    if gpu is None:
        raise EngineFailure(
            "TensorRT compiles only on the GPU that will run the engine, and this machine has no "
            "GPU; --tensorrt-variant rtx compiles without one"
        )
    if requested and set(map(_normalized, requested)) != {gpu.capability}:
        raise EngineFailure(
            f"TensorRT can't compile for {', '.join(requested)}, only for the GPU of this machine, "
            f"which is {gpu.capability}"
        )
    return (gpu.capability,)


def _known(trt: Any) -> list[str]:
    """The capabilities that this TensorRT-RTX supports, in ascending order."""
    numbers = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return [f"sm{number}" for number in sorted(numbers, key=int)]


def _number(capability: str) -> int:
    return int(capability.removeprefix("sm"))


def _normalized(text: str) -> str:
    """ "8.9", "89" and "sm89" all become "sm89"."""
    return f"sm{text.lower().removeprefix('sm').replace('.', '').replace('_', '')}"
