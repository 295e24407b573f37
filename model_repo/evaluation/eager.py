"""The eager float32 network that a published version was built from."""

from __future__ import annotations

from model_repo import cards, weights
from model_repo.checkpoints.download import WeightsError
from model_repo.evaluation.dataset import DataError
from model_repo.export import ServedNetwork
from model_repo.golden_images import golden_pixels
from model_repo.served import normalised, served_network
from server.repository.manifest import Manifest

MADE_BY_THE_BUILD = ("random:", "digits")  # sources that need no file


def eager_network(
    manifest: Manifest, card_source: str, weights_source: str, *, allow_code: bool = False
) -> ServedNetwork:
    """Loads the network of a card. Raises DataError if it is not the one of the version.

    Without a card, takes ours of the model's name; without a source, the weights of the card.
    """
    try:
        card = cards.load(card_source or manifest.model)
        source = weights_source
        if not source and manifest.weights.source.startswith(MADE_BY_THE_BUILD):
            source = manifest.weights.source
        pixels = golden_pixels(card.input)
        loaded = weights.load(
            card, source or None, calibration=normalised(card, pixels), allow_code=allow_code
        )
    except (cards.CardError, WeightsError) as error:
        raise DataError(f"--against eager: {error}") from None
    if loaded.sha256 != manifest.weights.sha256:
        raise DataError(
            f"--against eager: {manifest.model} version {manifest.version} was built from other "
            f"weights ({manifest.weights.source}); name its card with --card, or its weights with "
            "--weights"
        )
    return served_network(loaded.network, card)
