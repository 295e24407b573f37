"""Loads a network's parameters from one of these sources:

    PATH           a checkpoint of torch.save or safetensors; code in the file does not run
    file:PATH      the same; needed if the path has neither a dot nor a slash
    https://...    a checkpoint that is downloaded once; the URL holds its sha256, see
                   model_repo.checkpoints.download
    file://...     the same, copied from a local path
    digits         trained during the build, on handwritten digits
    random:SEED    random parameters: the predictions mean nothing

A checkpoint must hold all parameters and buffers of the network, in any of the usual wrappers and
under the names of torchvision, timm or transformers: see model_repo.checkpoints.fitting. Batch
counters may be missing, because old checkpoints do not have them.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_repo import digits
from model_repo.architectures.registry import create
from model_repo.card_files.sources import is_path
from model_repo.cards import Card
from model_repo.checkpoints.download import (
    DownloadRetries,
    Progress,
    WeightsError,
    WeightsUnavailable,
    fetch,
    redacted,
)
from model_repo.checkpoints.parameters import (
    Parameters,
    checked_states,
    fitted_parameters,
    network_parameters,
)
from model_repo.checkpoints.reader import WrongCheckpoint
from model_repo.checkpoints.shards import content_sha256
from model_repo.checkpoints.variants import check_variant
from model_repo.onnx_import.network import OnnxNetwork
from model_repo.programs import torchscript, user_code
from model_repo.programs.torchscript import is_torchscript

SOURCES = "file:PATH, https://..., file://..., digits or random:SEED"
DEFAULT_CACHE = "~/.cache/convserve/weights"
MAX_NOTE = 1000  # characters
PYTHON = "python"  # the architecture of a network that a user's code makes
# Of an untrained network:
RESIDUAL_SCALE = 0.25  # initial size of a residual branch, relative to its input
LOGIT_STD = 2.0  # standard deviation of the logits over the classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A network with its parameters, in eval mode, and their origin."""

    network: nn.Module
    source: str  # as given, but without user and query of a URL
    sha256: str  # of the checkpoint file, or of the parameters if there is no file
    trained: bool
    note: str = ""  # more about them, for example their accuracy
    architecture: str = ""  # what the network is, if the card does not say it
    parameter_count: int = 0  # 0: those of `network`
    max_batch: int | None = None  # the largest that the network can compute; None: any


def cache_folder() -> Path | None:
    """The folder for downloaded checkpoints: $CONVSERVE_CACHE, or one in the user's home.

    None if neither is known: a container may run as a user id that has no name and no home.
    """
    try:
        return Path(os.environ.get("CONVSERVE_CACHE") or DEFAULT_CACHE).expanduser()
    except RuntimeError:
        return None


def load(
    card: Card,
    source: str | None = None,
    *,
    calibration: Tensor | None = None,
    allow_code: bool = False,
    cache: Path | None = None,
    retries: DownloadRetries = DownloadRetries(),  # noqa: B008 (it is frozen)
    progress: Progress | None = None,
) -> Weights:
    """The card's network with parameters from `source`; without one, from the card's own source.

    `calibration`, [N, C, H, W] normalised as the card says, sets the batch norms of an untrained
    network. `progress` counts bytes or epochs. With `allow_code`, TorchScript programs run. Raises
    WeightsUnavailable if untrained parameters could replace the missing ones, WeightsError for
    every other problem.
    """
    source = source or card.weights
    if is_path(source):
        source = f"file:{source}"
    kind, _, rest = source.partition(":")
    if _is_user_code(card) and not allow_code:
        raise WrongCheckpoint(f"{card.architecture} {user_code.REFUSAL}")
    if source == "digits":
        return _train_on_digits(card, progress)
    if kind == "random":
        return _random(card, source, calibration)
    if kind in ("https", "http", "file") and rest.startswith("//"):
        folder = cache or cache_folder()
        if folder is None:
            raise WeightsUnavailable(
                "downloaded weights cannot be stored: this user has no home folder; set "
                "CONVSERVE_CACHE to a folder that can be written"
            )
        path, shown = fetch(source, folder, retries, progress), redacted(source)
    elif kind == "file" and rest:
        path, shown = _existing_file(rest), source
    else:
        raise WeightsError(
            f"{source!r} is not a source of weights; use the path of a file, {SOURCES}"
        )
    try:
        if card.network_file is not None and card.network_file.suffix == ".onnx":
            return _from_onnx(card, shown, card.network_file)
        if _is_user_code(card):
            return _from_user_code(card, shown, path)
        if is_torchscript(path):
            return _from_program(card, shown, path, allow_code, calibration)
        return _from_checkpoint(card, shown, path)
    except WrongCheckpoint as error:
        raise WrongCheckpoint(f"{shown} {error}") from error.__cause__


