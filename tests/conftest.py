"""What every test has: coroutine tests are run by asyncio, and one repository of real engines."""

import asyncio
import inspect
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="session")
def built_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a repository, not to be changed: lenet5 trained on the digits, resnet18 and
    googlenet untrained, all built here for OpenVINO in this machine's best precision."""
    from model_repo.pipeline import BuildOptions, build  # torch: only where a test asks for engines

    root = tmp_path_factory.mktemp("built")
    build("lenet5", BuildOptions(repo=root))
    for name in ("resnet18", "googlenet"):
        build(name, BuildOptions(repo=root, weights="random:0"))
    return root
