"""Whatever is put in, what comes out is an answer or an error that says what to do, and no hyperparameter is spoilt."""

from __future__ import annotations

import inspect
import math
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_ifthpo
from lightning_ifthpo import (
    ExactGeN,
    IFTHypergradient,
    SharpnessMonitor,
    hyperparameters,
    implicit_hypergradient,
    solvers,
    spectrum,
    step_size,
)
from tests.helpers.device import ON_CUDA
from tests.helpers.features import Simple
from tests.helpers.trainers import Callback, DataLoader, quiet_trainer, same

pytestmark = pytest.mark.slow

PACKAGE = Path(lightning_ifthpo.__file__).parent


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.floats(-2.0, 2.0),
    st.sampled_from([math.nan, math.inf, -math.inf, "", "nonsense", "hessian", 1j, b"", object, (), {}, range(3)]),
    st.lists(st.one_of(st.integers(-1, 3), st.floats(), st.text(max_size=2)), max_size=3),
    st.sampled_from([torch.tensor(0.5), torch.ones(3), torch.tensor(math.nan), torch.ones(2, dtype=torch.long)]),
)


SOLVERS = [solvers.Amortized, solvers.ConjugateGradient, solvers.Direct, solvers.Identity, solvers.MinimumResidual]


GOOD = torch.linspace(-1, 1, 24).view(6, 4), torch.arange(6) % 3


def linear():
    return torch.nn.Linear(2, 2)


# what each cannot do without
CONSTRUCTORS = {
    IFTHypergradient: {},
    SharpnessMonitor: {},
    ExactGeN: {},
    hyperparameters.WeightDecay: {"module": st.builds(linear)},
    hyperparameters.SampleWeights: {"n": st.integers(1, 5)},
    hyperparameters.IndexedDataset: {"dataset": st.just([(1, 2)])},
    hyperparameters.LossWeights: {"terms": st.integers(2, 5)},
    hyperparameters.LabelSmoothing: {"classes": st.integers(2, 5)},
    hyperparameters.InputNoise: {},
    hyperparameters.AugmentationNetwork: {},
    hyperparameters.DistilledData: {"shape": st.just((2,)), "classes": st.integers(1, 3)},
    **{solver: {} for solver in (*SOLVERS, solvers.Neumann, solvers.Nystrom, solvers.SAMA)},
    spectrum.SpectrumTracker: {},
    step_size.ExactGeNLR: {"optimizer": st.builds(lambda: torch.optim.SGD(linear().parameters(), lr=0.1))},
}


def explored(strategy, cases, record_property):
    """Runs a function on so many values, the same each time, and reports their number."""

    def decorate(check):
        tried = []

        @settings(max_examples=cases, deadline=None, derandomize=True, database=None)
        @given(strategy)
        def run(value):
            tried.append(1)
            check(value)

        run()
        record_property("inputs", len(tried))

    return decorate


def failure_of(function):
    try:
        function()
    except Exception as error:
        return error
    return None


