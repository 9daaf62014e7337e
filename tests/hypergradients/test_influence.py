"""Influence against the formula of Koh and Liang, computed densely, and against retraining without each example."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ifthpo import Hypergradient, Influence, Loss, influence
from lightning_ifthpo.curvature import GaussNewtonOperator, HessianOperator, mark_outputs
from lightning_ifthpo.solvers import ConjugateGradient, Direct, Identity, Status
from tests.helpers.device import DEVICE, FLOAT64, random_state, set_random_state
from tests.helpers.networks import Net
from tests.helpers.problems import digits_data, relative_error


@dataclass
class Logistic:
    """Is a digit a 3 or an 8? 200 training and 157 test examples, and a penalty that makes the minimum unique."""

    decay: float = 0.1

    def __post_init__(self) -> None:
        images, digits = digits_data()
        chosen = (digits == 3) | (digits == 8)
        inputs = torch.cat([images[chosen], torch.ones(int(chosen.sum()), 1, **FLOAT64)], dim=1)
        labels = (digits[chosen] == 8).to(torch.float64)
        self.inputs, self.test_inputs = inputs[:200], inputs[200:]
        self.labels, self.test_labels = labels[:200], labels[200:]
        self.w = self.minimum(torch.ones(200, **FLOAT64)).requires_grad_()

    def losses(self) -> Tensor:
        logits = mark_outputs(self.inputs @ self.w)
        return F.binary_cross_entropy_with_logits(logits, self.labels, reduction="none")

    def penalty(self) -> Tensor:
        return self.decay * self.w.square().sum() / 2

    def test_loss(self) -> Tensor:
        return self.test_loss_at(self.w)

    def test_loss_at(self, w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.test_inputs @ w, self.test_labels)

    def influence(self, **options) -> Influence:
        ours = {"losses": self.losses, "test_loss": self.test_loss, "parameters": [self.w], "penalty": self.penalty}
        return influence(**(ours | options))

    def hessian(self, w: Tensor, weights: Tensor, decay: float) -> Tensor:
        p = torch.sigmoid(self.inputs @ w)
        curved = self.inputs.T * (weights * p * (1 - p) / len(p)) @ self.inputs
        return curved + decay * torch.eye(len(w), **FLOAT64)

    def minimum(self, weights: Tensor, decay: float | None = None) -> Tensor:
        """By Newton's method, of Σ s_i l_i / N + penalty for s: [N]."""
        decay, w = self.decay if decay is None else decay, torch.zeros(65, **FLOAT64)
        for _ in range(20):
            p = torch.sigmoid(self.inputs @ w)
            gradient = self.inputs.T @ (weights * (p - self.labels)) / len(p) + decay * w
            if gradient.norm() < 1e-14:
                break
            w = w - torch.linalg.solve(self.hessian(w, weights, decay), gradient)
        assert gradient.norm() < 1e-12
        return w

    def changes(self, weight: float = 0.0, decay: float | None = None) -> Tensor:
        """What retraining with another weight for one example does to the test loss, [N]."""
        changes = []
        for index in range(200):
            weights = torch.ones(200, **FLOAT64)
            weights[index] = weight
            changes.append(self.test_loss_at(self.minimum(weights, decay)) - self.test_loss().detach())
        return torch.stack(changes)

    def leverages(self) -> Tensor:
        """x_iᵀ H⁻¹ x_i p_i (1 − p_i) / N, [N], which is what a first-order change leaves out."""
        w = self.w.detach()
        p = torch.sigmoid(self.inputs @ w)
        solved = torch.linalg.solve(self.hessian(w, torch.ones_like(p), self.decay), self.inputs.T)
        return (self.inputs.T * solved).sum(0) * p * (1 - p) / len(p)


@pytest.fixture(scope="module")
def logistic():
    return Logistic()


EXACT = ConjugateGradient(max_iterations=1000, rtol=1e-12)


