"""Every option of the server once: its default, flag, environment name and help.

A flag wins over `CONVSERVE_<NAME>`, that wins over the default. Nothing else reads the environment.
"""

# Annotations are not postponed here: a field's type is what its flag is parsed with.

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

PREFIX = "CONVSERVE_"

# What Kubernetes sets where a Service is called convserve, or convserve-http; besides, it sets
# CONVSERVE_PORT=tcp://..., the name of an option of ours, and CONVSERVE_HTTP_PORT likewise.
KUBERNETES = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP|SCTP)(_.*)?)")
KUBERNETES_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*")

SWITCH = {"true": True, "false": False, "1": True, "0": False}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    least: float = -math.inf,
    most: float = math.inf,
) -> Any:
    metadata = {"help": help, "choices": choices, "least": least, "most": most}
    return field(default=default, metadata=metadata)


def _default_repo() -> Path:
    return Path("model_repo/engines")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to serve. Checked on creation: ValueError says which option and what it may be."""

    repo: Path = option(_default_repo(), "folder of the model repository")
    models: str = option("", "models to serve, separated by commas; empty serves all there are")
    model_control: str = option(
        "watch",
        "watch: serve what is published, as it is published; explicit: load and unload at a "
        "caller's request (Open Inference Protocol); none: serve what is there at the start",
        choices=("watch", "explicit", "none"),
    )
    version_policy: str = option(
        "latest:1",
        "versions of a model to keep loaded, unless its serving.json says otherwise: latest:N, all "
        "or named:N,N,...",
    )
    bake_time_s: float = option(
        60.0,
        "seconds in which a new version that errs or is too slow goes back to the one before, "
        "which is kept loaded for as long; 0 unloads that at once",
        least=0,
        most=86_400,
    )
    golden_interval_s: float = option(
        600.0,
        "seconds after which every version has its golden inputs checked again; 0 never does",
        least=0,
        most=86_400,
    )
    host: str = option("0.0.0.0", "address to listen on")
    port: int = option(8001, "port of gRPC; 0 takes a free one and logs it", least=0, most=65535)
    http_port: int = option(
        8000,
        "port of HTTP: /v1, /v2, /metrics, /healthz, /readyz; 0 takes a free one",
        least=0,
        most=65535,
    )
    backend: str = option("", "use engines of this backend only; empty takes the best that fits")
    rebuild_engines: bool = option(
        False,
        "where no engine of a version fits this machine, compile one and add it to the version",
    )
    threads: int = option(
        0, "processor cores for CPU engines; 0 takes all this process may use", least=0, most=1024
    )
    decode_threads: int = option(
        0, "threads that decode images; 0 takes one a core", least=0, most=1024
    )
    queue_rows: int = option(
        4096, "images that may wait for one model; further calls are refused", least=1
    )
    scheduler: str = option(
        "deadline",
        "deadline: by latency profile and callers' deadlines; fixed: by size and delay, to compare",
        choices=("deadline", "fixed"),
    )
    fixed_batch: int = option(8, "scheduler fixed: rows that start a batch", least=1)
    fixed_delay_ms: float = option(
        2.0, "scheduler fixed: milliseconds to wait for them", least=0, most=60_000
    )
    max_images_per_call: int = option(256, "images one call may bring", least=1, most=65536)
    max_message_bytes: int = option(
        64 << 20,
        "bytes of one gRPC message, either way, and of the body of one call to /v2",
        least=4096,
        most=2**31 - 1,
    )
    max_bytes_in_progress: int = option(
        1 << 30,
        "bytes of all requests in progress, and of those that are still being received; further "
        "calls are refused. Memory is about four times as much",
        least=4096,
    )
    max_image_bytes: int = option(20 << 20, "bytes of one encoded image", least=64)
    max_image_pixels: int = option(
        50_000_000,
        "pixels of one image, by its header, before decoding",
        least=1,
        most=89_478_485,  # the decoder's own limit, see server.images.decode
    )
    max_calls: int = option(
        4096, "calls in progress at a time; further ones are refused", least=1, most=2**31 - 1
    )
    allow_shared_memory: bool = option(
        False,
        "whether callers may lend shared memory; then any caller has the server read and write "
        "what it may in /dev/shm",
    )
    trace_endpoint: str = option(
        "",
        "HOST:PORT of an OpenTelemetry collector (OTLP over gRPC) that gets traces of calls; empty "
        "traces none; needs the extra otel",
    )
    trace_ratio: float = option(
        0.01,
        "share of the calls to trace whose callers leave it open; the others say by traceparent",
        least=0,
        most=1,
    )
    drain_notice_s: float = option(
        0.0,
        "seconds to go on serving after SIGTERM, NOT_SERVING to who asks, so that balancers send "
        "their calls elsewhere; then the grace begins",
        least=0,
        most=86_400,
    )
    grace_s: float = option(
        30.0,
        "seconds that accepted calls have to finish once no new ones are taken",
        least=0,
        most=86_400,
    )
    log_format: str = option("text", "one line an event, as text or JSON", choices=("text", "json"))
    log_level: str = option(
        "info", "least level logged", choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            least, most, choices = (entry.metadata[key] for key in ("least", "most", "choices"))
            if choices and value not in choices:
                raise ValueError(
                    f"{entry.name} is {value!r}; it must be one of {', '.join(choices)}"
                )
            if entry.type in (int, float) and not least <= value <= most:
                limit = f"at most {most:,}" if value > most else f"at least {least}"
                raise ValueError(f"{entry.name} is {value}; it must be {limit}")
        if self.queue_rows < self.max_images_per_call:
            raise ValueError(
                f"queue_rows is {self.queue_rows}; it must hold one call of max_images_per_call, "
                f"{self.max_images_per_call} images"
            )
        if self.max_bytes_in_progress < self.max_message_bytes:
            raise ValueError(
                f"max_bytes_in_progress is {self.max_bytes_in_progress}; it must hold one message "
                f"of max_message_bytes, {self.max_message_bytes}"
            )

    def model_names(self) -> list[str]:
        return [name.strip() for name in self.models.split(",") if name.strip()]

    def serves(self, model: str) -> bool:
        """Whether a model is to be served without being asked for."""
        names = self.model_names()
        return not names or model in names


def _switch(text: str) -> bool:
    """A flag alone is true; a variable needs a value."""
    if text.lower() not in SWITCH:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SWITCH)}")
    return SWITCH[text.lower()]


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from the command line and the environment; where wrong, ends with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serves the models of a repository over gRPC.",
        epilog=f"Every option can also be set as {PREFIX}<NAME>, as in {PREFIX}HTTP_PORT=8000.",
        allow_abbrev=False,
    )
    for entry in fields(Settings):
        variable = PREFIX + entry.name.upper()
        given = environment.get(variable, "")
        if KUBERNETES_ADDRESS.fullmatch(given):
            given = ""
        switch = entry.type is bool
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=_switch if switch else entry.type,  # a class here, see the top
            nargs="?" if switch else None,
            const=True if switch else None,
            default=given or entry.default,
            metavar=entry.name.upper(),
            help=f"{entry.metadata['help']} (default: {str(entry.default) or repr('')})",
        )
    known = {entry.name.upper() for entry in fields(Settings)} | {"CACHE"}  # CACHE is the build's
    for variable in sorted(environment):
        name = variable.removeprefix(PREFIX)
        of_kubernetes = KUBERNETES.fullmatch(name) or KUBERNETES_ADDRESS.fullmatch(
            environment[variable]
        )
        if name not in known | {variable} and not of_kubernetes:
            parser.error(f"{variable} is set, but there is no such option")
    try:
        return Settings(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))
