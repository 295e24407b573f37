"""Tests of model_repo.onnx_import."""
