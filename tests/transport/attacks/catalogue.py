"""All attacks by name."""

from tests.transport.attacks.attack import Attack
from tests.transport.attacks.floods import calls, connections, frames, http1, tls

ATTACKS: dict[str, Attack] = {
    one.name: one
    for floods in (
        frames.FLOODS,
        calls.FLOODS,
        connections.FLOODS,
        http1.FLOODS,
        tls.FLOODS,
    )
    for one in floods
}

# Variants of other attacks, which the short form leaves out.
LONG_FORM_ONLY = frozenset(
    {
        "ping-unread",
        "settings-unread",
        "settings-table-size",
        "padded-data",
        "priority-of-new-streams",
        "goaway",
        "reset-of-closed-stream",
        "header-literals-90",
        "header-indexed-16000",
        "continuation-small",
        "continuation-large",
        "calls-of-health",
        "calls-of-get-model",
        "calls-of-unknown-methods",
        "protobuf-unknown-fields",
        "protobuf-unpacked-floats",
        "gzip-bomb-of-many-members",
        "deflate-bomb",
        "connections-of-tls",
        "connections-of-one-call",
        "connections-of-hello-and-garbage",
        "connections-closed-after-hello",
        "http-connections-of-garbage",
        "http-endless-field",
        "http-endless-target",
        "http-chunk-extensions",
        "http-chunk-size-endless",
        "tls-hello-unanswered",
        "tls-empty-records",
        "tls-of-plaintext",
        "tls-http-hello-and-garbage",
        "http-pipelined-healthz",
        "http-pipelined-metrics",
        "http-pipelined-unknown-paths",
        "http-json-big-numbers",
        "http-json-objects",
        "http-form-part-head",
        "http-image-broken",
    }
)
