"""Where parameters come from.

    file:PATH      a checkpoint: .pth or .pt (tensors only, no code of theirs runs), .safetensors
    https://...    the same, fetched once and kept; its sha256 is in the address, see download.py
    file://...     the same from a disk
    digits         trained here, on handwritten digits
    random:SEED    drawn: the classes mean nothing

A checkpoint holds exactly the network's parameters and buffers by name, or exactly those of the
network in training. Counters of batches may be absent, as they are in old checkpoints.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from model_repo import architectures, digits
from model_repo.cards import Card
from model_repo.download import Patience, Progress, fetch, public, sha256_of
from model_repo.download import WeightsError as WeightsError
from model_repo.download import WeightsUnavailable as WeightsUnavailable
from model_repo.download import WrongHash as WrongHash

SOURCES = "file:PATH, https://..., file://..., digits or random:SEED"
SHOWN = 3  # names of each kind in the message about a checkpoint that does not fit
COUNTER = ".num_batches_tracked"
RESIDUAL = 0.25  # scale of what an untrained residual block adds to its input
SPREAD = 2.0  # standard deviation of an untrained network's logits over its classes


class WrongCheckpoint(WeightsError):
    """The file is no checkpoint, or one of another network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A network with its parameters, in eval mode, and where they came from."""

    network: nn.Module
    source: str  # as it was given, without what may be secret in an address
    sha256: str  # of the checkpoint's bytes, or of the parameters where there was none
    trained: bool
    note: str = ""  # what is known of them, for example their accuracy


def cache_folder() -> Path:
    """Where fetched checkpoints are kept: $CONVSERVE_CACHE, or a folder of the user's."""
    chosen = os.environ.get("CONVSERVE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "convserve" / "weights"


def load(
    card: Card,
    source: str | None = None,
    *,
    calibration: Tensor | None = None,
    cache: Path | None = None,
    patience: Patience = Patience(),  # noqa: B008 (it is frozen)
    progress: Progress | None = None,
) -> Weights:
    """The card's network with parameters from `source`, by default the card's own.

    `calibration`, [N, C, H, W] normalised as the card says, shows an untrained network what
    pictures look like. `progress` counts bytes or epochs. Raises WeightsUnavailable where going on
    untrained may help, WeightsError for anything else.
    """
    source = source or card.weights
    kind, _, rest = source.partition(":")
    if source == "digits":
        return _on_digits(card, progress)
    if kind == "random":
        return _random(card, source, calibration)
    if kind in ("https", "http", "file") and rest.startswith("//"):
        path = fetch(source, cache or cache_folder(), patience, progress)
        return _from_file(card, public(source), path)
    if kind == "file" and rest:
        path = Path(rest).expanduser()
        if not path.is_file():
            raise WeightsUnavailable(f"there is no file {path}")
        return _from_file(card, source, path)
    raise WeightsError(f"weights {source!r} are unknown; there are {SOURCES}")


def _on_digits(card: Card, progress: Progress | None) -> Weights:
    if card.input.channels != 1 or card.classes != 10:
        raise WeightsError(
            f"digits are grey and of 10 classes; {card.name} takes {card.input.channels} channels "
            f"and has {card.classes} classes"
        )
    network = architectures.create(card.architecture, card.classes)
    result = digits.train(network, card.input, card.mean[0], card.std[0], progress)
    return Weights(
        network=network,
        source="digits",
        sha256=_parameter_hash(network),
        trained=True,
        note=f"{result.accuracy:.2%} of {result.held_out} held-out digits",
    )


def _from_file(card: Card, source: str, path: Path) -> Weights:
    digest = sha256_of(path)
    state = _read(path)
    network = _empty(card)
    try:
        network.load_state_dict(_fitting(card, state), assign=True)
    except WrongCheckpoint as error:
        raise WrongCheckpoint(f"{source}: {error}") from None
    return Weights(network=network.eval(), source=source, sha256=digest, trained=True)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix.lower() == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise whatever they come upon in a damaged file
        reason = (str(error).splitlines() or [""])[0][:200]
        raise WrongCheckpoint(
            f"{path} can't be read as a checkpoint: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and _is_plain(value)
        for name, value in content.items()
    ):
        raise WrongCheckpoint(
            f"{path} must hold real tensors by name, as `state_dict()` gives them"
        )
    return dict(content)


def _fitting(card: Card, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The served network's part of a checkpoint. Raises WrongCheckpoint where anything is amiss."""
    training_only = architectures.find(card.architecture).training_only
    whole = any(name.startswith(training_only) for name in state)
    expected = _empty(card, auxiliary=whole).state_dict()
    for name in expected.keys() - state.keys():
        if name.endswith(COUNTER):
            state[name] = torch.zeros((), dtype=torch.int64)
    shapes = [
        f"{name} {list(state[name].shape)} for {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    wrong = [
        f"{len(found)} {what} ({', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''})"
        for what, found in (
            ("missing", [name for name in expected if name not in state]),
            ("unknown", [name for name in state if name not in expected]),
            ("of another shape", shapes),
            (
                "with numbers that are not finite",
                [n for n, t in state.items() if not t.isfinite().all()],
            ),
        )
        if found
    ]
    if wrong:
        raise WrongCheckpoint(
            f"does not fit {card.architecture} with {card.classes} classes: {'; '.join(wrong)}"
        )
    return {
        name: state[name].to(tensor.dtype).contiguous()
        for name, tensor in expected.items()
        if not name.startswith(training_only)
    }


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_complex() and not tensor.is_quantized


def _random(card: Card, source: str, calibration: Tensor | None) -> Weights:
    seed = source.removeprefix("random:")
    if not (seed.isascii() and seed.isdigit() and int(seed) < 1 << 63):
        raise WeightsError(f"random: needs a whole number as its seed, not {seed!r}")
    network = _empty(card).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(int(seed))
    _draw(network, generator)
    _calibrate(network, _noise(card, generator) if calibration is None else calibration)
    return Weights(network=network, source=source, sha256=_parameter_hash(network), trained=False)


@torch.no_grad()
def _draw(network: nn.Module, generator: torch.Generator) -> None:
    """He et al., "Delving deep into rectifiers", 2015: ReLUs leave activations their size.

    What a residual block adds begins small, as in Goyal et al., "Accurate, large minibatch SGD",
    2017 (there at 0): the untrained network is then as calm as a trained one. At full size rounding
    to bf16 takes an answer of ResNet-101 84 % of the way to another image's, at RESIDUAL 9 %.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            inputs = module.weight[0].numel()
            module.weight.normal_(0, math.sqrt(2 / inputs), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    for block in network.modules():
        if hasattr(block, "downsample"):
            *_, last = (layer for layer in block.children() if isinstance(layer, nn.BatchNorm2d))
            last.weight.fill_(RESIDUAL)


@torch.no_grad()
def _calibrate(network: nn.Module, images: Tensor) -> None:
    """Measures what batch norm divides by, and makes the logits differ by about SPREAD.

    With statistics of 0 and 1 activations would double from block to block, and a comparison of two
    engines' answers would be one of overflows.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a plain average over what it sees
        norm.train()
    logits: Tensor = network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    last.weight.mul_(SPREAD / logits.std(dim=1).mean())


def _noise(card: Card, generator: torch.Generator) -> Tensor:
    """Four cloudy pictures, for want of photographs."""
    height, width, channels = card.input.shape
    coarse = torch.randn(4, channels, 16, 16, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bilinear")


def _empty(card: Card, *, auxiliary: bool = False) -> nn.Module:
    """The network without memory for its parameters."""
    with torch.device("meta"):
        return architectures.create(card.architecture, card.classes, auxiliary=auxiliary)


def _parameter_hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
