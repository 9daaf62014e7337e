"""Shared fixtures."""

from __future__ import annotations

import pytest
import torch

from tests.problems import SoftmaxRegression


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the problems are small, and threads would only wait for each other; examples set two


@pytest.fixture(scope="session")
def digits() -> SoftmaxRegression:
    """Softmax regression on digits at its inner optimum: 650 weights, a log decay for each, float64."""
    return SoftmaxRegression.at_optimum()
