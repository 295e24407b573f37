"""Messages of gRPC health checking and of google.rpc error details.

They are declared here, in a descriptor pool of their own, so that the client needs no further
packages and does not clash with those that register the same names.
"""

from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_Field = FieldDescriptorProto
_SCALARS = {
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}
_POOL = DescriptorPool()


def _declare(package: str, messages: dict[str, str]) -> dict[str, Any]:
    """Message classes by name. Fields are written as in a .proto file and numbered from 1."""
    file = FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for name, declared in messages.items():
        message = file.message_type.add(name=name)
        for number, text in enumerate(declared.split(", "), 1):
            *repeated, kind, field_name = text.split()
            field = message.field.add(name=field_name, number=number)
            field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            if kind in _SCALARS:
                field.type = _SCALARS[kind]
            else:
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{package}.{kind}"
    _POOL.Add(file)
    return {
        name: GetMessageClass(_POOL.FindMessageTypeByName(f"{package}.{name}")) for name in messages
    }


# github.com/grpc/grpc-proto, grpc/health/v1/health.proto. An enum is an int32 on the wire.
_health = _declare(
    "grpc.health.v1",
    {"HealthCheckRequest": "string service", "HealthCheckResponse": "int32 status"},
)
HealthCheckRequest = _health["HealthCheckRequest"]
HealthCheckResponse = _health["HealthCheckResponse"]
SERVING = 1
SERVING_STATUS = {0: "UNKNOWN", SERVING: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}

# github.com/googleapis/googleapis, google/rpc/status.proto and error_details.proto. Detail and
# Duration have the fields of google.protobuf.Any and google.protobuf.Duration.
_rpc = _declare(
    "google.rpc",
    {
        "Detail": "string type_url, bytes value",
        "Duration": "int64 seconds, int32 nanos",
        "FieldViolation": "string field, string description",
        "Status": "int32 code, string message, repeated Detail details",
        "BadRequest": "repeated FieldViolation field_violations",
        "RetryInfo": "Duration retry_delay",
    },
)
Status = _rpc["Status"]
BadRequest = _rpc["BadRequest"]
RetryInfo = _rpc["RetryInfo"]
