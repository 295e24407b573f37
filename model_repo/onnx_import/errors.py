"""The error of this package."""

from model_repo.checkpoints.reader import WrongCheckpoint


class UnusableGraph(WrongCheckpoint):
    """The ONNX file can't be served. The message continues a sentence: "net.onnx " + "has ..."."""
