"""Principals: which models they see."""

from __future__ import annotations

import pytest

from server.security.principal import LOCAL_CALLER, REMOTE_CALLER, Principal, Role


def principal(*models: str) -> Principal:
    return Principal(name="team-a", roles=frozenset({Role.CLASSIFY}), models=models)


@pytest.mark.parametrize(
    ("models", "model", "is_seen"),
    [
        (("*",), "resnet50", True),
        (("resnet*",), "resnet50", True),
        (("resnet*",), "lenet5", False),
        (("resnet*",), "my-resnet50", False),
        (("lenet5", "resnet??"), "resnet50", True),
        (("lenet5", "resnet??"), "resnet101", False),
        (("lenet5",), "lenet5x", False),
        (("lenet5",), "lenet5\n", False),
        (("lenet.",), "lenet5", False),
        (("[ab]-*",), "b-model", True),
        ((), "lenet5", False),
        (("resnet*",), "resnet" + "5" * 59, False),
        (("resnet*",), "", False),
    ],
)
def test_a_principal_sees_the_models_that_a_glob_names(
    models: tuple[str, ...], model: str, is_seen: bool
) -> None:
    assert principal(*models).sees(model) is is_seen


def test_principals_with_equal_permissions_are_equal() -> None:
    assert principal("a*") == principal("a*")
    assert principal("a*") != principal("b*")
    assert hash(principal("a*")) == hash(principal("a*"))


def test_only_a_local_caller_may_change_anything_without_an_auth_file() -> None:
    assert Role.ADMIN in LOCAL_CALLER.roles
    assert REMOTE_CALLER.roles == {Role.CLASSIFY, Role.OBSERVE}
    assert LOCAL_CALLER.name == REMOTE_CALLER.name == "anonymous"
