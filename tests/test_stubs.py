"""Generated stubs match the .proto files, and every field there has a comment."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = sorted((ROOT / "proto").glob("*.proto"))


def test_the_committed_stubs_equal_the_output_of_make_proto(tmp_path: Path) -> None:
    command = [sys.executable, "proto/generate.py", "--root", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 8
    for path in made:
        name = path.relative_to(tmp_path)
        assert (ROOT / name).read_bytes() == path.read_bytes(), f"{name}: run make proto"


def test_one_process_can_import_all_stubs_and_tritons_client() -> None:
    code = """
import convserve_client
from convserve_client.stubs import classify_pb2 as client_stubs
from convserve_client.loadgen.protocols import open_inference_messages as open_inference
from server.api.stubs import classify_pb2, open_inference_pb2
import tritonclient.grpc
from tritonclient.grpc import service_pb2

assert client_stubs.ClassifyRequest is classify_pb2.ClassifyRequest
request = open_inference_pb2.ModelInferRequest(model_name="lenet5")
for message_type in (service_pb2.ModelInferRequest, open_inference.ModelInferRequest):
    assert message_type.FromString(request.SerializeToString()).model_name == "lenet5"
"""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'clients'}"}
    for order in (code, "import tritonclient.grpc\n" + code):
        subprocess.run([sys.executable, "-c", order], cwd=ROOT, env=paths, check=True)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda path: path.name)
def test_every_rpc_field_and_value_has_a_comment(contract: Path) -> None:
    lines = [line.strip() for line in contract.read_text().splitlines()]
    declared = re.compile(r"(repeated )?[\w.]+ \w+ = \d+;|rpc \w+\(")
    count = 0
    for before, line in zip(lines, lines[1:], strict=False):
        if declared.match(line) and not line.startswith(("syntax", "option")):
            count += 1
            assert before.startswith("//"), f"{line} has no comment"
    assert count > 20
