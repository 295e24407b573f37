"""Promises of the build: what is published is sound and says what it is; failure leaves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from model_repo import architectures, build, cards
from model_repo.build import BuildError, Order, Watcher
from server.engines import golden_check as golden
from server.engines.base import backend, infer
from server.process.cores import available_cores
from server.repository import reader
from server.repository.contents import list_versions
from server.repository.manifest import Manifest
from server.repository.reader import Golden

openvino = backend("openvino")
UNTRAINED = "random:0"


class Notes(Watcher):
    """Keeps what a user would be told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def refused(order: Order, name: str = "lenet5") -> str:
    """Why a build fails; nothing of it may be left."""
    with pytest.raises(BuildError) as caught:
        build.build(name, order)
    assert not list(order.repo.rglob("*.json"))
    assert not list(order.repo.rglob("*.onnx"))
    return str(caught.value)


def published(repo: Path) -> dict[str, Manifest]:
    manifests = [version.manifest for version in list_versions(repo)]
    return {manifest.model: manifest for manifest in manifests if manifest is not None}


def allow_nothing(monkeypatch: pytest.MonkeyPatch, precisions: Sequence[str]) -> None:
    """From now on every rounding is too much in these precisions."""
    for precision in precisions:
        monkeypatch.setitem(golden.MAX_DEVIATION, precision, 0.0)


# --- what is published -----------------------------------------------------------------------


def test_what_is_published_says_what_it_is(built_repository: Path) -> None:
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
        assert 0 < max(engine.deviation.values()) <= golden.MAX_DEVIATION[engine.precision]
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


