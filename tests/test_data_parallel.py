"""Two processes with half of each batch equal one process with all of it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.curvature import curvature_operator
from lightning_ifthpo.hypergradients.implicit import implicit_hypergradient
from lightning_ifthpo.runtime import requirements
from lightning_ifthpo.runtime.cadence import Cadence
from lightning_ifthpo.runtime.distributed import Ranks, is_replicated
from lightning_ifthpo.runtime.isolation import undisturbed
from lightning_ifthpo.runtime.requirements import check_strategy
from lightning_ifthpo.solvers import Direct
from tests.trainers import Classifier, quiet_trainer
from tests.two_ranks import CASES, possible, run


def python(*arguments):
    """Runs Python in a process of its own."""
    job = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert job.returncode == 0, job.stderr[-5000:]


def each_case(test):
    reason = f"fully_shard does not run on the CPU in torch {torch.__version__}"
    skipped = pytest.mark.skip(reason=reason)
    names = [name if name in possible() else pytest.param(name, marks=skipped) for name in CASES]
    return pytest.mark.parametrize("name", names)(test)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks of all cases ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.two_ranks", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.filterwarnings("ignore:spectral_density=True, but no logger takes figures")
@each_case
def test_two_ranks_equal_one(name, ranks, tmp_path):
    alone = run(name, tmp_path)
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
    assert together["error"] == alone["error"]
    assert bool(alone["error"]) == ("NaN" in name)


@each_case
def test_ranks_agree_to_the_last_bit(name, ranks):
    first, second = (rank[name] for rank in ranks)
    assert all(torch.equal(first["state"][key], value) for key, value in second["state"].items())
    assert first["metrics"] == second["metrics"]
    assert first["error"] == second["error"]


def test_processes_that_the_trainer_starts(ranks, tmp_path):
    """Under ddp_spawn the main process has no rank, and gets back weights and metrics."""
    python("-m", "tests.spawned", tmp_path / "spawned.pt")
    spawned, together = torch.load(tmp_path / "spawned.pt"), ranks[0]["amortized, training"]
    assert all(torch.equal(spawned["state"][key], value) for key, value in together["state"].items())
    assert spawned["metrics"] == pytest.approx(together["metrics"], rel=1e-6)


@pytest.mark.parametrize("callback", [IFTHypergradient, SharpnessMonitor, ExactGeN])
def test_a_model_whose_layers_are_spread_over_devices_is_refused(callback, monkeypatch):
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    monkeypatch.setattr(ModelParallelStrategy, "device_mesh", mesh)
    trainer = quiet_trainer(devices=2, strategy=ModelParallelStrategy())
    message = (
        f"{callback.__name__} needs the whole model on each device, and ModelParallelStrategy is not known to keep it"
    )
    with pytest.raises(ValueError, match=message):
        callback().on_fit_start(trainer, Classifier())


def test_weights_that_are_spread_over_devices_are_put_together_or_refused(monkeypatch):
    monkeypatch.setattr(ModelParallelStrategy, "device_mesh", {"tensor_parallel": SimpleNamespace(size=lambda: 1)})
    trainer = quiet_trainer(devices=2, strategy=ModelParallelStrategy())
    check_strategy(trainer, "IFTHypergradient", gathers=True)
    with pytest.raises(ValueError, match=r"ModelParallelStrategy is not known to keep it there; use strategy='ddp'$"):
        ExactGeN().on_fit_start(trainer, Classifier())


def test_a_hyperparameter_that_is_spread_over_devices_is_refused(monkeypatch):
    monkeypatch.setattr(requirements, "is_sharded", lambda tensor: True)
    with pytest.raises(ValueError, match=r"'decay.log_decay.0' is spread over processes; apply fully_shard to"):
        IFTHypergradient().on_fit_start(quiet_trainer(), Classifier())


class OwnStrategy(DDPStrategy):
    pass


def test_strategies_are_known_by_name():
    import pytorch_lightning

    assert is_replicated(OwnStrategy())
    assert is_replicated(pytorch_lightning.strategies.DDPStrategy())
    assert not is_replicated(type("DeepSpeedStrategy", (DDPStrategy,), {})())


def two_processes(other):
    """Two processes, of which the other one is played."""
    ranks = Ranks(quiet_trainer())
    ranks.count = 2
    ranks.total = lambda part: part + other.to(part)
    return ranks


def test_batches_of_unknown_size_count_alike():
    loss = torch.tensor(3.0)
    known = [torch.ones(6, 2)]
    assert two_processes(torch.tensor([2.0, 0.0])).share(lambda: loss, known)() == 3.0 * 6 / 8
    with pytest.warns(UserWarning, match="cannot tell the number of examples in a batch of type list"):
        assert two_processes(torch.tensor([0.0, 1.0])).share(lambda: loss, known)() == 1.5
    with pytest.warns(UserWarning, match="cannot tell the number of examples in a batch of type object"):
        assert two_processes(torch.tensor([2.0, 0.0])).share(lambda: loss, object())() == 1.5
    assert two_processes(torch.tensor([0.0, 0.0])).share(lambda: loss, [torch.ones(0, 2)])() == 1.5


def test_an_error_that_other_processes_do_not_have_is_not_survived():
    monitor = SharpnessMonitor()
    monitor._ranks = two_processes(torch.tensor(0.0))
    with pytest.raises(RuntimeError, match="mine"), monitor._surviving():
        raise RuntimeError("mine")
    with pytest.warns(UserWarning, match="a measurement failed"), monitor._surviving():
        raise FloatingPointError("everybody's")
    with monitor._surviving(alone=True):
        raise RuntimeError("nobody waits for it")
    assert monitor.failures == 2


def test_each_process_draws_its_own_masks(monkeypatch):
    module, trainer = Classifier(), quiet_trainer()
    masks = []
    for rank in (0, 0, 1):
        monkeypatch.setattr(type(trainer), "global_rank", rank)
        with undisturbed(trainer, module, seed=5):
            masks.append(torch.rand(4))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


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
