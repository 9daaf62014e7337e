"""The dense solution."""

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.solvers import (
    Direct,
)


def test_direct_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="use ConjugateGradient"):
        Direct(max_size=3).solve(MatrixOperator(torch.eye(4)), torch.ones(4))