def test_golden_answers_are_those_of_the_networks_parameters(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = architectures.create("lenet5", 10)
    checkpoint = tmp_path / "lenet5.pth"
    torch.save(network.state_dict(), checkpoint)
    order = Order(repo=tmp_path / "repo", weights=f"file:{checkpoint}", precision="fp32")
    manifest = build.build("lenet5", order).manifest
    assert manifest.weights.trained
    folder = order.repo / "lenet5" / "1"
    truth = reader.open_version(folder).golden
    card = cards.load("lenet5")
    pixels = (torch.tensor(truth.pixels).float() / 255 - card.mean[0]) / card.std[0]
    with torch.inference_mode():
        expected = network.eval()(pixels.permute(0, 3, 1, 2)).softmax(1).numpy()
    np.testing.assert_allclose(truth.probabilities, expected, atol=1e-6)
    engine = openvino.load(
        folder, manifest.engines[0], truth.pixels.shape[1:], threads=available_cores()
    )
    answer = infer(engine.instances[0], truth.pixels[:3])
    engine.close()
    np.testing.assert_allclose(answer.probabilities, expected[:3], atol=1e-5)


def test_each_build_is_a_version_of_its_own_and_the_stages_are_told_in_order(
    tmp_path: Path,
) -> None:
    order = Order(repo=tmp_path, backend="null")
    notes = Notes()
    versions = [build.build("lenet5", order, notes).manifest.version for _ in range(2)]
    assert versions == [1, 2]
    assert notes.stages == 2 * list(build.STAGES)
    manifest = published(tmp_path)["lenet5"]
    assert not manifest.weights.trained, "it computes nothing, so it is not what was trained"


def test_the_card_gives_the_batch_limit_unless_the_order_does(tmp_path: Path) -> None:
    built = build.build("lenet5", Order(repo=tmp_path, weights=UNTRAINED, max_batch=2))
    (engine,) = built.manifest.engines
    assert engine.max_batch == 2
    assert set(engine.deviation) == {"1", "2"}
    assert built.seconds > 0
    assert built.peak_bytes > 0


@pytest.mark.parametrize("max_batch", [0, -1, 1025])
def test_a_batch_limit_without_sense_is_refused(tmp_path: Path, max_batch: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 1024, not {max_batch}"):
        Order(repo=tmp_path, max_batch=max_batch)


# --- precision -------------------------------------------------------------------------------


def test_a_network_too_deep_for_the_best_precision_gets_fp32_and_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = openvino.best_precision()
    if best == "fp32":
        pytest.skip("this machine has nothing below fp32")
    allow_nothing(monkeypatch, [best])
    notes = Notes()
    manifest = build.build("lenet5", Order(repo=tmp_path, weights=UNTRAINED), notes).manifest
    (engine,) = manifest.engines
    assert (engine.name, engine.precision) == ("openvino-fp32", "fp32")
    assert all(file.name.startswith("openvino-fp32") for file in engine.files)
    assert not list(tmp_path.rglob(f"openvino-{best}*")), "what was tried first is gone"
    (warning,) = notes.warnings
    assert warning.startswith(f"{best} is too coarse for this network")


def test_a_precision_that_was_asked_for_is_kept_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = openvino.best_precision()
    allow_nothing(monkeypatch, [best])
    why = refused(Order(repo=tmp_path, weights=UNTRAINED, precision=best))
    assert "the engine is wrong, so it was not published: at batch 1" in why


def test_an_engine_that_is_wrong_in_every_precision_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_nothing(monkeypatch, list(golden.MAX_DEVIATION))
    assert "fp32 allows 0.00%" in refused(Order(repo=tmp_path, weights=UNTRAINED))


def test_a_precision_that_there_is_not_is_told_with_those_there_are(tmp_path: Path) -> None:
    why = refused(Order(repo=tmp_path, backend="null", precision="bf16"))
    assert why.startswith("null has no bf16 on this machine; it has fp32")


# --- weights ---------------------------------------------------------------------------------


def test_weights_out_of_reach_are_told_with_what_to_do(tmp_path: Path) -> None:
    order = Order(repo=tmp_path / "repo", weights=f"file:{tmp_path}/none.pth")
    why = refused(order)
    assert why.startswith(f"there is no file {tmp_path}/none.pth")
    assert "--or-random" in why


def test_or_random_goes_on_untrained_and_says_so_everywhere(tmp_path: Path) -> None:
    order = Order(repo=tmp_path / "repo", weights=f"file:{tmp_path}/none.pth", or_random=True)
    notes = Notes()
    weights = build.build("lenet5", order, notes).manifest.weights
    assert (weights.source, weights.trained) == (UNTRAINED, False)
    assert "there is no file" in weights.note
    assert notes.warnings[0].startswith("UNTRAINED")


def test_the_wrong_file_is_never_made_good_by_random_weights(tmp_path: Path) -> None:
    torch.save(architectures.create("lenet5", 10).state_dict(), tmp_path / "lenet5-01234567.pth")
    source = f"file://{tmp_path}/lenet5-01234567.pth"
    order = Order(repo=tmp_path / "repo", weights=source, or_random=True)
    assert "--or-random does not help" in refused(order)


def test_a_checkpoint_of_another_network_is_told_by_name(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    order = Order(repo=tmp_path / "repo", weights=f"file:{tmp_path}/other.pth", or_random=True)
    assert "does not fit lenet5 with 10 classes" in refused(order)


# --- the check that guards it ------------------------------------------------------------------


def test_golden_answers_of_another_network_are_noticed_when_loaded(built_repository: Path) -> None:
    folder = built_repository / "resnet18" / "1"
    manifest = published(built_repository)["resnet18"]
    truth = reader.open_version(folder).golden
    other = Golden(truth.pixels, np.roll(truth.probabilities, 1, axis=1))
    (record,) = manifest.engines
    engine = openvino.load(folder, record, truth.pixels.shape[1:], threads=available_cores())
    try:
        golden.check(engine, truth, record.precision)
        with pytest.raises(golden.GoldenMismatch, match="from eager PyTorch"):
            golden.check(engine, other, record.precision)
    finally:
        engine.close()


# --- the command -----------------------------------------------------------------------------


def test_the_command_publishes_prints_a_table_and_ends_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["lenet5", "--repo", str(tmp_path), "--weights", UNTRAINED, "--precision", "f32"]
    assert build.main(command) == 0
    told = capsys.readouterr()
    assert "UNTRAINED" in told.out
    assert "openvino-fp32 x64" in told.out
    assert [line.split()[1] for line in told.out.splitlines() if line.startswith("lenet5  ")] == (
        list(build.STAGES)
    )
    assert told.err == ""


def test_one_that_fails_keeps_no_other_from_being_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "alexnet").write_text("a file where a folder must be")
    command = ["alexnet", "lenet5", "--repo", str(tmp_path), "--backend", "null"]
    assert build.main(command) == 1
    told = capsys.readouterr()
    assert list(published(tmp_path)) == ["lenet5"]
    assert told.err.startswith("alexnet was not built: ")
    assert "1 of 2 models were not built" in told.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "name the models to build, or --all"),
        (["lenet5", "--all"], "name the models to build, or --all"),
        (["lenet6"], "there is no card 'lenet6'; there are alexnet,"),
        (["lenet5", "resnet18", "--weights", "random:0"], "--weights is for one model, not for 2"),
        (
            ["lenet5", "--backend", "abacus"],
            "backend 'abacus' is unknown; there are openvino, tensorrt, inductor, null",
        ),
        (["lenet5", "--precision", "fp7"], "invalid choice: 'fp7'"),
        (["lenet5", "--max-batch", "0"], "max_batch must be 1 to 1024, not 0"),
    ],
)
def test_wrong_usage_is_told_and_ends_with_2(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        build.main(arguments)
    assert caught.value.code == 2
    assert why in capsys.readouterr().err
