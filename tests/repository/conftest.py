"""A small repository for the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.repository.versions import publish_version


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one valid version of `tiny` and one of `other`."""
    root = tmp_path_factory.mktemp("published")
    publish_version(root, "other")
    publish_version(root, "tiny")
    return root


@pytest.fixture
def root(published: Path, tmp_path: Path) -> Path:
    """A copy of that repository for changes."""
    return shutil.copytree(published, tmp_path / "repository")
