"""The table of known optimizers."""

import pytest
import torch

from lightning_ifthpo.optimizers import StabilityEdge, UpdateRule, has_edge, is_known
from lightning_ifthpo.optimizers.known import moving, responses

KNOWN = ["SGD", "RMSprop", "Adam", "AdamW", "NAdam", "Adagrad"]


@pytest.mark.parametrize("name", KNOWN)
def test_an_own_subclass_is_read_like_its_base(name):
    base = getattr(torch.optim, name)
    own = type("Own", (base,), {})
    found = []
    for kind in (base, own):
        weight = torch.ones(3, requires_grad=True)
        optimizer = kind([weight], lr=0.1, weight_decay=0.2)
        for gradient in (1.0, 0.5):
            weight.grad = torch.tensor([1.0, -2.0, 4.0]) * gradient
            optimizer.step()
        assert is_known(optimizer)
        assert has_edge(optimizer)
        rule, edge = UpdateRule.of([optimizer], [weight]), StabilityEdge.of(optimizer, [weight])
        found.append([torch.as_tensor(part) for part in (rule.step_size, rule.damping(), edge.sharpness, edge.decay)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_group_at_rest_has_no_decay_in_half_precision_either():
    """In float16, 1e-30 is 0, and the decay of AdamW was once lr · d₀ / max(step, 1e-30) = 0 / 0."""
    moving, resting = (torch.ones(2, dtype=torch.float16, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [moving]}, {"params": [resting], "lr": 0.0}], lr=0.01, eps=1e-4)
    moving.grad = resting.grad = torch.ones(2, dtype=torch.float16)
    optimizer.step()
    rule = UpdateRule.of([optimizer], [moving, resting])
    # the step is the learning rate over |g| = 1, and so d = d₀, up to the rounding of float16
    assert rule.damping().tolist() == pytest.approx([0.01, 0.01, 0.0, 0.0], rel=2e-3)


def test_a_number_for_a_step_of_zero_has_no_decay_either():
    weight = torch.ones(2, requires_grad=True)
    assert UpdateRule.of([torch.optim.AdamW([weight], lr=0.0)], [weight]).damping() == 0.0


def response_of(kind, state=None, **options):
    """The answer of an optimizer with a learning rate of 0.1 and a state that the test sets."""
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = kind([weight], lr=0.1, **options)
    if state is not None:
        optimizer.state[weight] = state
    (found,) = responses([optimizer], [weight])
    assert found.learning_rate == pytest.approx(0.1)
    return found


@pytest.mark.parametrize(
    ("options", "total", "alternating"),
    [
        ({}, 1.0, 1.0),
        ({"dampening": 0.5}, 1.0, 1.0),  # which torch ignores without momentum
        ({"momentum": 0.8}, 5.0, 1 / 1.8),
        ({"momentum": 0.8, "dampening": 0.5}, 2.5, 0.5 / 1.8),
        ({"momentum": 0.8, "nesterov": True}, 5.0, 1.0 + 0.8 / 1.8),
    ],
    ids=str,
)
def test_the_gains_of_gradient_descent_are_those_of_geometric_series(options, total, alternating):
    found = response_of(torch.optim.SGD, **options)
    assert (found.total_gain, found.alternating_gain) == pytest.approx((total, alternating))
    assert found.preconditioner == 1.0


def moments(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "options", "state", "roots"),
    [
        (torch.optim.RMSprop, {}, {"square_avg": moments(4.0, 0.0)}, (2.0, 0.0)),
        (
            torch.optim.RMSprop,
            {"centered": True},
            {"square_avg": moments(5.0, 1.0), "grad_avg": moments(1.0, 1.0 + 1e-9)},  # rounding may exceed the variance
            (2.0, 0.0),
        ),
        (torch.optim.Adagrad, {}, {"step": torch.tensor(3.0), "sum": moments(9.0, 0.0)}, (3.0, 0.0)),
        (
            torch.optim.Adam,
            {"betas": (0.5, 0.75)},
            {"step": torch.tensor(2.0), "exp_avg_sq": moments(7.0, 0.0)},
            (4.0, 0.0),  # √(7 / (1 − 0.75²))
        ),
        (
            torch.optim.Adam,
            {"betas": (0.5, 0.75), "amsgrad": True},
            {"step": torch.tensor(2.0), "exp_avg_sq": moments(1.0, 0.0), "max_exp_avg_sq": moments(7.0, 0.0)},
            (4.0, 0.0),
        ),
    ],
    ids=["RMSprop", "centered", "Adagrad", "Adam", "AMSGrad"],
)
def test_a_preconditioner_is_one_over_the_root_of_the_second_moment_plus_eps(kind, options, state, roots):
    found = response_of(kind, state, eps=0.5, **options)
    assert found.preconditioner.tolist() == pytest.approx([1.0 / (root + 0.5) for root in roots])


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
def test_before_the_first_step_there_is_no_preconditioner(kind):
    assert response_of(kind, eps=0.5).preconditioner == 1.0


