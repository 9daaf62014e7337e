"""Two processes with half of each batch equal one process with all of it."""

import pytest
import torch

from tests.helpers.processes import python
from tests.helpers.two_ranks import CASES, possible, run

pytestmark = pytest.mark.slow


def each_case(test):
    reason = f"fully_shard does not run on the CPU in torch {torch.__version__}"
    skipped = pytest.mark.skip(reason=reason)
    names = [name if name in possible() else pytest.param(name, marks=skipped) for name in CASES]
    return pytest.mark.parametrize("name", names)(test)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks of all cases ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.helpers.two_ranks", folder)
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
    metrics, wanted = (
        {key: torch.tensor(value) for key, value in metrics.items()}
        for metrics in (together["metrics"], alone["metrics"])
    )
    # rounding may change the number of iterations, and so where below the tolerance they end
    ends = ("hypergrad/products", "hypergrad/residual") if "finite_difference" in name else ()
    metrics |= {key: wanted[key] for key in ends if key in wanted}
    torch.testing.assert_close(metrics, wanted, rtol=tolerance, atol=1e-6)
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
    python("-m", "tests.helpers.spawned", tmp_path / "spawned.pt")
    spawned, together = torch.load(tmp_path / "spawned.pt"), ranks[0]["amortized, training"]
    assert all(torch.equal(spawned["state"][key], value) for key, value in together["state"].items())
    assert spawned["metrics"] == pytest.approx(together["metrics"], rel=1e-6)
