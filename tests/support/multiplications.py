"""Counts what a network computes."""

from __future__ import annotations

from torch import Tensor, nn


def multiplications(network: nn.Module, image: Tensor) -> int:
    """Those of all convolutions and dense layers in `network` for one image."""
    total = 0

    def count(module: nn.Module, _: object, out: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += out[0].numel() * module.weight[0].numel()

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    network(image)
    for hook in hooks:
        hook.remove()
    return total
