"""Whether `SharpnessMonitor(method="critical")` warns before a run diverges, and only then.

The eight workloads of `learning_rates` are trained for eighty steps with the best constant rate that was found there, a
third and a tenth of it, which are good runs, and with 3 to 1,000 times that rate. A run has diverged once the loss of a
batch is ten times the first one, or not finite. The rule of the alarm was chosen on splits 0 to 3, and is measured on
others.

    python -m examples.experiments.alarms --workloads wine regression   # a minute
    python -m examples.experiments.alarms                               # half an hour on two cores
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.utils.data import TensorDataset

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    make_parser,
    markdown,
    quiet_trainer,
    random_batches,
    read,
    start,
)
from examples.experiments.problems.learning_rates import WORKLOADS, Trained, best_rate, own_optimizer
from lightning_ifthpo import SharpnessMonitor

NAME = "alarms"
STEPS = 80
GOOD, RAISED = (0.1, 0.3, 1.0), (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # times the best constant rate
DIVERGED = 10.0  # times the first loss


class Course(Callback):
    """Notes at which batch a run has diverged, where it ends, and after which batch there was an alarm."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.alarm: int | None = None
        self.divergence: int | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes both."""
        loss = float(outputs["loss"])
        self.first = loss if self.first is None else self.first
        if not math.isfinite(loss) or loss > DIVERGED * self.first:
            self.divergence = batch_idx
            trainer.should_stop = True
        elif self.alarm is None and trainer.callback_metrics.get("sharpness/alarms", 0.0) > 0.0:
            self.alarm = batch_idx


def train(name: str, rate: float, seed: int) -> list[int | None]:
    """Returns after which batch there was an alarm, and at which the run had diverged."""
    workload = WORKLOADS[name]
    problem, course = workload.make(seed), Course()
    monitor = SharpnessMonitor(method="critical", max_overhead=None)
    trainer = quiet_trainer([monitor, course], max_steps=STEPS)
    batches = random_batches(TensorDataset(*problem.training), workload.batch, STEPS, seed)
    trainer.fit(Trained(problem, own_optimizer(workload, problem, rate)), batches)
    return [course.alarm, course.divergence]


def run(workloads: list[str], seeds: list[int]) -> Results:
    """Trains all workloads with all rates."""
    runs: Results = {}
    for name in workloads:
        best = best_rate(read("learning_rates")["held_out"][name]["constant"])
        rates = {f"{factor:g}": factor * best for factor in (*GOOD, *RAISED)}
        runs[name] = {factor: {str(seed): train(name, rate, seed) for seed in seeds} for factor, rate in rates.items()}
        print(f"{name}: {row({name: runs[name]})}", flush=True)
    return {"runs": runs}


def row(runs: Results) -> list[int]:
    """Returns the number of runs that diverged, of those with an alarm before, of good runs, of those with an alarm."""
    found = [(float(factor), *course) for by in runs.values() for factor in by for course in by[factor].values()]
    bad = [alarm for factor, alarm, divergence in found if factor > 1.0 and divergence is not None]
    good = [alarm for factor, alarm, divergence in found if factor <= 1.0 and divergence is None]
    alarms = (sum(alarm is not None for alarm in part) for part in (bad, good))
    return [number for part in zip((len(bad), len(good)), alarms, strict=True) for number in part]


def summary(results: Results) -> dict[str, float]:
    """Returns the numbers of all workloads together."""
    bad, warned, good, false = row(results["runs"])
    return {
        "runs that diverged": float(bad),
        "with an alarm before": warned / max(bad, 1),
        "good runs": float(good),
        "with a false alarm": false / max(good, 1),
    }


def table(results: Results) -> str:
    """Returns the numbers of each workload."""
    runs = results["runs"]
    rows = [[name, *map(str, row({name: runs[name]}))] for name in runs]
    rows.append(["all", *map(str, row(runs))])
    return markdown(["", "runs that diverged", "with an alarm before", "good runs", "with an alarm"], rows)


def main(argv: list[str] | None = None) -> Figures:
    """Trains everything; returns what the last line says."""
    parser = make_parser(__doc__, seeds=[4, 5, 6, 7, 8])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    args = parser.parse_args(argv)
    start(ignore=["SharpnessMonitor, step"])
    return conclude(NAME, run(args.workloads, args.seeds), args, summary=summary, table=table)


if __name__ == "__main__":
    main()