@pytest.mark.parametrize(
    ("curvature", "solver", "bound"),
    [
        ("hessian", Direct(), 1e-9),
        ("hessian", EXACT, 1e-9),
        ("gauss_newton", EXACT, 1e-9),  # the Hessian, for a linear model
        # products that are exact to 1e-9, seen through a condition number of 425
        ("finite_difference", ConjugateGradient(max_iterations=200, rtol=1e-8), 1e-6),
    ],
    ids=["hessian-direct", "hessian-cg", "gauss_newton-cg", "finite_difference-cg"],
)
def test_equals_the_dense_formula_of_koh_and_liang(digits, curvature, solver, bound):
    """−I_up,loss(z_i, z_test) / N, equation 2 of Koh and Liang (2017), for 900 examples and 650 weights."""
    images, labels = digits.training
    values = torch.cat([digits.weight.reshape(-1), digits.bias]).detach()

    def losses_at(flat):
        return F.cross_entropy(images @ flat[:640].view(10, 64).T + flat[640:], labels, reduction="none")

    jacobian = torch.func.jacrev(losses_at)(values)
    hessian = torch.func.hessian(digits.inner_loss_at)(values)
    v = torch.cat([g.reshape(-1) for g in torch.autograd.grad(digits.outer_loss(), digits.parameters)])
    expected = jacobian @ torch.linalg.solve(hessian, v) / 900

    result = influence(
        lambda: F.cross_entropy(mark_outputs(digits.logits(images)), labels, reduction="none"),
        digits.outer_loss,
        digits.parameters,
        penalty=lambda: (digits.log_decay.exp() * torch.cat([digits.weight.reshape(-1), digits.bias]) ** 2).sum() / 2,
        curvature=curvature,
        solver=solver,
    )
    assert result.removal.shape == (900,)
    assert relative_error(result.removal, expected) < bound
    assert result.status is Status.CONVERGED
    assert result.diagnosis == ""
    assert result.outer_loss.item() == pytest.approx(digits.outer_loss().item())


def test_predicts_retraining_without_each_example(logistic):
    """The weights move 1 / (1 − leverage) times as far as predicted, to leading order, and the test loss is curved.

    Leverages are at most .049, and so is the error of the sum of squares; that of one example is twice that at most.
    """
    removal, retrained, leverage = logistic.influence().removal, logistic.changes(), logistic.leverages()
    assert spearmanr(removal.cpu(), retrained.cpu()).statistic >= 0.98
    assert leverage.max() < 0.05
    assert relative_error(removal, retrained) < leverage.max()
    assert (removal - retrained).abs().max() < 2 * leverage.max() * retrained.abs().max()
    assert relative_error(removal / (1 - leverage), retrained) < relative_error(removal, retrained) / 2


def test_is_the_derivative_of_retraining(logistic):
    """With a weight of 1 − ε instead of 1 for one example, the error of the change is a multiple of ε²."""
    step = 1e-3
    retrained = logistic.changes(weight=1.0 - step) / step
    assert relative_error(logistic.influence(solver=EXACT).removal, retrained) < step


def test_a_penalty_in_each_loss_predicts_the_mean_over_the_others(logistic):
    """The mean over N − 1 examples with the same decay is the sum over N with the decay times (N − 1) / N."""
    retrained = logistic.changes(decay=logistic.decay * 199 / 200)
    inside = logistic.influence(losses=lambda: logistic.losses() + logistic.penalty(), penalty=None).removal
    assert spearmanr(inside.cpu(), retrained.cpu()).statistic >= 0.98
    assert relative_error(inside, retrained) < 0.1
    assert relative_error(logistic.influence().removal, retrained) > 0.1


def test_positive_is_an_example_that_helps():
    """The weight is the mean of y, and the test loss wants y = 1."""
    y, w = torch.tensor([0.9, 1.1, 4.0], **FLOAT64), torch.tensor([2.0], **FLOAT64, requires_grad=True)
    removal = influence(lambda: (w - y).square() / 2, lambda: (w - 1).square().sum() / 2, [w]).removal
    assert torch.allclose(removal, (2.0 - y) * (2.0 - 1.0) / 3)
    assert removal[0] > removal[1] > 0 > removal[2]


def two_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(**FLOAT64)
    return net, torch.randn(10, 3, **FLOAT64), torch.randn(10, **FLOAT64)


