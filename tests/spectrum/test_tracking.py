"""A spectrum that changes."""

from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.curvature import HessianOperator, MatrixOperator
from lightning_ifthpo.spectrum import SpectrumTracker, lanczos
from tests.helpers.device import DEVICE, WHERE
from tests.helpers.problems import digits_data, spd_matrix


@pytest.mark.parametrize(("method", "delay"), [("lanczos", 0), ("power_iteration", 10)])
def test_a_tracker_sees_one_eigenvalue_overtake_another(method, delay):
    """Eigenvectors stay as they are, so that the old one knows nothing of the new one."""
    tracker = SpectrumTracker(method, max_iterations=200)
    bulk = torch.linspace(-0.1, 0.1, 300, device=DEVICE).to(**WHERE)
    overtaken = 0
    for shift in torch.linspace(-0.5, 1.0, 31, device=DEVICE).tolist():
        values = torch.cat([torch.tensor([1.0 - shift, 1.0 + shift, -0.5], device=DEVICE).to(**WHERE), bulk])
        result = tracker.measure(MatrixOperator(torch.diag(values)))
        overtaken += shift > 0
        if overtaken == 0 or overtaken > delay:
            # the residual is 1 %, and the error of the value at most that, which for power iteration is all one knows
            assert result.largest[0].item() == pytest.approx(1.0 + abs(shift), rel=0.02)
            assert result.smallest[0].item() == pytest.approx(-0.5, abs=0.05)


@pytest.mark.slow
def test_a_tracker_follows_gradient_descent_with_five_products():
    """2,000 full-batch steps, measured every 20: λ_max to 1 % of a cold and precise measurement, each time."""
    images, labels = digits_data()
    images, labels = (images[:1000] - images[:1000].mean(0)).float(), F.one_hot(labels[:1000], 10).float()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10)).to(DEVICE)
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.2)
    warm, products = SpectrumTracker(rtol=1e-2), []

    def loss():
        return (net(images) - labels).square().sum(1).mean() / 2

    for step in range(2000):
        if step % 20 == 0:
            operator = HessianOperator(loss, parameters)
            result = warm.measure(operator)
            assert result.converged
            products.append(result.products)
            if step % 200 == 0:
                exact = lanczos(operator, rtol=1e-5).largest[0].item()
                assert result.largest[0].item() == pytest.approx(exact, rel=1e-2)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert median(products) <= 5


def test_a_tracker_goes_on_from_its_state():
    operators = [MatrixOperator(spd_matrix(60, 1e3) * scale) for scale in (1.0, 1.1, 1.2)]
    whole, first, second = SpectrumTracker(), SpectrumTracker(), SpectrumTracker()
    wanted = [whole.measure(operator).largest for operator in operators]
    first.measure(operators[0])
    second.load_state_dict(first.state_dict())
    assert [second.measure(operator).largest for operator in operators[1:]] == wanted[1:]


def test_a_tracker_survives_a_change_of_size_and_a_nan():
    tracker = SpectrumTracker()
    for size in (5, 7):
        assert tracker.measure(MatrixOperator(torch.eye(size, device=DEVICE))).largest.item() == pytest.approx(1.0)
    broken = MatrixOperator(torch.eye(7, device=DEVICE))
    broken.matrix = torch.full((7, 7), torch.nan, device=DEVICE)
    assert bool(tracker.measure(broken).largest.isnan())
    assert tracker.measure(MatrixOperator(2 * torch.eye(7, device=DEVICE))).largest.item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lobpcg"}, "method to be one of"),
        ({"k": 0}, "k to be an integer >= 1"),
        ({"k": 1.5}, "k to be an integer"),
        ({"method": "power_iteration", "k": 2}, "power iteration finds one eigenvalue"),
        ({"max_iterations": 1}, "max_iterations to be an integer >= 2"),
        ({"rtol": 0.0}, "0 < rtol"),
        ({"rtol": float("nan")}, "0 < rtol"),
    ],
)
def test_a_tracker_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SpectrumTracker(**options)


@pytest.mark.parametrize("method", ["lanczos", "power_iteration"])
def test_the_next_measurement_starts_from_the_last_and_takes_five_products_at_least(method):
    values = torch.cat([torch.tensor([-2.0, 3.0], **WHERE), torch.linspace(-1.0, 1.0, 100, **WHERE)])
    tracker, operator = SpectrumTracker(method, max_iterations=200), MatrixOperator(torch.diag(values))
    cold, warm = tracker.measure(operator), tracker.measure(operator)
    assert cold.converged
    assert warm.converged
    ends = 1 if method == "lanczos" else 2
    assert ends * 5 <= warm.products < cold.products


def test_noise_shows_a_power_iteration_what_an_exact_eigenvector_hides():
    """The start is the old eigenvector, which is still one, but no longer that of the largest eigenvalue."""
    tracker = SpectrumTracker("power_iteration", max_iterations=200)
    tracker.load_state_dict({"measurements": 1, "last": torch.eye(4, **WHERE)[:2]})
    result = tracker.measure(MatrixOperator(torch.diag(torch.tensor([1.0, -1.0, 2.0, -2.0], **WHERE))))
    assert result.largest.item() == pytest.approx(2.0, rel=1e-2)
    assert result.smallest.item() == pytest.approx(-2.0, rel=1e-2)
