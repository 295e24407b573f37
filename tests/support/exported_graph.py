"""ONNX graphs of networks."""

from __future__ import annotations

from pathlib import Path

from model_repo import cards
from model_repo.architectures.registry import create
from model_repo.cards import MAX_BATCH
from model_repo.export import ServedNetwork, export
from server.repository.manifest import ONNX_FILE


def exported_graph(name: str, folder: Path, built: Path) -> Path:
    """The graph of a model in the repository `built`. If it has none, exports one to `folder`.

    The exported network has random weights.
    """
    if (path := built / name / "1" / ONNX_FILE).is_file():
        return path
    card = cards.load(name)
    network = create(card.architecture, card.classes).eval()
    served = ServedNetwork(network, top_k=card.top_k, mean=card.mean, std=card.std)
    path = folder / ONNX_FILE
    export(served, path, shape=card.input.shape, max_batch=MAX_BATCH)
    return path
