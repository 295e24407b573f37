"""Fine-tunes a ResNet-18 on a folder with one subfolder of pictures per class.

    python docs/examples/finetune.py PICTURES --out food.pth [--start CHECKPOINT] [--epochs N]

Writes the checkpoint, and beside it the names of the classes (food.txt). It is a plain training
script: replace it by yours. torchvision's resnet18 has the same parameters as the network here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from model_repo.architectures.registry import create

SIZE = 32  # pixels; the card says the same
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the base card says
BATCH_SIZE = 20
BILINEAR = Image.Resampling.BILINEAR  # the same


def load(folder: Path, classes: list[str]) -> tuple[Tensor, Tensor]:
    """All pictures, normalised [N, 3, H, W], and the indices of their classes [N]."""
    files = [
        (path, n) for n, name in enumerate(classes) for path in sorted((folder / name).iterdir())
    ]
    pictures = [Image.open(path).convert("RGB").resize((SIZE, SIZE), BILINEAR) for path, _ in files]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    normalised = (pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return normalised.permute(0, 3, 1, 2).contiguous(), torch.tensor([n for _, n in files])


def start_from(network: nn.Module, checkpoint: Path) -> None:
    """Takes the parameters of a checkpoint, except for a last layer of other classes."""
    saved = torch.load(checkpoint, weights_only=True)
    parameters, own = saved.get("model", saved), network.state_dict()
    fits = {name: value for name, value in parameters.items() if value.shape == own[name].shape}
    network.load_state_dict(own | fits)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tunes a ResNet-18.")
    parser.add_argument("pictures", type=Path, help="folder with one subfolder per class")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--start", type=Path, help="checkpoint to start from (default: none)")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()

    torch.manual_seed(0)
    classes = sorted(folder.name for folder in options.pictures.iterdir())
    pictures, targets = load(options.pictures, classes)
    network = create("resnet18", classes=len(classes))
    if options.start:
        start_from(network, options.start)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for epoch in range(options.epochs):
        for batch in torch.randperm(len(targets)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(pictures[batch]), targets[batch])
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1} of {options.epochs}: loss {loss.item():.3f}")

    state = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": options.epochs,
    }
    torch.save(state, options.out)
    options.out.with_suffix(".txt").write_text("\n".join(classes) + "\n")


if __name__ == "__main__":
    main()
