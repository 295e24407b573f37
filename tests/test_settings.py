"""Every option has a flag, a variable and help, and wrong values have a clear message."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from server.images.input_spec import ImageLimits
from server.settings import PREFIX, Settings, parse

TEXTS = {
    **{"repo": "folder", "host": "::1", "backend": "null", "models": "a,b", "cors_origin": "*"},
    "trusted_peers": "10.0.0.0/8",
    "tls_client": "optional",
}
NUMBERS = {
    **{"max_unsent_bytes": 1 << 20, "max_connection_age_grace_s": 60},
    "queue_rows": 700,
    "max_bytes_in_progress": 2_000_000_000,
    "max_message_bytes": 5000,
    "max_decoding_bytes": 2_000_000,
    "trace_ratio": 1,
}

WITH = {  # options that need others
    "tls_cert": ["--tls-key", "key.pem"],
    "tls_key": ["--tls-cert", "cert.pem"],
    "tls_client": ["--tls-client-ca", "ca.pem", "--tls-cert", "cert.pem", "--tls-key", "key.pem"],
    "tls_client_ca": ["--tls-cert", "cert.pem", "--tls-key", "key.pem"],
}


def other_than_default(entry: Any) -> str:
    """A valid value that is not the default."""
    if entry.type is bool:
        return str(not entry.default)
    if entry.metadata["choices"]:
        return str(entry.metadata["choices"][-1])
    return TEXTS.get(entry.name) or str(NUMBERS.get(entry.name, 300))


@pytest.mark.parametrize("entry", fields(Settings), ids=lambda entry: entry.name)
def test_every_option_has_a_flag_a_variable_and_help(
    entry: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = other_than_default(entry)
    flag = "--" + entry.name.replace("_", "-")
    others = WITH.get(entry.name, [])
    by_flag = parse([flag, text, *others], {})
    by_variable = parse(others, {PREFIX + entry.name.upper(): text})
    expected = text == "True" if entry.type is bool else entry.type(text)
    assert getattr(by_flag, entry.name) == expected != entry.default
    assert by_flag == by_variable
    with pytest.raises(SystemExit):
        parse(["--help"], {})
    assert flag + " " in capsys.readouterr().out


def test_a_flag_overrides_a_variable_which_overrides_the_default() -> None:
    variables = {"CONVSERVE_PORT": "1001", "CONVSERVE_HTTP_PORT": "1002"}
    settings = parse(["--port", "1003"], variables)
    assert (settings.port, settings.http_port, settings.grace_s) == (1003, 1002, 30.0)


def test_a_boolean_flag_needs_no_value() -> None:
    assert parse(["--allow-shared-memory", "--port=1"], {}).allow_shared_memory
    variables = {"CONVSERVE_ALLOW_SHARED_MEMORY": "1"}
    assert parse([], variables).allow_shared_memory
    assert not parse(["--allow-shared-memory=0"], variables).allow_shared_memory


def test_an_empty_variable_is_ignored() -> None:
    assert parse([], {"CONVSERVE_PORT": "", "CONVSERVE_MODELS": ""}) == Settings()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--port", "65536"], "port is 65536; it must be at most 65,535"),
        (["--port=-1"], "port is -1; it must be at least 0"),
        (["--grace-s", "nan"], "grace_s is nan; it must be at least 0"),
        (["--grace-s", "inf"], "grace_s is inf; it must be at most 86,400"),
        (["--max-image-pixels", "90000000"], "max_image_pixels is 90000000; it must be at most"),
        (["--max-message-bytes", "2147483648"], "it must be at most 2,147,483,647"),
        (["--log-format", "xml"], "log_format is 'xml'; it must be one of text, json"),
        (["--queue-rows", "10"], "queue_rows is 10; it must hold one call of max_images_per_call"),
        (["--max-bytes-in-progress", "5000"], "it must hold one message of max_message_bytes"),
        (["--allow-shared-memory=maybe"], "'maybe' must be one of true, false, 1, 0"),
        (["--prot", "1"], "unrecognized arguments: --prot 1"),
        (["--http", "1"], "unrecognized arguments: --http 1"),
    ],
)
def test_a_wrong_option_ends_with_status_2_and_the_allowed_values(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments, {})
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_variable_with_our_prefix_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([], {"CONVSERVE_PROT": "1"})
    assert caught.value.code == 2
    assert "CONVSERVE_PROT is set, but there is no such option" in capsys.readouterr().err


@pytest.mark.parametrize("service", ["CONVSERVE", "CONVSERVE_HTTP", "CONVSERVE_GRPC"])
def test_variables_of_a_kubernetes_service_with_our_name_are_ignored(service: str) -> None:
    address = "10.0.0.1"
    variables = {
        f"{service}_SERVICE_HOST": address,
        f"{service}_SERVICE_PORT": "8001",
        f"{service}_SERVICE_PORT_GRPC": "8001",
        f"{service}_PORT": f"tcp://{address}:8001",
        f"{service}_PORT_8001_TCP": f"tcp://{address}:8001",
        f"{service}_PORT_8001_TCP_PROTO": "tcp",
        f"{service}_PORT_8001_TCP_PORT": "8001",
        f"{service}_PORT_8001_TCP_ADDR": address,
    }
    assert parse([], variables) == Settings()


def test_other_variables_are_ignored() -> None:
    others = {"PATH": "/bin", "PORT": "1", "CONVSERVE_CACHE": "/tmp", "CONVSERVE_TOKEN": "cs_1_2"}
    assert parse([], others) == Settings()


def test_the_maximum_of_max_image_pixels_is_the_decoders_limit() -> None:
    (entry,) = (entry for entry in fields(Settings) if entry.name == "max_image_pixels")
    maximum = entry.metadata["maximum"]
    assert ImageLimits(pixels=maximum).pixels == maximum
    with pytest.raises(ValueError, match="pixels"):
        ImageLimits(pixels=maximum + 1)


def test_models_are_separated_by_commas() -> None:
    assert Settings(models=" a, b,,c ").model_names() == ["a", "b", "c"]
    assert Settings().model_names() == []