def test_adagrad_has_its_first_sum_from_the_start():
    found = response_of(torch.optim.Adagrad, eps=0.5, initial_accumulator_value=4.0)
    assert found.preconditioner.tolist() == [0.4, 0.4]


@pytest.mark.parametrize(
    ("kind", "decoupled"),
    [(torch.optim.SGD, False), (torch.optim.RMSprop, False), (torch.optim.Adam, False), (torch.optim.AdamW, True)],
    ids=["SGD", "RMSprop", "Adam", "AdamW"],
)
def test_weight_decay_is_read_as_coupled_or_not(kind, decoupled):
    found = response_of(kind, weight_decay=0.2)
    assert (found.weight_decay, found.decoupled) == (0.2, decoupled)


@pytest.mark.parametrize(("step", "correction"), [(1.0, 0.5), (2.0, 0.75)])
def test_the_alternating_gain_of_adam_has_the_bias_correction_of_its_step(step, correction):
    state = {"step": torch.tensor(step), "exp_avg_sq": moments(1.0, 1.0)}
    found = response_of(torch.optim.Adam, state, betas=(0.5, 0.9))
    assert found.alternating_gain == pytest.approx(0.5 / 1.5 / correction)
    assert response_of(torch.optim.Adam, betas=(0.5, 0.9)).alternating_gain == pytest.approx(0.5 / 1.5)


def test_without_an_optimizer_nothing_is_answered():
    (found,) = responses([], [torch.ones(2)])
    assert (found.learning_rate, found.preconditioner) == (0.0, 0.0)


def test_a_subclass_without_weight_decay_has_none():
    class Bare(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            for group in self.param_groups:
                del group["weight_decay"]

    rule = UpdateRule.of([Bare([weight := torch.zeros(2, requires_grad=True)])], [weight])
    assert (rule.step_size, rule.decay) == (0.1, 0.0)


def parameter(*, frozen=False):
    return torch.nn.Parameter(torch.zeros(2), requires_grad=not frozen)


def test_parameters_move_at_a_rate_above_zero():
    first, second, frozen, left_out = parameter(), parameter(), parameter(frozen=True), parameter()
    every = [first, second, frozen, left_out]
    rates = {"lr": torch.tensor(0.0)}
    optimizer = torch.optim.SGD([{"params": [first, frozen]}, {"params": [second], **rates}], lr=0.1, foreach=False)
    assert moving([optimizer], every) == [True, False, False, False]
    assert moving([optimizer], iter(every), at_any_rate=True) == [True, True, False, False]
    other = torch.optim.Adam([left_out], lr=0.1)
    assert moving([optimizer, other], every) == [True, False, False, True]


def test_all_that_are_held_move_if_all_rates_are_zero_and_all_trainable_ones_without_an_optimizer():
    first, second, frozen = parameter(), parameter(), parameter(frozen=True)
    every = [first, second, frozen]
    assert moving([torch.optim.SGD([first, frozen], lr=0.0)], every) == [True, False, False]
    assert moving([], every) == [True, True, False]
    assert moving([torch.optim.SGD([frozen, parameter()], lr=0.1)], every) == [True, True, False]


def test_a_damping_does_not_overflow_where_one_over_the_step_does():
    """1/s is beyond the largest float16, 65504, from steps of 1.5e-5 on; 1/(100 s) is not."""
    first, second = (torch.ones(2, dtype=torch.float16, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1e-5}, {"params": [second]}], lr=0.02)
    damping = UpdateRule.of([optimizer], [first, second]).damping(100)
    assert damping.tolist() == pytest.approx([1000.0, 1000.0, 0.5, 0.5], rel=2e-3)
