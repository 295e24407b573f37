"""Tests of model_repo.quantization."""
