"""The network that a card describes, as it is served: with its pre- and post-processing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_repo.cards import Card
from model_repo.export import ServedNetwork
from server.images.input_spec import Pixels


def served_network(network: nn.Module, card: Card) -> ServedNetwork:
    """Puts the card's normalisation, activation and top-k around a network."""
    return ServedNetwork(
        network,
        mean=card.mean,
        std=card.std,
        top_k=card.top_k,
        activation=card.activation,
        reverse=card.channel_order == "bgr",
    )


def normalised(card: Card, pixels: Pixels) -> Tensor:
    """[N, H, W, C] uint8 -> [N, C, H, W] as the network takes it."""
    mean, std = torch.tensor(card.mean), torch.tensor(card.std)
    ordered = torch.from_numpy(pixels)
    if card.channel_order == "bgr":
        ordered = ordered.flip(-1)
    return ((ordered.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
