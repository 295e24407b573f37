"""All fuzz targets by name."""

from tests.fuzz.target import Target
from tests.fuzz.targets import bodies, checkpoints, files, frames, images, messages

TARGETS: dict[str, Target] = {
    one.name: one
    for targets in (
        frames.TARGETS,
        messages.TARGETS,
        bodies.TARGETS,
        files.TARGETS,
        checkpoints.TARGETS,
        images.TARGETS,
    )
    for one in targets
}
