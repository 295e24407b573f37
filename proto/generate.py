"""Command: writes the stubs of proto/*.proto into the packages that use them (`make proto`).

    python proto/generate.py [--root FOLDER]

The server gets the messages of both contracts. The client gets those of classify.proto and its gRPC
stubs. Both register classify.proto under the same file name, because a descriptor pool rejects a
second file with the same messages. The messages of package `inference` go into separate pools,
because tritonclient registers messages with the same names in the default pool. The client's load
generator builds them from a descriptor file.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# folder of the stubs, and their package
SERVER = ("server/api/stubs", "server.api.stubs")
CLIENT = ("clients/convserve_client/stubs", "convserve_client.stubs")
CONTRACTS = {  # file of the contract: name in the descriptor pool
    "classify.proto": "convserve/v1/classify.proto",
    "open_inference.proto": "inference/open_inference.proto",
}
CLASSIFY = ("classify_pb2.py", "classify_pb2.pyi")
STUBS = {  # modules of protoc that each package gets
    SERVER: (*CLASSIFY, "open_inference_pb2.py", "open_inference_pb2.pyi"),
    CLIENT: (*CLASSIFY, "classify_pb2_grpc.py"),
}
DESCRIPTOR = "clients/convserve_client/loadgen/protocols/open_inference.binpb"
DEFAULT_POOL = "_descriptor_pool.Default()"


def run_protoc(folder: Path) -> dict[str, str]:
    """Source of every module that protoc and its plugins write, by file name."""
    mapped = [f"-I{Path(name).parent}={ROOT / 'proto'}" for name in CONTRACTS.values()]
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "grpc_python", "mypy")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", *mapped, *outputs, *CONTRACTS.values()]
    plugins = {
        "PATH": str(Path(sys.executable).parent)
    }  # the plugin of mypy-protobuf is next to python
    subprocess.run(protoc, env=plugins, check=True, stderr=subprocess.PIPE)
    return {path.name: path.read_text() for path in folder.rglob("*_pb2*.py*")}


def descriptor_set() -> bytes:
    """open_inference.proto as a FileDescriptorSet without comments."""
    name = CONTRACTS["open_inference.proto"]
    with tempfile.NamedTemporaryFile() as file:
        mapped = f"-I{Path(name).parent}={ROOT / 'proto'}"
        output = f"--descriptor_set_out={file.name}"
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", mapped, output, name], check=True
        )
        return Path(file.name).read_bytes()


def with_imports_from(text: str, package: str) -> str:
    """The module, importing its siblings from `package`."""
    siblings = r"^from (convserve\.v1|inference) import "
    text = re.sub(siblings, f"from {package} import ", text, flags=re.M)
    return re.sub(r"'(convserve\.v1|inference)\.(\w+_pb2)'", rf"'{package}.\2'", text)


def with_own_pool(text: str) -> str:
    """The module, registering its messages in the server's own pool."""
    assert text.count(DEFAULT_POOL) == 1
    text = text.replace(DEFAULT_POOL, "POOL")
    imported = "from google.protobuf import descriptor_pool as _descriptor_pool\n"
    assert text.count(imported) == 1
    return text.replace(imported, "from server.api.stubs.pool import POOL\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="folder to write to (%(default)s)")
    root: Path = parser.parse_args().root
    with tempfile.TemporaryDirectory() as folder:
        texts = run_protoc(Path(folder))
    for (place, package), names in STUBS.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for name in names:
            text = with_imports_from(texts[name], package)
            if name == "open_inference_pb2.py":
                text = with_own_pool(text)
            (root / place / name).write_text(text)
    (root / DESCRIPTOR).parent.mkdir(parents=True, exist_ok=True)
    (root / DESCRIPTOR).write_bytes(descriptor_set())
    return 0


if __name__ == "__main__":
    sys.exit(main())
