"""Each source of weights loads the right network, or says why it cannot."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model_repo import cards, weights
from model_repo.architectures.registry import create
from model_repo.checkpoints.download import WeightsError, WeightsUnavailable, WrongHash
from model_repo.checkpoints.reader import WrongCheckpoint
from model_repo.golden_images import golden_pixels
from server.engines.golden_check import MAX_DEVIATION, deviation, deviation_scale

LENET5 = cards.load("lenet5")
TWO_CLASSES = ("yes", "no")

State = dict[str, Tensor]


def new_state(name: str = "lenet5", classes: int = 10, *, auxiliary: bool = False) -> State:
    torch.manual_seed(1)
    return create(name, classes, auxiliary=auxiliary).state_dict()


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return f"file:{path}"


def same(network: nn.Module, state: State) -> bool:
    actual = network.state_dict()
    return actual.keys() == state.keys() and all(torch.equal(actual[k], state[k]) for k in state)


def test_a_torch_checkpoint_is_loaded(tmp_path: Path) -> None:
    state = new_state()
    source = saved(tmp_path / "net.pth", state)
    loaded = weights.load(LENET5, source)
    assert same(loaded.network, state)
    assert not loaded.network.training
    assert (loaded.source, loaded.trained) == (source, True)
    assert loaded.sha256 == hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()


def test_a_safetensors_checkpoint_is_loaded(tmp_path: Path) -> None:
    state = new_state()
    save_file(state, tmp_path / "net.safetensors")
    loaded = weights.load(LENET5, f"file:{tmp_path}/net.safetensors")
    assert same(loaded.network, state)
    assert loaded.trained


def test_a_half_precision_checkpoint_is_converted_to_float32(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in new_state().items()}
    loaded = weights.load(LENET5, saved(tmp_path / "net.pth", state))
    assert {tensor.dtype for tensor in loaded.network.state_dict().values()} == {torch.float32}


def test_the_message_about_a_file_that_is_no_checkpoint_starts_with_the_source(
    tmp_path: Path,
) -> None:
    (tmp_path / "net.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WrongCheckpoint) as caught:
        weights.load(LENET5, f"file:{tmp_path}/net.pth")
    assert str(caught.value) == (
        f"file:{tmp_path}/net.pth is a Git LFS pointer, not the checkpoint itself; "
        "run `git lfs pull` in its repository"
    )


def test_a_folder_and_a_link_to_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is a folder; give the checkpoint file in it"):
        weights.load(LENET5, f"file:{tmp_path}")
    (tmp_path / "net.pth").symlink_to("gone.pth")
    with pytest.raises(WeightsUnavailable, match="is a symbolic link to gone.pth, which does not"):
        weights.load(LENET5, f"file:{tmp_path}/net.pth")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16])
def test_a_checkpoint_of_unusual_numbers_is_converted_to_float32(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in new_state().items()}
    loaded = weights.load(LENET5, saved(tmp_path / "net.pth", state))
    assert {tensor.dtype for tensor in loaded.network.state_dict().values()} == {torch.float32}


def test_the_message_about_a_checkpoint_of_another_network_lists_the_differences(
    tmp_path: Path,
) -> None:
    state = new_state()
    del state["3.bias"]
    state |= {f"fc{i}.weight": torch.zeros(1) for i in range(5)}
    state["9.weight"] = torch.zeros(84, 121)
    with pytest.raises(WrongCheckpoint) as caught:
        weights.load(LENET5, saved(tmp_path / "net.pth", state))
    assert str(caught.value) == (
        f"file:{tmp_path}/net.pth does not fit lenet5 with 10 classes: 1 missing (3.bias); "
        "5 unknown (fc0.weight, fc1.weight, fc2.weight, ...); "
        "1 of another shape (9.weight [84, 121] for [84, 120])"
    )


def test_a_checkpoint_with_nan_is_rejected(tmp_path: Path) -> None:
    state = new_state()
    state["3.bias"][2] = float("nan")
    with pytest.raises(WrongCheckpoint, match=r"1 with numbers that are not finite \(3.bias\)"):
        weights.load(LENET5, saved(tmp_path / "net.pth", state))


def test_an_old_checkpoint_without_batch_counters_is_loaded(tmp_path: Path) -> None:
    card = replace(cards.load("resnet18"), labels=TWO_CLASSES)
    state = new_state("resnet18", 2)
    old = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    assert same(weights.load(card, saved(tmp_path / "net.pth", old)).network, state)


def test_a_checkpoint_with_auxiliary_classifiers_is_loaded_without_them(tmp_path: Path) -> None:
    card = replace(cards.load("googlenet"), labels=TWO_CLASSES)
    state = new_state("googlenet", 2, auxiliary=True)
    served = {name: tensor for name, tensor in state.items() if not name.startswith("aux")}
    whole = weights.load(card, saved(tmp_path / "whole.pth", state))
    part = weights.load(card, saved(tmp_path / "part.pth", served))
    assert same(whole.network, served)
    assert same(part.network, served)
    assert whole.note == "whole.pth: 344 tensors; left aside: aux1, aux2"
    # After fine-tuning, only the main classifier has the new classes.
    state["aux2.fc2.bias"] = torch.zeros(1000)
    assert same(weights.load(card, saved(tmp_path / "tuned.pth", state)).network, served)
    served["aux3.fc2.bias"] = torch.zeros(2)
    with pytest.raises(WrongCheckpoint, match=r"1 unknown \(aux3.fc2.bias\)$"):
        weights.load(card, saved(tmp_path / "other.pth", served))


def test_a_downloaded_checkpoint_is_loaded_and_cached(tmp_path: Path) -> None:
    state = new_state()
    path = tmp_path / "net.pth"
    saved(path, state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = f"{path.as_uri()}#sha256={digest}"
    loaded = weights.load(LENET5, source, cache=tmp_path / "cache")
    assert same(loaded.network, state)
    assert (loaded.source, loaded.sha256, loaded.trained) == (path.as_uri(), digest, True)
    path.unlink()
    assert same(weights.load(LENET5, source, cache=tmp_path / "cache").network, state)


def test_a_downloaded_checkpoint_with_a_wrong_hash_is_rejected(tmp_path: Path) -> None:
    saved(tmp_path / "net-00000000.pth", new_state())
    with pytest.raises(WrongHash, match="has the wrong content"):
        weights.load(LENET5, (tmp_path / "net-00000000.pth").as_uri(), cache=tmp_path / "cache")


def test_the_environment_sets_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVSERVE_CACHE", str(tmp_path))
    assert weights.cache_folder() == tmp_path
    monkeypatch.delenv("CONVSERVE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_folder() == tmp_path / ".cache/convserve/weights"
    monkeypatch.setenv("CONVSERVE_CACHE", "~/weights")
    assert weights.cache_folder() == tmp_path / "weights"


def test_without_a_home_folder_the_message_says_to_set_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("CONVSERVE_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(WeightsUnavailable, match="no home folder; set CONVSERVE_CACHE to a folder"):
        weights.load(cards.load("resnet18"))
    with pytest.raises(
        WeightsError, match=r"home folder in '~/net\.pth' is unknown; give the full"
    ):
        weights.load(LENET5, "file:~/net.pth")


def test_a_missing_file_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"there is no file .*net\.pth"):
        weights.load(LENET5, f"file:{tmp_path}/net.pth")


@pytest.mark.parametrize("source", ["", "ftp://host/net.pth", "file:", "Digits"])
def test_the_message_about_an_unknown_source_lists_the_known_ones(source: str) -> None:
    card = replace(LENET5, weights="magic")
    with pytest.raises(WeightsError, match="is not a source of weights; use the path of"):
        weights.load(card, source)


def test_digits_require_one_channel_and_ten_classes() -> None:
    for card in (cards.load("resnet18"), replace(LENET5, labels=TWO_CLASSES)):
        with pytest.raises(WeightsError, match="need a network with 1 channel and 10 classes"):
            weights.load(card, "digits")


@pytest.fixture(scope="module")
def images() -> Tensor:
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.standard_normal((2, 3, 14, 14), np.float32))
    return nn.functional.interpolate(coarse, (224, 224), mode="bicubic")


@pytest.mark.parametrize("name", ["plain18", "googlenet", "googlenet2014"])
def test_logits_of_an_untrained_network_are_well_scaled(name: str, images: Tensor) -> None:
    loaded = weights.load(cards.load(name), "random:0", calibration=images)
    assert (loaded.source, loaded.trained) == ("random:0", False)
    assert not loaded.network.training
    with torch.inference_mode():
        logits = loaded.network(images)
    assert 1 < logits.std(dim=1).mean() < 3


def test_logits_of_an_untrained_network_are_well_scaled_without_calibration_images() -> None:
    network = weights.load(LENET5, "random:0").network
    with torch.inference_mode():
        logits = network(torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert 0.5 < logits.std(dim=1).mean() < 5


def test_batch_norms_of_a_deep_untrained_network_are_calibrated(images: Tensor) -> None:
    network = weights.load(cards.load("resnet18"), "random:0", calibration=images).network
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}
    output_std: list[float] = []
    for norm in norms:
        norm.register_forward_hook(
            lambda norm, _, out: output_std.append(float(out.std() / norm.weight.mean()))
        )
    with torch.inference_mode():
        network(images)
    assert min(output_std) > 0.7
    assert max(output_std) < 1.3


def test_rounding_to_bf16_changes_an_untrained_residual_network_little() -> None:
    card = cards.load("resnet50")
    pixels = torch.from_numpy(golden_pixels(card.input)[:3]).float() / 255
    images = ((pixels - torch.tensor(card.mean)) / torch.tensor(card.std)).permute(0, 3, 1, 2)
    network = weights.load(card, "random:0", calibration=images).network
    with torch.inference_mode():
        truth = network(images).softmax(1).numpy()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(images).float().softmax(1).numpy()
    assert deviation(truth, rounded, deviation_scale(truth)) < MAX_DEVIATION["bf16"] / 2


def test_parameters_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights.load(LENET5, "random:7")
    torch.manual_seed(2)
    second = weights.load(LENET5, "random:7")
    other = weights.load(LENET5, "random:8")
    assert same(second.network, first.network.state_dict())
    assert first.sha256 == second.sha256 != other.sha256


@pytest.mark.parametrize(
    "source", ["random:", "random:x", "random:-1", "random:²", f"random:{2**63}"]
)
def test_a_seed_must_be_a_whole_number(source: str) -> None:
    with pytest.raises(WeightsError, match="needs a whole number below"):
        weights.load(LENET5, source)
