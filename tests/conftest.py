"""For all tests: asyncio runs coroutine tests, and one repository has real engines."""

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
    """A repository with lenet5 trained on the digits, and untrained resnet18 and googlenet.

    OpenVINO engines in this machine's best precision. Tests must not change it.
    """
    from model_repo.pipeline import BuildOptions, build  # imports torch: only if a test needs it

    root = tmp_path_factory.mktemp("built")
    build("lenet5", BuildOptions(repo=root))
    for name in ("resnet18", "googlenet"):
        build(name, BuildOptions(repo=root, weights="random:0"))
    return root
