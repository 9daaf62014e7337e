"""Shared fixtures."""

from __future__ import annotations

import pytest
import torch

from tests.problems import SoftmaxRegression

torch.set_num_threads(1)  # the problems are small, and threads would only wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> SoftmaxRegression:
    """Softmax regression on digits at its inner optimum: 650 weights, a log decay for each, float64."""
    return SoftmaxRegression.at_optimum()
