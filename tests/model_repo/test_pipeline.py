"""A build publishes accurate engines that say what they are. A failed build leaves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model_repo import cards
from model_repo.architectures.registry import create
from model_repo.pipeline import BuildError, BuildOptions, build
from model_repo.progress import STAGES, BuildProgress
from server.engines import golden_check
from server.engines.base import backend, infer
from server.process.cores import available_cores
from server.repository import reader
from server.repository.contents import list_versions
from server.repository.manifest import Manifest
from server.repository.reader import Golden
from tests.repository.small_disk import small_disk

openvino = backend("openvino")
UNTRAINED = "random:0"


class RecordedProgress(BuildProgress):
    """Keeps what the user would see."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def failure(options: BuildOptions, name: str = "lenet5") -> str:
    """The message of a build that fails. The build must not leave any file."""
    with pytest.raises(BuildError) as caught:
        build(name, options)
    assert not list(options.repo.rglob("*.json"))
    assert not list(options.repo.rglob("*.onnx"))
    return str(caught.value)


def published(repo: Path) -> dict[str, Manifest]:
    manifests = [version.manifest for version in list_versions(repo)]
    return {manifest.model: manifest for manifest in manifests if manifest is not None}


def allow_no_deviation(monkeypatch: pytest.MonkeyPatch, precisions: Sequence[str]) -> None:
    for precision in precisions:
        monkeypatch.setitem(golden_check.MAX_DEVIATION, precision, 0.0)


@pytest.mark.parametrize("kilobytes", [100, 300, 415])
def test_a_full_disk_is_named_in_plain_words(tmp_path: Path, kilobytes: int) -> None:
    """The ONNX file has 250 KB, the engine 125 KB: the export, the engine or a later step fails."""
    with small_disk(tmp_path / "disk", kilobytes << 10) as repo:
        message = failure(BuildOptions(repo=repo, weights=UNTRAINED))
        assert message == f"No space left on device: {repo}"


# --- the published version -------------------------------------------------------------------


def test_a_manifest_describes_the_published_version(built_repository: Path) -> None:
    manifests = published(built_repository)
    assert sorted(manifests) == ["googlenet", "lenet5", "resnet18"]
    for name, manifest in manifests.items():
        card = cards.load(name)
        (engine,) = manifest.engines
        assert (manifest.architecture, manifest.version) == (card.architecture, 1)
        assert manifest.card_sha256 == card.sha256
        assert engine.name == f"openvino-{openvino.best_precision()}"
        assert (engine.backend_version, engine.hardware) == (
            openvino.version(),
            openvino.hardware(),
        )
        assert engine.max_batch == card.max_batch
        assert set(engine.deviation) == {"1", "3", str(card.max_batch)}
        assert 0 < max(engine.deviation.values()) <= golden_check.MAX_DEVIATION[engine.precision]
        assert openvino.incompatibility(engine) is None
        folder = built_repository / name / "1"
        reader.verify_files(folder, manifest)
        assert reader.open_version(folder).labels == card.labels
    assert manifests["lenet5"].parameters == 61_706
    assert (manifests["lenet5"].weights.source, manifests["lenet5"].weights.trained) == (
        "digits",
        True,
    )
    assert "held-out digits" in manifests["lenet5"].weights.note
    assert not manifests["resnet18"].weights.trained
    assert manifests["googlenet"].parameters == 6_624_904, "without the auxiliary classifiers"


def test_golden_outputs_belong_to_the_parameters_of_the_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = create("lenet5", 10)
    checkpoint = tmp_path / "lenet5.pth"
    torch.save(network.state_dict(), checkpoint)
    options = BuildOptions(repo=tmp_path / "repo", weights=f"file:{checkpoint}", precision="fp32")
    manifest = build("lenet5", options).manifest
    assert (manifest.weights.trained, manifest.weights.source) == (True, "file:lenet5.pth")
    folder = options.repo / "lenet5" / "1"
    golden = reader.open_version(folder).golden
    card = cards.load("lenet5")
    pixels = (torch.tensor(golden.pixels).float() / 255 - card.mean[0]) / card.std[0]
    with torch.inference_mode():
        expected = network.eval()(pixels.permute(0, 3, 1, 2)).softmax(1).numpy()
    np.testing.assert_allclose(golden.probabilities, expected, atol=1e-6)
    engine = openvino.load(
        folder, manifest.engines[0], golden.pixels.shape[1:], threads=available_cores()
    )
    outputs = infer(engine.instances[0], golden.pixels[:3])
    engine.close()
    np.testing.assert_allclose(outputs.probabilities, expected[:3], atol=1e-5)


def test_each_build_publishes_a_new_version_and_reports_the_stages_in_order(
    tmp_path: Path,
) -> None:
    options = BuildOptions(repo=tmp_path, backend="null")
    progress = RecordedProgress()
    versions = [build("lenet5", options, progress).manifest.version for _ in range(2)]
    assert versions == [1, 2]
    assert progress.stages == 2 * [each for each in STAGES if each != "evaluate"]
    manifest = published(tmp_path)["lenet5"]
    assert not manifest.weights.trained, "the null backend computes nothing"


