"""Exports a network as an ONNX file: [N, H, W, C] uint8 pixels in, top classes out.

The graph also does the cast, normalisation, layout, softmax and top-k, so the server runs no code
per pixel or class. Every dimension but the batch has a fixed size.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from model_repo.onnx_import.network import OnnxNetwork
from model_repo.programs.graph import Placeholder, insert_graph, insert_program, opset_of
from server.repository.manifest import Activation

INPUT = "pixels"
OUTPUTS = ("classes", "scores", "probabilities")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ExportError(Exception):
    """The network cannot be exported. The message says where it failed."""


class ServedNetwork(nn.Module):
    """A network with its pre- and post-processing: from pixels to the top classes.

    `network` takes normalised [N, C, H, W] and returns logits. `mean` and `std` hold one number for
    each channel, for pixels on the scale 0 to 1. With `reverse`, the network takes blue, green, red
    and so do `mean` and `std`; pixels are always red, green, blue.
    """

    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        top_k: int,
        activation: Activation = "softmax",
        reverse: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.top_k = top_k
        self.activation = activation
        self.reverse = reverse
        # (x / 255 - mean) / std becomes x * scale + offset, computed here in double precision.
        # Pixels are normalised before their channels change places.
        order = -1 if reverse else 1
        deviations = torch.tensor(std[::order], dtype=torch.float64)
        means = torch.tensor(mean[::order], dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * deviations)).float())
        self.register_buffer("offset", (-means / deviations).float())
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, H, W, C] uint8 -> classes int32 [N, K], scores [N, K], probabilities [N, classes].

        Best class first; scores are the probabilities of these classes.
        """
        x = pixels.float()  # the first operation, because TensorRT cannot reshape bytes
        # Normalises a whole line of pixels at a time. OpenVINO vectorises the last dimension only:
        # with one or three channels there, it took 12 or 6 ns for each value.
        columns = x.shape[2]
        x = x.flatten(2) * self.scale.repeat(columns) + self.offset.repeat(columns)
        x = x.reshape(-1, *pixels.shape[1:])
        # Without `contiguous` the layout would be channels-last, and a global average pool would be
        # traced as index arithmetic.
        x = x.permute(0, 3, 1, 2).contiguous()
        if self.reverse:
            x = torch.cat((x[:, 2:3], x[:, 1:2], x[:, 0:1]), dim=1)
        logits = self.network(x)
        softmax = self.activation == "softmax"
        probabilities = torch.softmax(logits, dim=1) if softmax else torch.sigmoid(logits)
        scores, classes = torch.topk(probabilities, self.top_k)
        return classes.int(), scores, probabilities


class _InPrecision(nn.Module):
    """Converts the input to the network's number format and memory layout."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype).contiguous(memory_format=self.layout)
        out: Tensor = self.network(x)
        return out


class _InFloat32(nn.Module):
    """Converts the input of a layer to float32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.float())
        return out


def trace(
    served: ServedNetwork,
    shape: tuple[int, int, int],
    max_batch: int,
    precision: str,
    device: str,
    opt_batch: int = 2,
) -> torch.export.ExportedProgram:
    """Traces the network in "fp32", "bf16" or "fp16" on a device ("cpu", "cuda").

    The program takes 1 to `max_batch` rows of `shape` (H, W, C). Compilers tune it for `opt_batch`
    rows, 2 or more. The last layer, softmax and the normalisation stay float32, as in
    server.engines.onnx_precision. Local response normalisation stays PyTorch's own operators.
    """
    dtype = DTYPES[precision]
    copied = copy.deepcopy(served)
    network = copied.network
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    layer = network.get_submodule(last)
    parent, _, leaf = last.rpartition(".")
    # The last layer is taken out while the others are converted.
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    # With one channel both layouts hold the same numbers. If such an input is marked channels-last,
    # inductor computes wrong results once it freezes the weights (torch 2.13, any convolution).
    layout = torch.channels_last if shape[2] > 1 else torch.contiguous_format
    to_layout: Any = {"memory_format": layout}  # torch's type hints lack this argument
    network.to(dtype).to(**to_layout)
    setattr(network.get_submodule(parent), leaf, _InFloat32(layer))
    copied.network = _InPrecision(network, dtype, layout)
    copied.to(device)
    example = torch.zeros(opt_batch, *shape, dtype=torch.uint8, device=device)
    rows = torch.export.Dim("rows", min=1, max=max(2, max_batch))
    with torch.no_grad():
        return torch.export.export(copied, (example,), dynamic_shapes=({0: rows},))


class OnnxLocalResponseNorm(nn.Module):
    """Traces local response normalisation as one ONNX operator, instead of nine from PyTorch.

    For tracing only: it computes nothing. Among the nine is a three-dimensional pool, and OpenVINO
    runs them eleven times slower than the one operator (measured at AlexNet's first: 8.2 ms an
    image against 0.75 ms, one core).
    """

    def __init__(self, norm: nn.LocalResponseNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        norm = self.norm
        out: Tensor = torch.onnx.ops.symbolic(
            "LRN",
            (x,),
            attrs={
                "size": norm.size,
                "alpha": norm.alpha,
                "beta": norm.beta,
                "bias": float(norm.k),
            },
            dtype=x.dtype,
            shape=x.shape,
        )
        return out


def export(
    served: ServedNetwork, path: Path, *, shape: tuple[int, int, int], max_batch: int
) -> None:
    """Writes the network as ONNX, for 1 to `max_batch` rows of `shape` (H, W, C).

    The weights are inside the file, so it must stay below protobuf's 2 GiB. Raises ExportError.
    """
    example = torch.zeros(2, *shape, dtype=torch.uint8)  # a batch of 1 would become a constant
    rows = torch.export.Dim("rows", min=1, max=max(2, max_batch))
    try:
        with _without_exporter_messages(), _onnx_operators(served, shape):
            traced = torch.export.export(served, (example,), dynamic_shapes=({0: rows},))
            program = torch.onnx.export(
                traced,
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes=({0: rows},),
            )
        assert program is not None, "None only without dynamo"
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, which contain paths of this machine
        program.save(path, external_data=False)
        if isinstance(served.network, torch.jit.ScriptModule):
            insert_program(path, served.network, shape)
        elif isinstance(served.network, OnnxNetwork):
            insert_graph(path, served.network.graph(opset_of(onnx.load_model(path))))
        onnx.checker.check_model(path)
    except (RuntimeError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _onnx_operators(served: ServedNetwork, shape: tuple[int, int, int]) -> Iterator[None]:
    """Replaces modules that ONNX has an operator for but PyTorch does not; restores them after.

    A TorchScript program and an ONNX file are replaced as a whole.
    """
    replaced: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    if isinstance(served.network, torch.jit.ScriptModule | OnnxNetwork):
        program = served.network
        replaced.append((served, "network", program, Placeholder(program, shape)))
    else:
        replaced += [
            (parent, name, child, OnnxLocalResponseNorm(child))
            for parent in served.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.LocalResponseNorm)
        ]
    try:
        for parent, name, _, other in replaced:
            setattr(parent, name, other)
        yield
    finally:
        for parent, name, child, _ in replaced:
            setattr(parent, name, child)


@contextmanager
def _without_exporter_messages() -> Iterator[None]:
    """Hides torch.onnx's messages about optional libraries and planned changes."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        log.setLevel(level)
