"""What all hyperparameters with a row for each training example have in common."""

from __future__ import annotations

from torch import Tensor, nn


class PerExample(nn.Module):
    """Base class of modules with a row of `logits` for each training example, by the index that `IndexedDataset` adds.

    `IFTHypergradient` compares `examples` with the training set before the first batch.
    """

    logits: nn.Parameter

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.logits)

    def rows(self, index: Tensor) -> Tensor:
        """Returns the rows of the examples with these indices, integers [B].

        Raises:
            IndexError: If an index is too large, unless it is on a GPU, where torch says it later.
        """
        try:
            return self.logits[index]
        except IndexError as error:
            raise IndexError(
                f"{type(self).__name__} has rows for {self.examples} training examples, and the batch has an index up "
                f"to {int(index.max())}. Wrap the training set in IndexedDataset after it was split, and create "
                f"{type(self).__name__} for as many examples as that has"
            ) from error
