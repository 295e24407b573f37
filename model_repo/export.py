"""A network -> an ONNX file from pixels to answers: [N, H, W, C] uint8 in, top classes out.

Cast, normalisation, layout, softmax and top-k are part of the graph, so whoever runs it does no
work of his own on a pixel or a class. Everything but the batch has a fixed size.
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

TOP_K = 10
INPUT = "pixels"
OUTPUTS = ("classes", "scores", "probabilities")


class ExportError(Exception):
    """The network can't be written as ONNX; the message says where it failed."""


class Served(nn.Module):
    """A network as it is served, around one that takes normalised [N, C, H, W] and gives logits.

    `mean` and `std` have a number a channel, for pixels on the scale 0 to 1.
    """

    scale: Tensor
    offset: Tensor

    def __init__(
        self, network: nn.Module, *, classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.network = network
        self.top_k = min(TOP_K, classes)
        # (x / 255 - mean) / std as one multiplication and one addition, folded in double precision
        deviations = torch.tensor(std, dtype=torch.float64)
        means = torch.tensor(mean, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * deviations)).float())
        self.register_buffer("offset", (-means / deviations).float())
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, H, W, C] uint8 -> classes int32 [N, K], scores [N, K], probabilities [N, classes].

        Classes are best first, scores are their probabilities, K is min(10, classes).
        """
        x = pixels.float()  # first: TensorRT moves no bytes about
        # A line of pixels at a time, as OpenVINO's loop is over the last dimension alone: over one
        # or three channels it took 12 and 6 ns a value.
        columns = x.shape[2]
        x = x.flatten(2) * self.scale.repeat(columns) + self.offset.repeat(columns)
        x = x.reshape(-1, *pixels.shape[1:])
        # Contiguous, or the layout of what follows is channels-last, which makes a global average
        # pool trace as index arithmetic.
        x = x.permute(0, 3, 1, 2).contiguous()
        probabilities = torch.softmax(self.network(x), dim=1)
        scores, classes = torch.topk(probabilities, self.top_k)
        return classes.int(), scores, probabilities


class _Narrowing(nn.Module):
    """Runs a network in a number format and a layout, whatever its input has."""

    def __init__(self, network: nn.Module, kind: torch.dtype, layout: torch.memory_format) -> None:
        super().__init__()
        self.network = network
        self.kind = kind
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.kind).contiguous(memory_format=self.layout)
        out: Tensor = self.network(x)
        return out


class _Widening(nn.Module):
    """Runs a layer in float32, whatever format its input has."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.float())
        return out


def traced(
    served: Served,
    shape: tuple[int, int, int],
    max_batch: int,
    precision: str,
    device: str,
    usual: int = 2,
) -> torch.export.ExportedProgram:
    """The network on a device ("cpu", "cuda") in "fp32", "bf16" or "fp16", for 1 to `max_batch`
    rows of `shape` (H, W, C); who compiles it takes `usual` rows, 2 or more, for the usual batch.

    Its last layer, softmax and what normalises the pixels stay float32, as in
    server.engines.onnx_precision; local response normalisations are what PyTorch makes of them.
    """
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    copied = copy.deepcopy(served)
    network = copied.network
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    layer = network.get_submodule(last)
    parent, _, leaf = last.rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())  # it is not rounded with the rest
    # Of one channel both layouts are the same numbers; what inductor makes of such an input said to
    # be channels last is wrong once it freezes the weights (torch 2.13, any convolution).
    layout = torch.channels_last if shape[2] > 1 else torch.contiguous_format
    to_layout: Any = {"memory_format": layout}  # torch's types don't know it
    network.to(kind).to(**to_layout)
    setattr(network.get_submodule(parent), leaf, _Widening(layer))
    copied.network = _Narrowing(network, kind, layout)
    copied.to(device)
    example = torch.zeros(usual, *shape, dtype=torch.uint8, device=device)
    rows = torch.export.Dim("rows", min=1, max=max(2, max_batch))
    with torch.no_grad():
        return torch.export.export(copied, (example,), dynamic_shapes=({0: rows},))


class OnnxLocalResponseNorm(nn.Module):
    """ONNX's own operator for one that PyTorch makes of nine, the pooling in three dimensions.

    For tracing only: it computes nothing. OpenVINO runs the nine eleven times slower than the one
    (measured at AlexNet's first: 8.2 ms an image against 0.75 ms, one core).
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


def export(served: Served, path: Path, *, shape: tuple[int, int, int], max_batch: int) -> None:
    """Writes the network for rows of `shape` (H, W, C), 1 to `max_batch` of them at once.

    The file holds its weights: one file, below protobuf's 2 GiB. Raises ExportError.
    """
    example = torch.zeros(2, *shape, dtype=torch.uint8)  # of 1 row, the 1 would become a constant
    rows = torch.export.Dim("rows", min=1, max=max(2, max_batch))
    try:
        with _quiet(), _onnx_operators(served):
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
            node.metadata_props.clear()  # stack traces, with the paths of this machine
        program.save(path, external_data=False)
        onnx.checker.check_model(path)
    except (RuntimeError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _onnx_operators(served: Served) -> Iterator[None]:
    """Meanwhile, what ONNX has an operator for and PyTorch has not is traced as that operator."""
    replaced = [
        (parent, name, child)
        for parent in served.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.LocalResponseNorm)
    ]
    try:
        for parent, name, child in replaced:
            setattr(parent, name, OnnxLocalResponseNorm(child))
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the console what torch.onnx says of optional libraries and its own future."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        log.setLevel(level)
