import pytest
import torch

from examples.experiments import stackelberg_gan as example
from examples.experiments.common import start


@pytest.fixture(autouse=True)
def _silent():
    start(ignore=["outer examples are training examples"])


def run_of(samples):
    """A run whose only look saw these samples."""
    return example.Run(samples.unsqueeze(0), 1.0)


def test_a_mode_is_covered_by_two_percent_of_the_samples_within_three_deviations():
    near = 2.9 * example.DEVIATION / 2**0.5  # along both axes
    samples = torch.full((1000, 2), 10.0)
    samples[:20] = example.MODES[0] + near
    samples[20:39] = example.MODES[3]  # one too few
    samples[39:60] = example.MODES[5] + 1.1 * near
    run = run_of(samples)
    assert run.covered.tolist() == [1.0]
    assert run.quality.item() == pytest.approx(0.039)
    assert run.final == (1.0, pytest.approx(0.039))


def test_real_points_are_of_the_highest_quality():
    torch.manual_seed(0)
    samples = example.real_points(8000)
    run = run_of(samples)
    assert run.covered.tolist() == [8.0]
    # the fraction of a two-dimensional Gaussian within three deviations; standard error 0.001
    assert run.quality.item() == pytest.approx(1.0 - torch.tensor(-4.5).exp().item(), abs=0.004)


def test_figures_are_means_over_the_last_quarter():
    looks = torch.full((8, 100, 2), 10.0)
    looks[6] = example.MODES[0]
    assert example.Run(looks, 1.0).final == (0.5, 0.5)


def test_the_ordinary_game_follows_the_direct_gradient():
    """Adam's first step is its rate times the sign of the gradient, after the first step of the discriminator."""
    torch.manual_seed(3)
    module, twin = example.RingGAN("balanced", 1), example.RingGAN("balanced", 1)
    twin.load_state_dict(module.state_dict())
    batch = example.real_points(64)
    callback = example.DirectGradient()
    callback.on_train_start(None, module)
    torch.manual_seed(4)
    callback.on_train_batch_end(None, module, None, batch, 0)
    twin.generator.requires_grad_(True)
    torch.manual_seed(4)
    gradients = torch.autograd.grad(twin.outer_loss(batch), list(twin.hyperparameters()))
    for moved, origin, gradient in zip(module.hyperparameters(), twin.hyperparameters(), gradients, strict=True):
        assert torch.allclose(moved, origin - 3e-3 * gradient / (gradient.abs() + 1e-8), atol=1e-6)
    assert not any(parameter.requires_grad for parameter in module.hyperparameters())


def test_the_implicit_term_covers_modes_that_a_lagging_discriminator_drops():
    ordinary, implicit = (example.play("lagging", method, 100, 1500).final for method in example.METHODS)
    assert implicit[0] > ordinary[0] + 2.0  # measured: 5.9 and 1.4 of 8
    assert implicit[1] > ordinary[1] + 0.05  # 0.23 and 0.12
