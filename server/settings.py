"""All options of the server: default, flag, environment variable and help in one place.

A flag overrides the variable `CONVSERVE_<NAME>`, which overrides the default. No other module reads
the environment.
"""

# Annotations are evaluated in this module: a field's type parses the text of its flag.

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

PREFIX = "CONVSERVE_"
OTHER_VARIABLES = {"CACHE", "TOKEN"}  # they belong to the build and to clients

# Kubernetes sets variables with our prefix if a Service is called convserve or convserve-http.
# CONVSERVE_PORT=tcp://... and CONVSERVE_HTTP_PORT even have the names of our options.
KUBERNETES = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP|SCTP)(_.*)?)")
KUBERNETES_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*")

ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\s]+")

BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float = -math.inf,
    maximum: float = math.inf,
) -> Any:
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """Limits on the connections of clients."""

    max_connections: int = option(
        8192,
        "open connections of both ports; further ones are closed at once",
        minimum=1,
        maximum=1 << 20,
    )
    max_connections_per_peer: int = option(
        1024,
        "open connections from one address (IPv6: from one /64 network) to both ports",
        minimum=1,
        maximum=1 << 20,
    )
    trusted_peers: str = option(
        "",
        "addresses and networks of proxies, separated by commas, for example 10.0.0.0/8; they have "
        "no limits by peer",
    )
    http_keep_alive_s: float = option(
        3660.0,
        "seconds after which an idle HTTP connection is closed; must be longer than the idle "
        "timeout of the load balancer in front",
        minimum=1,
        maximum=86_400,
    )
    tls_handshake_timeout_s: float = option(
        10.0, "seconds for a TLS handshake", minimum=0.1, maximum=600
    )
    max_handshakes: int = option(
        512,
        "TLS handshakes in progress; a further one ends the one whose client has been silent for "
        "the longest time",
        minimum=2,
        maximum=65_536,
    )
    max_streams_per_connection: int = option(
        256,
        "gRPC calls at a time on one connection; clients hold further ones back",
        minimum=1,
        maximum=2**31 - 1,
    )
    max_connection_idle_s: float = option(
        900.0,
        "seconds without a call after which a gRPC connection ends (GOAWAY; clients connect again "
        "when they need to); 0: never",
        minimum=0,
        maximum=31_536_000,
    )
    max_connection_age_s: float = option(
        0.0,
        "seconds after which a connection ends, so that clients choose a server again (gRPC: "
        "GOAWAY, calls in progress finish; HTTP: with its next response); varies by a tenth; 0: "
        "never",
        minimum=0,
        maximum=31_536_000,
    )
    max_connection_age_grace_s: float = option(
        300.0,
        "seconds for the calls of a gRPC connection that has reached its maximum age; 0: no limit",
        minimum=0,
        maximum=31_536_000,
    )
    max_unsent_bytes: int = option(
        256 << 20,
        "bytes of gRPC responses that wait for their clients to read them; above it, or a quarter "
        "of it on one connection, the connection with the most is cut",
        minimum=1 << 20,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ConnectionSettings):
    """Options of the server. The constructor raises ValueError with the option and its limits."""

    repo: Path = option(Path("model_repo/engines"), "folder of the model repository")
    allowed_roots: str = option(
        "",
        "folders outside the repository that symbolic links in it may lead into, separated by "
        "commas",
    )
    models: str = option("", "models to serve, separated by commas; empty serves all")
    model_control: str = option(
        "watch",
        "watch: load new versions when they are published; explicit: load and unload models when a "
        "client asks (Open Inference Protocol); none: serve what is published at the start",
        choices=("watch", "explicit", "none"),
    )
    version_policy: str = option(
        "latest:1",
        "versions of each model to keep loaded: latest:N, all or named:N,N,...; serving.json of a "
        "model overrides it",
    )
    bake_time_s: float = option(
        60.0,
        "seconds after a new version starts to serve in which it is rolled back if a batch fails "
        "or it misses its latency objective; the previous version stays loaded meanwhile; 0 "
        "unloads it at once",
        minimum=0,
        maximum=86_400,
    )
    golden_interval_s: float = option(
        600.0,
        "seconds between golden checks of each loaded version; 0 checks only at load",
        minimum=0,
        maximum=86_400,
    )
    host: str = option(
        "0.0.0.0", "address or name to listen on; [::] is all addresses, IPv4 and IPv6"
    )
    port: int = option(8001, "gRPC port; 0 takes a free port and logs it", minimum=0, maximum=65535)
    http_port: int = option(
        8000,
        "HTTP port for /v1, /v2, /metrics, /healthz and /readyz; 0 takes a free port",
        minimum=0,
        maximum=65535,
    )
    unix_socket: str = option("", "path of a Unix socket for gRPC, in place of --host and --port")
    http_unix_socket: str = option(
        "", "path of a Unix socket for HTTP, in place of --host and --http-port"
    )
    tls_cert: str = option(
        "",
        "PEM file with the certificate of the server and its intermediates; both ports then speak "
        "TLS only; the TLS files are read again when they change",
    )
    tls_key: str = option("", "PEM file with the private key of --tls-cert, without a passphrase")
    tls_client_ca: str = option(
        "", "PEM file with the CAs whose clients may connect; empty asks for no client certificate"
    )
    tls_client: str = option(
        "",
        "with --tls-client-ca: required, also if it is empty, refuses clients without a "
        "certificate, on the HTTP port except for /healthz and /readyz; optional lets them connect",
    )
    http_tls: bool = option(
        True, "with --tls-cert: false leaves the HTTP port without TLS and certificates"
    )
    cors_origin: str = option(
        "",
        "origins whose web pages may call the HTTP port from a browser, separated by commas, for "
        "example https://app.example; * allows all; empty allows none",
    )
    auth: str = option(
        "",
        "file of principals, their tokens, certificates and permissions (TOML); read again when it "
        "changes; empty lets everybody call",
    )
    max_auth_failures_per_min: int = option(
        600,
        "wrong credentials from one address in a minute; then only credentials that were right "
        "before are accepted from it; 0 sets no limit",
        minimum=0,
    )
    allow_remote_admin: bool = option(
        False,
        "without an auth file, answer methods that change something for callers on other machines "
        "too",
    )
    backend: str = option(
        "", "use only engines of this backend; empty takes the best one that works"
    )
    rebuild_engines: bool = option(
        False,
        "if no engine of a version works on this machine, compile one and add it to the version",
    )
    threads: int = option(
        0,
        "processor cores for CPU engines; 0 takes all that the process may use",
        minimum=0,
        maximum=1024,
    )
    decode_threads: int = option(
        0, "threads that decode images; 0 starts one per core", minimum=0, maximum=1024
    )
    queue_rows: int = option(
        4096, "images that may wait for one model; further requests are refused", minimum=1
    )
    scheduler: str = option(
        "deadline",
        "deadline: batch by latency profile and request deadlines; fixed: batch by size and delay, "
        "for comparison",
        choices=("deadline", "fixed"),
    )
    fixed_batch: int = option(8, "scheduler fixed: rows that start a batch", minimum=1)
    fixed_delay_ms: float = option(
        2.0,
        "scheduler fixed: milliseconds to wait for a full batch",
        minimum=0,
        maximum=60_000,
    )
    max_images_per_call: int = option(256, "images in one request", minimum=1, maximum=65536)
    max_message_bytes: int = option(
        64 << 20,
        "bytes of one gRPC message in either direction, and of one HTTP body for /v2",
        minimum=4096,
        maximum=2**31 - 1,
    )
    max_bytes_in_progress: int = option(
        1 << 30,
        "bytes of all requests in progress, those still being received included; further requests "
        "are refused; without images to decode, the process needs about four times as much memory",
        minimum=4096,
    )
    max_image_bytes: int = option(20 << 20, "bytes of one encoded image", minimum=64)
    max_image_pixels: int = option(
        50_000_000,
        "pixels of one encoded image; its header is checked before decoding",
        minimum=1,
        maximum=89_478_485,  # the decoder's own limit, see server.images.decode
    )
    max_decoding_bytes: int = option(
        1 << 30,
        "bytes of memory for images that are decoded at the same time; further images wait, and an "
        "image that alone needs more is refused",
        minimum=1 << 20,
    )
    max_calls: int = option(
        4096, "calls in progress; further calls are refused", minimum=1, maximum=2**31 - 1
    )
    allow_shared_memory: bool = option(
        False,
        "let clients register shared memory regions; any client can then make the server read and "
        "write every region in /dev/shm that the server may access",
    )
    trace_endpoint: str = option(
        "",
        "HOST:PORT of an OpenTelemetry collector (OTLP over gRPC); empty disables tracing; needs "
        "the extra otel",
    )
    trace_ratio: float = option(
        0.01,
        "fraction of requests to sample if no traceparent is sent",
        minimum=0,
        maximum=1,
    )
    drain_notice_s: float = option(
        0.0,
        "seconds to keep serving after SIGTERM while health checks report NOT_SERVING, so that "
        "load balancers drain this server; the grace period follows",
        minimum=0,
        maximum=86_400,
    )
    grace_s: float = option(
        30.0,
        "seconds for accepted requests to finish after the server stops accepting new ones",
        minimum=0,
        maximum=86_400,
    )
    log_format: str = option(
        "text", "format of the log, one line per event", choices=("text", "json")
    )
    log_level: str = option(
        "info", "lowest level to log", choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check(entry.name, getattr(self, entry.name), entry.type, entry.metadata)
        if bool(self.tls_cert) != bool(self.tls_key):
            given, missing = ("tls_cert", "tls_key") if self.tls_cert else ("tls_key", "tls_cert")
            raise ValueError(f"{given} is set, but {missing} is not; TLS needs both")
        if self.tls_client not in ("", "required", "optional"):
            raise ValueError(f"tls_client is {self.tls_client!r}; it must be required or optional")
        if self.tls_client and not self.tls_client_ca:
            raise ValueError(
                f"tls_client is {self.tls_client!r}, but tls_client_ca is not set; it names the "
                "CAs whose clients may connect"
            )
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca is set, but tls_cert and tls_key are not")
        for origin in self.cors_origins():
            if not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"cors_origin has {origin!r}; an origin is scheme://host or scheme://host:port "
                    "without a path, or *"
                )
        self.trusted_networks()
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
        return split_list(self.models)

    def allowed_root_folders(self) -> list[Path]:
        return [Path(name) for name in split_list(self.allowed_roots)]

    def cors_origins(self) -> list[str]:
        """The origins as browsers send them: in lower case, without a slash at the end."""
        origins = (one.strip().removesuffix("/").lower() for one in self.cors_origin.split(","))
        return [origin for origin in origins if origin]

    def trusted_networks(self) -> list[IPv4Network | IPv6Network]:
        """Raises ValueError for what is neither an address nor a network."""
        networks = []
        for name in split_list(self.trusted_peers):
            try:
                networks.append(ip_network(name, strict=False))
            except ValueError:
                raise ValueError(
                    f"trusted_peers has {name!r}; an address such as 10.0.0.7 or a network such as "
                    "10.0.0.0/8 is needed"
                ) from None
        return networks

    def listens_outside(self) -> bool:
        """Whether clients on other machines can reach one of the ports."""
        has_tcp = not (self.unix_socket and self.http_unix_socket)
        return has_tcp and not self.host.startswith(("127.", "localhost", "::1", "[::1"))

    def serves(self, model: str) -> bool:
        """Whether to serve a model without a client's request to load it."""
        names = self.model_names()
        return not names or model in names


