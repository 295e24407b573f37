"""Networks with our names and shapes that compute something else are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_repo.checkpoints.reader import WrongCheckpoint
from model_repo.checkpoints.variants import check_variant


def test_larger_images_than_timms_vgg_pools_like_ours_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    check_variant(path, "vgg16", "timm", 255, 224)
    check_variant(path, "vgg16", "", 512, 512)
    check_variant(path, "resnet50", "timm", 512, 512)
    with pytest.raises(WrongCheckpoint, match="at most 255x255 pixels, not 224x256"):
        check_variant(path, "vgg16", "timm", 224, 256)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"downsample_in_bottleneck": True}, "downsample_in_bottleneck to True, ours has False"),
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage to True, ours has"),
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu', ours has 'relu'"),
    ],
)
def test_other_variants_of_transformers_resnet_are_told_by_their_settings(
    tmp_path: Path, settings: dict[str, object], name: str
) -> None:
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    check_variant(path, "resnet50", "transformers", 224, 224)
    config.write_text(json.dumps({"model_type": "resnet", "hidden_act": "relu"}))
    check_variant(path, "resnet50", "transformers", 224, 224)
    config.write_text(json.dumps({"model_type": "resnet", **settings}))
    with pytest.raises(WrongCheckpoint, match=name):
        check_variant(path, "resnet50", "transformers", 224, 224)
    check_variant(path, "resnet50", "", 224, 224)
    for content in ("[", "[]", json.dumps({"model_type": "vit", **settings})):
        config.write_text(content)
        check_variant(path, "resnet50", "transformers", 224, 224)
