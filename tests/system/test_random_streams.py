"""Each purpose draws random numbers of its own, and the same ones after resuming."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.core.random_state import Stream, derive_seed, generator_of
from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.spectrum import lanczos, power_iteration, spectral_density, trace
from tests.helpers.trainers import Classifier, classification_data, quiet_trainer


class Noted(Classifier):
    """Notes what the outer data's hooks and the outer loss draw."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.validating:
            self.trainer.noted["batch"].append(torch.rand(3).tolist())
        return batch

    def outer_loss(self, batch):
        self.trainer.noted["outer loss"].append(torch.rand(3).tolist())
        return super().outer_loss(batch)

    def outer_dataloader(self):
        return DataLoader(NotedDataset(self.trainer), batch_size=4)


class NotedDataset(Dataset):
    def __init__(self, trainer) -> None:
        self.trainer, self.data = trainer, classification_data(20, seed=1)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        self.trainer.noted["examples"].append(torch.rand(3).tolist())
        return self.data[index]


def test_the_purposes_of_a_hyper_step_draw_different_numbers():
    """All three were seeded with the same number once, and drew the same values."""
    trainer = quiet_trainer(callbacks=[IFTHypergradient(every_n_batches=1)], limit_val_batches=0)
    trainer.noted = {"examples": [], "batch": [], "outer loss": []}
    trainer.fit(Noted())
    assert all(len(values) >= 4 for values in trainer.noted.values())
    for left, right in itertools.combinations(trainer.noted.values(), 2):
        assert not {tuple(value) for value in left} & {tuple(value) for value in right}


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"rank": 1}], ids=str)
def test_every_argument_changes_the_seed(change):
    assert derive_seed(Stream.LOSSES) == derive_seed(Stream.LOSSES)
    assert derive_seed(Stream.LOSSES, **change) != derive_seed(Stream.LOSSES)
    assert 0 <= derive_seed(Stream.LOSSES, **change) < 2**63


def test_seeds_of_all_purposes_steps_and_ranks_differ():
    """A sum of seed, step and rank would repeat."""
    combinations = list(itertools.product(Stream, range(3), range(3), range(3)))
    seeds = {derive_seed(stream, seed=seed, step=step, rank=rank) for stream, seed, step, rank in combinations}
    assert len(seeds) == len(combinations)


def test_generators_of_different_streams_draw_different_numbers():
    drawn = [torch.rand(2, generator=generator_of(stream)).tolist() for stream in Stream]
    assert len({tuple(numbers) for numbers in drawn}) == len(Stream)
    assert torch.equal(torch.rand(2, generator=generator_of(Stream.TRACE)), torch.tensor(drawn[Stream.TRACE]))


@pytest.mark.parametrize("measure", [lanczos, power_iteration, trace, spectral_density], ids=lambda f: f.__name__)
def test_without_a_generator_a_measurement_repeats_and_draws_nothing(measure):
    operator = MatrixOperator(torch.diag(torch.linspace(-1.0, 2.0, 70, dtype=torch.float64)))
    state = torch.get_rng_state()
    first, again = measure(operator), measure(operator)
    assert repr(first) == repr(again)
    assert torch.equal(torch.get_rng_state(), state)
