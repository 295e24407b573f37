"""Promise: decoders take no more memory than the budget, and estimates are never too low."""

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.images.decode import decode, from_pixels
from server.images.input_spec import ImageLimits, InputSpec
from server.images.memory import MemoryBudget, MemoryNeeded
from tests.images.image_files import IMAGENET, encoded, noise, rejection

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE = (2400, 1600)

MEASURE = """
import json, sys
from io import BytesIO
from pathlib import Path
from server.images.decode import decode
from server.images.input_spec import ImageLimits, InputSpec
from server.images.memory import MemoryBudget
from server.process.allocator import give_back, keep_freed

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10

class Recorder(MemoryBudget):
    def hold(self, needed):
        self.needed = needed
        return super().hold(needed)

keep_freed({})
spec = InputSpec(**json.loads(sys.argv[1]))
first, *others = [Path(name) for name in sys.argv[2:]]
decode(first.read_bytes(), spec)  # memory that is allocated once
results = {}
for file in (first, *others):
    content, memory = file.read_bytes(), Recorder()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    decode(content, spec, ImageLimits(memory=memory))
    results[file.name] = [status("VmHWM") - before, memory.needed]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def files_of_every_kind(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of large images, one of each kind that takes another amount of memory."""
    image = noise(60, 40).resize(SIZE)
    fade = Image.linear_gradient("L").resize(SIZE)
    clear, clear_grey = image.copy(), image.convert("L")
    clear.putalpha(fade)
    clear_grey.putalpha(fade)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = image.quantize(64)
    wide = Image.fromarray(np.asarray(fade).astype(np.uint16) * 257)
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (image, "JPEG", {}),
        "jpeg grey": (image.convert("L"), "JPEG", {}),
        "jpeg cmyk": (image.convert("CMYK"), "JPEG", {}),
        "jpeg progressive": (image, "JPEG", {"progressive": True}),
        "jpeg progressive 444": (image, "JPEG", {"progressive": True, "subsampling": 0}),
        "jpeg turned": (image, "JPEG", {"exif": turned}),
        "png": (image, "PNG", {"compress_level": 1}),
        "png alpha": (clear, "PNG", {"compress_level": 1}),
        "png alpha turned": (clear, "PNG", {"compress_level": 1, "exif": turned}),
        "png grey alpha": (clear_grey, "PNG", {"compress_level": 1}),
        "png palette": (palette, "PNG", {"compress_level": 1}),
        "png clear palette": (palette, "PNG", {"transparency": 3, "compress_level": 1}),
        "png 16 bits": (wide, "PNG", {"compress_level": 1}),
        "png 1 bit": (fade.convert("1"), "PNG", {"compress_level": 1}),
        "webp": (image, "WEBP", {"method": 0, "quality": 30}),
        "webp alpha": (clear, "WEBP", {"method": 0, "quality": 30}),
        "webp turned": (image, "WEBP", {"method": 0, "quality": 30, "exif": turned}),
        "webp lossless": (image, "WEBP", {"lossless": True, "method": 0, "quality": 0}),
        "bmp": (image, "BMP", {}),
        "bmp grey": (fade, "BMP", {}),
        "gif": (palette, "GIF", {}),
        "gif clear": (palette, "GIF", {"transparency": 3}),
    }
    folder = tmp_path_factory.mktemp("images")
    for name, (one, kind, options) in kinds.items():
        (folder / name).write_bytes(encoded(one, kind, **options))
    return [str(folder / name) for name in kinds]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "options",
    [
        {"channels": 1, "resize": 256},
        {"channels": 3, "resize": 256},
        {"channels": 3, "resize": 256, "antialias": False},
        {"channels": 3, "letterbox": True},
    ],
    ids=["grey", "colour", "sampled", "letterbox"],
)
def test_no_estimate_is_below_the_memory_that_decoding_takes(
    files_of_every_kind: list[str], options: dict[str, Any]
) -> None:
    spec = json.dumps({"height": 224, "width": 224, **options})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, spec, *files_of_every_kind],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout)
    assert len(measured) == len(files_of_every_kind)
    slack = 4 << 20  # read buffers and tables, which do not grow with the image
    for name, (peak, estimate) in measured.items():
        assert peak <= estimate + slack, f"{name}: {peak:,} bytes instead of {estimate:,}"
        assert peak >= estimate / 3, f"{name}: only {peak:,} bytes instead of {estimate:,}"


def test_an_image_that_can_never_fit_is_rejected_with_both_sizes() -> None:
    limits = ImageLimits(memory=MemoryBudget(1_000_000))
    reason = rejection(encoded(noise(1000, 800), "PNG"), limits)
    assert "1,000 x 800 pixels" in reason
    assert "at most 1,000,000 are allowed" in reason
    assert decode(encoded(noise(100, 80), "PNG"), IMAGENET, limits).shape == (224, 224, 3)
    assert limits.memory.used_bytes == 0


@pytest.mark.parametrize("cut", [0, 3000])
def test_memory_is_free_again_after_every_decode(cut: int) -> None:
    limits = ImageLimits(memory=MemoryBudget(100_000_000))
    file = encoded(noise(600, 400), "BMP")
    if cut:
        rejection(file[:-cut], limits)
    else:
        decode(file, IMAGENET, limits)
    assert limits.memory.used_bytes == 0


def test_decoding_asks_for_memory_if_others_hold_it() -> None:
    memory = MemoryBudget(4_000_000)
    limits = ImageLimits(memory=memory)
    file = encoded(noise(600, 400), "PNG")
    raw = noise(600, 400).tobytes()
    with memory.hold(3_900_000):
        with pytest.raises(MemoryNeeded) as caught:
            decode(file, IMAGENET, limits)
        assert 600 * 400 * 4 < caught.value.needed < 4_000_000
        with pytest.raises(MemoryNeeded):
            from_pixels(raw, 400, 600, 3, IMAGENET, limits)
        from_pixels(raw, 400, 600, 3, InputSpec(400, 600, 3), limits)  # needs no memory
    decode(file, IMAGENET, limits)
    from_pixels(raw, 400, 600, 3, IMAGENET, limits)


def test_waiters_get_memory_in_their_order_and_nobody_overtakes_them() -> None:
    memory = MemoryBudget(10)
    granted: list[str] = []
    with memory.hold(8):
        memory.wait(9, lambda: granted.append("large"))
        memory.wait(1, lambda: granted.append("small"))
        with pytest.raises(MemoryNeeded), memory.hold(1):
            pass
        assert granted == []
    assert granted == ["large", "small"]
    assert memory.used_bytes == 10
    memory.release(9)
    memory.release(1)
    assert memory.used_bytes == 0


def test_a_waiter_that_leaves_gives_its_memory_and_its_turn_to_others() -> None:
    memory = MemoryBudget(10)
    granted: list[str] = []
    with memory.hold(8):
        large = memory.wait(9, lambda: granted.append("large"))
        small = memory.wait(2, lambda: granted.append("small"))
        memory.leave(large)
        assert granted == ["small"]
        memory.leave(small)
        assert memory.used_bytes == 8
    assert memory.used_bytes == 0


def test_a_resized_strip_needs_memory_for_its_length() -> None:
    """256 x 60,000 pixels after resizing, from 3,000 bytes."""
    strip = BytesIO()
    Image.new("RGB", (64, 15_000)).save(strip, "PNG")
    needed = 256 * 60_000 * 4
    reason = rejection(strip.getvalue(), ImageLimits(memory=MemoryBudget(needed)))
    assert "bytes of memory" in reason
