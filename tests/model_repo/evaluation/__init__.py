"""Tests of model_repo.evaluation."""
