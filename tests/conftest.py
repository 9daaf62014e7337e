"""Shared fixtures."""

from __future__ import annotations

import logging
import platform
from importlib.metadata import version

import pytest
import torch

pytest.register_assert_rewrite("tests.checks")  # so that a failed check shows its values

from tests.helpers.device import deterministic  # noqa: E402
from tests.helpers.problems import SoftmaxRegression  # noqa: E402

deterministic()


@pytest.fixture(autouse=True)
def _reproducible():
    deterministic()  # again, because a Trainer may have asked for something else
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the problems are small, and threads would only wait for each other; examples set two
    # for caplog: without a handler of the root logger at its import, Lightning passes no message on
    logging.getLogger("lightning.pytorch").propagate = True


@pytest.fixture(scope="session", autouse=True)
def _versions(record_testsuite_property):
    record_testsuite_property("Python", platform.python_version())
    for package in ("torch", "lightning", "torchmetrics", "torchvision"):
        record_testsuite_property(package, version(package))


@pytest.fixture(scope="session")
def digits() -> SoftmaxRegression:
    """Softmax regression on digits at its inner optimum: 650 weights, a log decay for each, float64."""
    return SoftmaxRegression.at_optimum()