@pytest.mark.parametrize("returned", [True, False])
def test_curvature_is_used_and_outputs_are_found(returned):
    """For a network the two matrices differ; damping makes both definite away from a minimum."""
    net, x, y = two_layers()
    parameters, solver = list(net.parameters()), Direct(damping=3.0)

    def losses():
        outputs = net(x).squeeze(1)
        return ((outputs - y).square(), outputs) if returned else (mark_outputs(outputs) - y).square()

    def total():
        outputs = net(x).squeeze(1)
        return (outputs - y).square().mean(), outputs

    def gradient(loss):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])

    jacobian = torch.stack([gradient((net(row).squeeze() - target).square()) for row, target in zip(x, y, strict=True)])
    found = {}
    for curvature, operator in (("hessian", HessianOperator), ("gauss_newton", GaussNewtonOperator)):
        matrix = operator(total, parameters).to_dense() + 3.0 * torch.eye(len(jacobian[0]), **FLOAT64)
        expected = jacobian @ torch.linalg.solve(matrix, gradient(net(x).mean())) / 10
        options = {"curvature": curvature, "solver": solver}
        found[curvature] = influence(losses, lambda: net(x).mean(), parameters, **options).removal
        assert relative_error(found[curvature], expected) < 1e-9
    assert relative_error(found["hessian"], found["gauss_newton"]) > 0.01
    assert torch.equal(found["hessian"], influence(losses, lambda: net(x).mean(), parameters, solver=solver).removal)


def test_the_solver_is_used(logistic):
    result = logistic.influence(solver=Identity(step_size=0.5))
    jacobian = (torch.sigmoid(logistic.inputs @ logistic.w.detach()) - logistic.labels)[:, None] * logistic.inputs
    (v,) = torch.autograd.grad(logistic.test_loss(), logistic.w)
    assert relative_error(result.removal, jacobian @ (0.5 * v) / 200) < 1e-12
    assert result.products == 0


def test_the_penalty_is_used_and_damping_can_stand_for_it(logistic):
    with_penalty = logistic.influence()
    damped = logistic.influence(penalty=None, solver=ConjugateGradient(100, rtol=1e-6, damping=logistic.decay))
    assert relative_error(damped.removal, with_penalty.removal) < 1e-5
    assert "not at a minimum" in damped.diagnosis  # of the mean of the losses alone
    assert with_penalty.diagnosis == ""
    twice = logistic.influence(penalty=lambda: 2.0 * logistic.penalty())
    assert relative_error(twice.removal, with_penalty.removal) > 0.1


def test_only_the_parameters_that_are_passed_move():
    """Frozen and unused ones change nothing; a weight that is left out counts as a constant."""
    net, x, y = two_layers()
    losses, test_loss = (lambda: (net(x).squeeze(1) - y).square()), (lambda: net(x).mean())
    last, solver = list(net[2].parameters()), Direct(damping=0.1)
    alone = influence(losses, test_loss, last, solver=solver).removal
    frozen, unused = torch.randn(3, **FLOAT64), torch.randn(2, **FLOAT64, requires_grad=True)
    assert torch.allclose(influence(losses, test_loss, iter([frozen, *last, unused]), solver=solver).removal, alone)
    everything = influence(losses, test_loss, list(net.parameters()), solver=Direct(damping=3.0)).removal
    assert not torch.allclose(everything, alone)


@pytest.mark.parametrize("exponent", [-8, 8])
def test_scale_of_the_losses(logistic, exponent):
    scale, removal = 10.0**exponent, logistic.influence().removal
    scaled = logistic.influence(
        losses=lambda: scale * logistic.losses(),
        test_loss=lambda: 3.0 * logistic.test_loss(),
        penalty=lambda: scale * logistic.penalty(),
    )
    assert relative_error(scaled.removal, 3.0 * removal) < 1e-6  # the tolerance of the solver
    assert scaled.status is Status.CONVERGED


def test_chunks_inside_checkpoints_equal_all_at_once(logistic):
    """As the docstring advises for many examples."""

    def loss_of(inputs, labels):
        return F.binary_cross_entropy_with_logits(inputs @ logistic.w, labels, reduction="none")

    def losses():
        chunks = zip(logistic.inputs.split(64), logistic.labels.split(64), strict=True)
        return torch.cat([checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks])

    result = logistic.influence(losses=losses, curvature="finite_difference")
    assert relative_error(result.removal, logistic.influence().removal) < 1e-5


def test_a_test_loss_may_be_a_loss(logistic):
    result = logistic.influence(test_loss=Loss(logistic.test_loss, [logistic.w]))
    assert torch.equal(result.removal, logistic.influence().removal)


def test_a_failed_solve_is_a_status_with_a_diagnosis():
    w, signs = torch.ones(2, **FLOAT64, requires_grad=True), torch.tensor([1.0, -1.0], **FLOAT64)
    result = influence(lambda: signs * w.square(), lambda: w.sum(), [w])
    assert result.status is Status.NEGATIVE_CURVATURE
    assert "negative curvature" in result.diagnosis
    assert result.diagnosis in repr(result)