def split_list(text: str) -> list[str]:
    """The parts of a list that is separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Reads the settings; ends the process with status 2 and a message if they are wrong."""
    parser = _parser(environment)
    _check_variables(parser, environment)
    try:
        return Settings(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """A flag for each option; the default is the variable's value, if it is set."""
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serves the models of a repository over gRPC and HTTP.",
        epilog=f"Every option can also be set as {PREFIX}<NAME>, as in {PREFIX}HTTP_PORT=8000.",
        allow_abbrev=False,
    )
    for entry in fields(Settings):
        value = environment.get(PREFIX + entry.name.upper(), "")
        if KUBERNETES_ADDRESS.fullmatch(value):
            value = ""
        is_switch = entry.type is bool
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=_boolean if is_switch else entry.type,  # a class, see the top of the file
            nargs="?" if is_switch else None,
            const=True if is_switch else None,
            default=value or entry.default,
            metavar=entry.name.upper(),
            help=f"{entry.metadata['help']} (default: {str(entry.default) or repr('')})",
        )
    return parser


def _check_variables(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Rejects variables with our prefix that are no option: they are probably misspelt."""
    known = {entry.name.upper() for entry in fields(Settings)} | OTHER_VARIABLES
    for variable in sorted(environment):
        name = variable.removeprefix(PREFIX)
        if name == variable or name in known or KUBERNETES.fullmatch(name):
            continue
        if not KUBERNETES_ADDRESS.fullmatch(environment[variable]):
            parser.error(f"{variable} is set, but there is no such option")


def _check(name: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> None:
    choices, minimum, maximum = (metadata[key] for key in ("choices", "minimum", "maximum"))
    if choices and value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
    if kind in (int, float) and not minimum <= value <= maximum:
        limit = f"at most {maximum:,}" if value > maximum else f"at least {minimum}"
        raise ValueError(f"{name} is {value}; it must be {limit}")


def _boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(BOOLEANS)}")
    return BOOLEANS[text.lower()]