def said_by_us(error):
    """Whether an error was raised in so many words by a line of the package."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(PACKAGE) and (last.line or "").startswith("raise")


@st.composite
def arguments(draw, constructor):
    """Up to two arguments may be anything."""
    names = [name for name, p in inspect.signature(constructor).parameters.items() if p.kind is not p.VAR_KEYWORD]
    needed = {name: draw(strategy) for name, strategy in CONSTRUCTORS[constructor].items()}
    return needed | {name: draw(ANYTHING) for name in draw(st.lists(st.sampled_from(names), unique=True, max_size=2))}


@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=lambda constructor: constructor.__name__)
def test_a_constructor_takes_its_arguments_or_says_what_is_wrong(constructor, record_property):
    @explored(arguments(constructor), 100, record_property)
    def check(options):
        error = failure_of(lambda: constructor(**options))
        assert error is None or (isinstance(error, (TypeError, ValueError)) and said_by_us(error)), (options, error)


@st.composite
def batches(draw):
    """Images [B, 4] with labels [B], of which something is usually wrong."""
    size = draw(st.sampled_from([0, 1, 2, 6]))
    numbers = st.one_of(st.floats(-2, 2, width=16), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]))
    values = draw(st.lists(numbers, min_size=4 * size, max_size=4 * size))
    x = torch.tensor(values).reshape(size, 4)
    labels = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    y = torch.tensor(labels, dtype=torch.long)
    spoil = draw(st.sampled_from(["nothing"] * 6 + ["type", "shape", "device", "labels", "lengths", "container"]))
    if spoil == "type":
        x = x.nan_to_num(0.0, 1.0, -1.0).to(
            draw(st.sampled_from([torch.double, torch.half, torch.long, torch.complex64]))
        )
    if spoil == "shape":
        x = x.reshape(*draw(st.sampled_from([(size, 2, 2), (2 * size, 2), (4 * size,)])))
    if spoil == "device":
        x = x.to("meta")
    if spoil == "labels":
        # CUDA answers labels out of range by an assertion that ends all work of the process
        outside = [] if ON_CUDA else [y + 3, y - 1]
        y = draw(st.sampled_from([*outside, y.float(), y.bool()]))
    if spoil == "lengths":
        y = torch.cat([y, y, torch.zeros(1, dtype=torch.long)])
    return {"x": x, "y": y} if spoil == "container" else (x, y)


def problem(inner_batch, outer_batch):
    torch.manual_seed(0)
    w, log_decay = torch.randn(4, 3, requires_grad=True), torch.tensor(-2.0)

    def data_loss(batch):
        x, y = batch
        return F.cross_entropy(lightning_ifthpo.curvature.mark_outputs(x @ w), y)

    inner = lambda: data_loss(inner_batch) + log_decay.exp() * w.square().sum()  # noqa: E731
    return inner, lambda: data_loss(outer_batch), w, log_decay


@pytest.mark.parametrize("spoilt", ["inner", "outer"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "finite_difference"])
def test_a_hypergradient_is_finite_or_comes_with_a_status_or_an_error(curvature, solver, spoilt, record_property):
    options = {"damping": 0.1} | ({"horizon": 10} if solver is solvers.Amortized else {})

    @explored(batches(), 25, record_property)
    def check(bad):
        inner, outer, w, log_decay = problem(*((bad, GOOD) if spoilt == "inner" else (GOOD, bad)))
        before = w.detach().clone()
        users = failure_of(lambda: inner().backward()) or failure_of(lambda: outer().backward())
        w.grad = None
        results = []
        error = failure_of(
            lambda: results.append(
                implicit_hypergradient(inner, outer, [w], [log_decay], curvature=curvature, solver=solver(**options))
            )
        )
        if users is not None:
            assert type(error) is type(users), (bad, users, error)
        elif error is not None:
            assert said_by_us(error), (bad, error)
        else:
            assert bool(torch.isfinite(results[0].gradients[0])) or not results[0].status.succeeded, (bad, results)
        assert torch.equal(w, before)
        assert w.grad is None
        assert log_decay == -2.0
        assert not log_decay.requires_grad


class Values(Callback):
    """Notes hyperparameters before the first batch and after each."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.seen:
            self.note(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(pl_module)

    def note(self, module):
        self.seen.append([parameter.clone() for parameter in module.hyperparameters()])


@pytest.mark.parametrize("spoilt", ["training", "outer"])
def test_no_batch_spoils_a_hyperparameter(spoilt, record_property):
    @explored(batches(), 150, record_property)
    def check(bad):
        torch.manual_seed(0)
        module, values = Simple(), Values()
        parts = {"training": [GOOD] * 3, "outer": [GOOD] * 3}
        parts[spoilt] = [GOOD, bad, GOOD]
        callback = IFTHypergradient(1, outer_dataloader=parts["outer"])
        trainer = quiet_trainer(callbacks=[callback, values], limit_val_batches=0)
        loss = module.inner_loss if spoilt == "training" else module.outer_loss
        users = failure_of(lambda: loss(bad).backward())
        module.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = failure_of(lambda: trainer.fit(module, DataLoader(parts["training"], batch_size=None)))
        assert (error is None) == (users is None), (bad, users, error)
        assert all(bool(torch.isfinite(value)) for seen in values.seen for value in seen)
        assert not same(values.seen[0], values.seen[1])  # a good batch
        if spoilt == "outer" and users is None and not bool(torch.isfinite(loss(bad))):
            assert same(values.seen[1], values.seen[2]), bad
