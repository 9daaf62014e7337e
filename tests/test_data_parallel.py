"""Two processes with half of each batch equal one process with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.callbacks.cadence import Cadence
from lightning_ifthpo.curvature import curvature_operator
from lightning_ifthpo.hypergradient import implicit_hypergradient
from lightning_ifthpo.solvers import Direct
from tests.trainers import Classifier, quiet_trainer
from tests.two_ranks import CASES, run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks of all cases ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = subprocess.run(
        [*command, "-m", "tests.two_ranks", str(folder)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert job.returncode == 0, job.stderr[-5000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name, ranks):
    alone = run(name)
    together = ranks[0][name]
    # Sums over ranks are made in another order: a few units in the last place, which differences of gradients divide by
    # a step of 0.005, and second differences of losses by the square of a step.
    tolerance = 1e-2 if "three_point" in name else 1e-4 if "finite_difference" in name else 1e-5
    metrics = {key: torch.tensor(value) for key, value in together["metrics"].items()}
    torch.testing.assert_close(
        metrics, {key: torch.tensor(value) for key, value in alone["metrics"].items()}, rtol=tolerance, atol=1e-6
    )
    torch.testing.assert_close(
        together["state"], alone["state"], rtol=0.0, atol=1e-4 if "three_point" in name else 1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_last_bit(name, ranks):
    first, second = (rank[name] for rank in ranks)
    assert all(torch.equal(first["state"][key], value) for key, value in second["state"].items())
    assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize("callback", [IFTHypergradient, SharpnessMonitor, ExactGeN])
def test_a_model_that_is_spread_over_devices_is_refused(callback):
    trainer = quiet_trainer(devices=2, strategy=ModelParallelStrategy(tensor_parallel_size=1))
    message = f"{callback.__name__} needs the whole model on each device, which ModelParallelStrategy does not provide"
    with pytest.raises(ValueError, match=message):
        callback().on_fit_start(trainer, Classifier())


@pytest.mark.parametrize("curvature", ["kfac", "gradient_outer_product"])
def test_curvatures_that_do_not_add_up_are_refused(curvature):
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=f"curvature='{curvature}' needs all examples in one process"):
        curvature_operator(curvature, lambda: w.sum(), [w], all_reduce=torch.clone)


def test_no_hyperparameter_is_unused_that_another_process_uses():
    """The other process is played: it does the same, but for a derivative that this one does not have."""
    w, used, idle = torch.ones(1, requires_grad=True), torch.tensor(1.0), torch.tensor(1.0)

    def all_reduce(part):
        sums.append(part)
        return part + torch.tensor([0.0, 1.0, 0.0, 0.25]) if part.numel() == 4 else part

    sums = []
    result = implicit_hypergradient(
        lambda: (w.square() / 2 - used * w).sum(),
        lambda: w.sum(),
        [w],
        [used, idle],
        solver=Direct(),
        all_reduce=all_reduce,
    )
    assert [part.tolist() for part in sums if part.numel() == 4] == [[1.0, 0.0, -1.0, 0.0]]
    assert [gradient.item() for gradient in result.gradients] == pytest.approx([1.0, -0.25])
    assert result.unused == ()


def test_processes_keep_a_budget_of_time_together():
    clocks = iter([0.0] * 10)
    cadence = Cadence(1, max_overhead=0.1, clock=lambda: next(clocks))
    asked = []

    def agreed(decision):
        asked.append(decision)
        return False

    cadence.begin(agreed)
    cadence.optimizer_stepped()
    assert not cadence.is_due()
    assert asked == [True]
    assert cadence.postponed == 1