def test_max_batch_of_the_options_replaces_the_one_of_the_card(tmp_path: Path) -> None:
    result = build("lenet5", BuildOptions(repo=tmp_path, weights=UNTRAINED, max_batch=2))
    (engine,) = result.manifest.engines
    assert engine.max_batch == 2
    assert set(engine.deviation) == {"1", "2"}
    assert result.seconds > 0
    assert result.peak_bytes > 0


@pytest.mark.parametrize("max_batch", [0, -1, 1025])
def test_max_batch_out_of_range_is_rejected(tmp_path: Path, max_batch: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 1024, not {max_batch}"):
        BuildOptions(repo=tmp_path, max_batch=max_batch)


# --- precision -------------------------------------------------------------------------------


def test_an_inaccurate_precision_is_replaced_by_fp32_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = openvino.best_precision()
    if best == "fp32":
        pytest.skip("this machine has nothing below fp32")
    allow_no_deviation(monkeypatch, [best])
    progress = RecordedProgress()
    options = BuildOptions(repo=tmp_path, weights=UNTRAINED)
    (engine,) = build("lenet5", options, progress).manifest.engines
    assert (engine.name, engine.precision) == ("openvino-fp32", "fp32")
    assert all(file.name.startswith("openvino-fp32") for file in engine.files)
    assert not list(tmp_path.rglob(f"openvino-{best}*")), "files of the first attempt are removed"
    (warning,) = progress.warnings
    assert warning.startswith(f"{best} is not accurate enough for this network")


def test_a_requested_precision_is_never_replaced_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = openvino.best_precision()
    allow_no_deviation(monkeypatch, [best])
    message = failure(BuildOptions(repo=tmp_path, weights=UNTRAINED, precision=best))
    assert "the engine is wrong, so it was not published: at batch size 1" in message


def test_an_engine_that_is_inaccurate_in_every_precision_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_no_deviation(monkeypatch, list(golden_check.MAX_DEVIATION))
    message = failure(BuildOptions(repo=tmp_path, weights=UNTRAINED))
    assert "fp32 allows 0.00%" in message


def test_the_message_about_an_unsupported_precision_lists_the_supported_ones(
    tmp_path: Path,
) -> None:
    message = failure(BuildOptions(repo=tmp_path, backend="null", precision="bf16"))
    assert message.startswith("null does not support bf16 on this machine; it supports fp32")


# --- weights ---------------------------------------------------------------------------------


def test_the_message_about_unavailable_weights_says_what_to_do(tmp_path: Path) -> None:
    options = BuildOptions(repo=tmp_path / "repo", weights=f"file:{tmp_path}/none.pth")
    message = failure(options)
    assert message.startswith(f"there is no file {tmp_path}/none.pth")
    assert "--or-random" in message


def test_or_random_publishes_an_untrained_network_and_marks_it(tmp_path: Path) -> None:
    source = f"file:{tmp_path}/none.pth"
    options = BuildOptions(repo=tmp_path / "repo", weights=source, or_random=True)
    progress = RecordedProgress()
    weights = build("lenet5", options, progress).manifest.weights
    assert (weights.source, weights.trained) == (UNTRAINED, False)
    assert "there is no file" in weights.note
    assert progress.warnings[0].startswith("UNTRAINED")


def test_or_random_does_not_replace_weights_with_a_wrong_hash(tmp_path: Path) -> None:
    torch.save(create("lenet5", 10).state_dict(), tmp_path / "lenet5-01234567.pth")
    source = f"file://{tmp_path}/lenet5-01234567.pth"
    options = BuildOptions(repo=tmp_path / "repo", weights=source, or_random=True)
    assert "--or-random does not help" in failure(options)


def test_or_random_does_not_replace_a_checkpoint_of_another_network(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    source = f"file:{tmp_path}/other.pth"
    options = BuildOptions(repo=tmp_path / "repo", weights=source, or_random=True)
    assert "does not fit lenet5 with 10 classes" in failure(options)


# --- the golden check ------------------------------------------------------------------------


def test_the_golden_check_detects_an_engine_of_another_network(built_repository: Path) -> None:
    folder = built_repository / "resnet18" / "1"
    manifest = published(built_repository)["resnet18"]
    golden = reader.open_version(folder).golden
    other = Golden(golden.pixels, np.roll(golden.probabilities, 1, axis=1))
    (record,) = manifest.engines
    engine = openvino.load(folder, record, golden.pixels.shape[1:], threads=available_cores())
    try:
        golden_check.check(engine, golden, record.precision)
        with pytest.raises(golden_check.GoldenMismatch, match="from the expected ones"):
            golden_check.check(engine, other, record.precision)
    finally:
        engine.close()


def test_two_classes_with_one_name_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (*"012345678", "0")
    card = replace(cards.load("lenet5"), labels=names)
    monkeypatch.setattr(cards, "load", lambda _: card)
    progress = RecordedProgress()
    build("lenet5", BuildOptions(repo=tmp_path, backend="null"), progress)
    assert progress.warnings == ["classes 0, 9 have the same name, '0'"]
    assert reader.open_version(tmp_path / "lenet5" / "1").labels == names