def published_source(source: str) -> str:
    """A source for the manifest. Of a file only the name, because clients see it."""
    kind, _, rest = source.partition(":")
    return f"file:{Path(rest).name}" if kind == "file" else source


def _existing_file(name: str) -> Path:
    """The path of a checkpoint file. Raises WeightsUnavailable if it is missing, WeightsError."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise WeightsError(
            f"the home folder in {name!r} is unknown; give the full path of the checkpoint"
        ) from None
    if path.is_file():
        return path
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give the checkpoint file in it{_inside(path)}")
    if path.is_symlink() and not path.exists():
        raise WeightsUnavailable(
            f"{path} is a symbolic link to {os.readlink(path)}, which does not exist"
        )
    if path.exists():
        raise WeightsError(f"{path} is not a regular file")
    raise WeightsUnavailable(f"there is no file {path}")


def _inside(folder: Path) -> str:
    """The checkpoint in a folder, for a message. An index comes before its parts."""
    for pattern in ("*.index.json", "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt"):
        for path in sorted(folder.glob(pattern)):
            return f", for example {path}"
    return ""


def _train_on_digits(card: Card, progress: Progress | None) -> Weights:
    if card.input.channels != 1 or card.classes != 10:
        raise WeightsError(
            f"weights 'digits' need a network with 1 channel and 10 classes; {card.name} has "
            f"{card.input.channels} and {card.classes}"
        )
    network = _user_network(card) if _is_user_code(card) else create(card.architecture, 10)
    result = digits.train(network, card.input, card.mean[0], card.std[0], progress)
    return Weights(
        network=network,
        source="digits",
        sha256=_parameter_hash(network),
        trained=True,
        note=f"{result.accuracy:.2%} of {result.held_out} held-out digits",
    )


def _from_checkpoint(card: Card, source: str, path: Path) -> Weights:
    if card.network_file is not None:
        raise WrongCheckpoint(
            "is not a TorchScript program; name its architecture, or its base, and give this file "
            "as the weights"
        )
    parameters = network_parameters(path, card.architecture, _expected(card))
    check_variant(path, card.architecture, parameters.style, card.input.height, card.input.width)
    return Weights(
        network=_with_parameters(card, parameters),
        source=source,
        sha256=content_sha256(path),
        trained=True,
        note=f"{path.name}: {parameters.taken}"[:MAX_NOTE],
    )


def _from_onnx(card: Card, source: str, path: Path) -> Weights:
    network = OnnxNetwork(path, card.input.shape, card.classes, card.output)
    network.check_activation(card.activation)
    if network.image.dtype == "uint8" and (set(card.mean) != {0} or set(card.std) != {1 / 255}):
        raise WrongCheckpoint(
            "takes pixels as bytes and normalises them itself; write in the card's [input]: "
            f"mean = {[0] * card.input.channels}, std = {[1] * card.input.channels}, scale = 255"
        )
    return Weights(
        network=network,
        source=source,
        sha256=network.sha256,
        trained=True,
        note=f"{path.name}: {network.described()}"[:MAX_NOTE],
        architecture="onnx",
        parameter_count=network.parameter_count,
        max_batch=network.max_batch,
    )


def _is_user_code(card: Card) -> bool:
    return card.network_file is not None and card.network_file.suffix == ".py"


def _user_network(card: Card) -> nn.Module:
    """The network of the user's function, checked with two images."""
    try:
        network = user_code.make_network(card.architecture, card.classes)
        images = _noise_images(card, torch.Generator().manual_seed(0))
        answers = torchscript.logits(network, images)
        if answers.shape[1] != card.classes:
            raise WrongCheckpoint(
                f"gives {answers.shape[1]} scores, but the labels name {card.classes} classes"
            )
    except WrongCheckpoint as error:
        raise WeightsError(f"{card.architecture} {error}") from error
    return network


