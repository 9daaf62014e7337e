"""Linear systems."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ifthpo.curvature import MatrixOperator
from tests.helpers.device import DTYPE, randn


class Counted(MatrixOperator):
    """Counts its products."""

    count = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.count += 1
        return super().matvec(v)


def right_hand_side(size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return randn(size, seed=2, dtype=dtype)