def test_a_nan_is_a_status(logistic):
    factors = torch.ones(200, **FLOAT64)
    factors[7] = torch.nan
    result = logistic.influence(losses=lambda: factors * logistic.losses())
    assert result.status is Status.NONFINITE
    assert "NaN or infinity in the inner loss" in result.diagnosis
    assert bool(result.removal.isnan().all())  # and not zeros, which would say that no example matters


def test_is_a_hypergradient_that_prints_what_matters(logistic):
    result = logistic.influence()
    assert isinstance(result, Hypergradient)
    assert torch.equal(result.removal, -result.gradients[0])
    assert repr(result) == (
        f"Influence(removal of one of 200 examples: {result.removal.min():.3g} to {result.removal.max():.3g}, "
        f"status: converged, relative residual: {result.relative_residual:.1g})"
    )
    assert "residual: not measured" in repr(logistic.influence(solver=Identity()))


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_nothing_is_left_behind(mode):
    """Weights, gradients, statistics of BatchNorm; random numbers advance as by one call of each loss."""
    net, x, y = Net(**FLOAT64), torch.randn(8, 4, **FLOAT64), torch.arange(8, device=DEVICE) % 3
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    losses, test_loss = (lambda: F.cross_entropy(net(x), y, reduction="none")), (lambda: F.cross_entropy(net(x), y))
    start = random_state()
    with mode():
        result = influence(losses, test_loss, list(net.parameters()), solver=Direct(damping=1.0))
    after = random_state()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not result.removal.requires_grad
    set_random_state(start)
    losses()
    test_loss()
    assert all(torch.equal(a, b) for a, b in zip(after, random_state(), strict=True))


W = torch.ones(3, requires_grad=True, device=DEVICE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"losses": lambda: W.sum()}, ValueError, r"one for each example, \[N\], got shape \(\); use reduction='none'"),
        ({"losses": lambda: W.view(3, 1)}, ValueError, r"got shape \(3, 1\).* all other dimensions"),
        ({"losses": lambda: W[:0]}, ValueError, r"got shape \(0,\)"),
        ({"losses": lambda: [W]}, TypeError, "the losses: expected a tensor, got list"),
        ({"losses": lambda: (W, W, W)}, TypeError, "the losses: expected a tensor, got tuple"),
        ({"losses": lambda: W > 0}, TypeError, "the losses: expected a real floating-point tensor, got torch.bool"),
        ({"losses": lambda: W.detach()}, ValueError, "the training loss is detached"),
        (
            {"losses": lambda: W.detach(), "penalty": lambda: W.square().sum()},
            ValueError,
            "the losses depend on none of the parameters",
        ),
        ({"penalty": lambda: W.square()}, ValueError, r"the penalty: expected a scalar, got shape \(3,\)"),
        ({"penalty": lambda: 0.5}, TypeError, "the penalty: expected a tensor, got float"),
        ({"test_loss": lambda: W.square()}, ValueError, "the test loss: expected a scalar"),
        ({"losses": W.square()}, TypeError, "expected losses to be a callable without arguments, got Tensor"),
        ({"test_loss": W.sum()}, TypeError, "expected test_loss to be a callable without arguments, got Tensor"),
        ({"penalty": W.sum()}, TypeError, "expected penalty to be a callable without arguments, got Tensor"),
        ({"parameters": W}, TypeError, "expected parameters to be a sequence of tensors, .* got Parameter|Tensor"),
        ({"parameters": nn.Linear(1, 1)}, TypeError, "expected parameters to be a sequence of tensors, .* got Linear"),
        ({"parameters": []}, ValueError, "at least one tensor"),
        ({"curvature": "fisher"}, ValueError, "expected curvature to be one of"),
        ({"curvature": "gauss_newton"}, ValueError, "needs the model's outputs"),
    ],
)
def test_refuses(options, error, message):
    arguments = {"losses": lambda: W.square(), "test_loss": lambda: W.sum(), "parameters": [W]}
    with pytest.raises(error, match=message):
        influence(**(arguments | options))


def test_refuses_other_examples_at_another_call():
    sizes = iter([3, 2, 2, 2])
    with pytest.raises(ValueError, match="the same 3 examples at every call, got 2"):
        influence(lambda: W[: next(sizes)].square(), lambda: W.sum(), [W])