def _from_user_code(card: Card, source: str, path: Path) -> Weights:
    network = _user_network(card)
    taken = user_code.fill(network, path)
    return Weights(
        network=network,
        source=source,
        sha256=content_sha256(path),
        trained=True,
        note=f"{path.name}: {taken}"[:MAX_NOTE],
        architecture=PYTHON,
    )


def _from_program(
    card: Card, source: str, path: Path, allow_code: bool, images: Tensor | None
) -> Weights:
    """A whole network. If it computes the same as the card's architecture, that one is served."""
    if not allow_code:
        raise WrongCheckpoint(torchscript.REFUSAL)
    program = torchscript.load_program(path)
    if images is None:
        images = _noise_images(card, torch.Generator().manual_seed(0))
    answers = torchscript.logits(program, images, several=True)
    if answers.shape[1] != card.classes:
        raise WrongCheckpoint(f"has {answers.shape[1]} classes, but the labels name {card.classes}")
    network = _same_network(card, program, images, answers)
    if network is not None:
        note = f"a TorchScript program that computes the same as {card.architecture}"
    else:
        torchscript.logits(program, images)  # refuses several outputs
        note = "a TorchScript program, served as it is"
    return Weights(
        network=program if network is None else network,
        source=source,
        sha256=content_sha256(path),
        trained=True,
        note=f"{path.name}: {note}",
        architecture=card.architecture if network is not None else "torchscript",
    )


def _same_network(
    card: Card, program: nn.Module, images: Tensor, answers: Tensor
) -> nn.Module | None:
    """The card's architecture with the program's parameters, if it gives the same answers."""
    if card.network_file is not None:
        return None
    try:
        states = checked_states(program.state_dict())
        parameters = fitted_parameters(states, card.architecture, _expected(card))
    except WrongCheckpoint:
        return None
    network = _with_parameters(card, parameters)
    is_same = torchscript.is_same(torchscript.logits(network, images), answers)
    return network if is_same else None


def _expected(card: Card) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in _without_memory(card).state_dict().items()}


def _with_parameters(card: Card, parameters: Parameters) -> nn.Module:
    network = _without_memory(card)
    network.load_state_dict(parameters.tensors, assign=True)
    return network.eval()


def _random(card: Card, source: str, calibration: Tensor | None) -> Weights:
    seed = source.removeprefix("random:")
    if not (seed.isascii() and seed.isdigit() and int(seed) < 1 << 63):
        raise WeightsError(f"random: needs a whole number below 2**63 as its seed, not {seed!r}")
    if _is_user_code(card):
        network = _user_network(card)  # with the parameters that the code gives it
        digest = _parameter_hash(network)
        return Weights(
            network=network, source=source, sha256=digest, trained=False, architecture=PYTHON
        )
    network = _without_memory(card).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(int(seed))
    _initialise(network, generator)
    _calibrate(network, _noise_images(card, generator) if calibration is None else calibration)
    return Weights(network=network, source=source, sha256=_parameter_hash(network), trained=False)


@torch.no_grad()
def _initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draws random parameters.

    He et al., "Delving deep into rectifiers", 2015: activations keep their size through ReLUs.
    Goyal et al., "Accurate, large minibatch SGD", 2017: residual branches start small (there at 0).
    Then rounding changes an untrained network about as little as a trained one. With branches of
    full size, rounding to bf16 moved an output of ResNet-101 84 % of the way to the output of
    another image; with RESIDUAL_SCALE, 9 %.
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
            last.weight.fill_(RESIDUAL_SCALE)


@torch.no_grad()
def _calibrate(network: nn.Module, images: Tensor) -> None:
    """Measures the statistics of the batch norms, and scales the logits to about LOGIT_STD.

    With a mean of 0 and a variance of 1 instead, activations would double from block to block, and
    a comparison of two engines would compare overflows.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # average over all images with equal weight
        norm.train()
    logits: Tensor = network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    last.weight.mul_(LOGIT_STD / logits.std(dim=1).mean())


def _noise_images(card: Card, generator: torch.Generator) -> Tensor:
    """Four images of smooth noise, for a network that is calibrated without real images."""
    height, width, channels = card.input.shape
    coarse = torch.randn(4, channels, 16, 16, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bilinear")


def _without_memory(card: Card) -> nn.Module:
    """The network on torch's meta device: its parameters have shapes but no values."""
    with torch.device("meta"):
        return create(card.architecture, card.classes)


def _parameter_hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
