"""`ExactGeN` beside the setting that everybody uses, and beside rates that were tuned, on eight small workloads.

The setting that everybody uses is AdamW at 1e-3 with a warm-up over 5 % of the run and a cosine, on every workload. A
constant rate and a cosine are tuned: the best of seven rates, by the held-out loss of splits 0 to 2, with the optimizer
of the workload. D-Adaptation, Prodigy (with a cosine, as its authors recommend) and schedule-free AdamW take part with
their defaults where they are installed (`pip install dadaptation prodigyopt schedulefree gen-optim`), and so does
AutoGeN, the published implementation of GeN, with the optimizer of the workload from its default rate of 1e-3.
`ExactGeN()` has the optimizer of the workload, and so has a cosine from the rate that `ExactGeN.suggest` finds, which
costs seven tenths of a run more. All are reported by the loss on test examples of splits 3 to 7.

    python -m examples.experiments.learning_rates --workloads wine regression   # two minutes
    python -m examples.experiments.learning_rates                               # an hour on two cores
    python -m examples.experiments.learning_rates --methods ExactGeN fixed      # the others as recorded
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from statistics import fmean, stdev
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch.optim import AdamW, Optimizer
from torch.utils.data import TensorDataset

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    installed,
    make_parser,
    markdown,
    mean,
    merged,
    number,
    quiet_trainer,
    random_batches,
    read,
    start,
    values,
)
from examples.experiments.problems.auto_gen import AutoGeN
from examples.experiments.problems.learning_rates import (
    WORKLOADS,
    Problem,
    Trained,
    Workload,
    best_rate,
    criterion,
    mean_or_infinity,
    own_optimizer,
)
from examples.experiments.style import BOUND, OTHER, OURS, PLAIN, Role, name_rows, page
from lightning_ifthpo import ExactGeN

NAME = "learning_rates"
CHOOSING = (0, 1, 2)
SEEDS = (3, 4, 5, 6, 7)  # splits to report
TUNED = {"constant": "best constant rate of seven", "cosine": "best cosine of seven"}
OPTIMIZERS = {  # of other packages: package and class
    "D-Adaptation": ("dadaptation", "DAdaptAdam"),
    "Prodigy": ("prodigyopt", "Prodigy"),
    "schedule-free": ("schedulefree", "AdamWScheduleFree"),
}
PACKAGES = {method: package for method, (package, _) in OPTIMIZERS.items()} | {"AutoGeN": "GeN"}
CALLBACKS: dict[str, Callable[[], Callback]] = {"ExactGeN": ExactGeN, "AutoGeN": partial(AutoGeN, criterion)}
FOUND = {"suggested": "cosine from `ExactGeN.suggest`"}
UNTUNED = {
    "fixed": "AdamW, 1e-3, warm-up, cosine",
    "D-Adaptation": "D-Adaptation",
    "Prodigy": "Prodigy, cosine",
    "schedule-free": "schedule-free AdamW",
    "AutoGeN": "AutoGeN",
    "ExactGeN": "`ExactGeN()`",
}
MOMENTS = 20  # at which the loss on some held-out examples is noted
FARTHEST = 20.0  # ratio that is drawn
LEVEL = 1.03  # "near the best tuned setting"


class Curve(Callback):
    """Notes the loss on some held-out examples along the run."""

    def __init__(self, problem: Problem, steps: int) -> None:
        self.problem, self.every = problem, max(1, steps // MOMENTS)
        inputs, targets = problem.held_out
        self.examples = inputs[:100], targets[:100]
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes one."""
        if (batch_idx + 1) % self.every == 0:
            self.losses.append(self.problem.held_out_loss(self.examples))


def warm_up(optimizer: Optimizer, steps: int, fraction: float) -> Any:
    """Returns a schedule that rises linearly over a fraction of the run and falls along a cosine."""
    if not fraction:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rising = max(1, int(fraction * steps))
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (rising + 1), total_iters=rising),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - rising),
    ]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [rising])


def foreign(method: str, problem: Problem) -> Optimizer:
    """Returns an optimizer of another package, with its defaults."""
    package, name = OPTIMIZERS[method]
    make: Callable[..., Optimizer] = getattr(importlib.import_module(package), name)
    return make(problem.weights)


def train(name: str, method: str, seed: int, lr: float = 1e-3) -> tuple[float, float, list[float]]:
    """Returns the loss on held-out and on test examples, and the former along the run."""
    workload = WORKLOADS[name]
    problem = workload.make(seed)
    if method == "fixed":
        optimizer: Optimizer = AdamW(problem.weights, lr=1e-3)
    elif method in OPTIMIZERS:
        optimizer = foreign(method, problem)
    else:
        optimizer = own_optimizer(workload, problem, suggested_rate(workload, problem, seed) if method in FOUND else lr)
    schedule = None
    if method in ("fixed", "cosine", "suggested", "Prodigy", "D-Adaptation"):
        schedule = warm_up(optimizer, workload.steps, 0.05 if method == "fixed" else 0.0)
    callbacks = [CALLBACKS[method]()] if method in CALLBACKS else []
    average: Any = optimizer if method == "schedule-free" else None
    if average is not None:
        average.train()
    curve = Curve(problem, workload.steps)
    if average is None:
        callbacks.append(curve)
    batches = random_batches(TensorDataset(*problem.training), workload.batch, workload.steps, seed)
    trainer = quiet_trainer(callbacks, max_steps=workload.steps)
    trainer.fit(Trained(problem, optimizer, schedule), batches)
    if average is not None:
        average.eval()
        settle_batch_norm(problem)
    return problem.held_out_loss(problem.held_out), problem.held_out_loss(problem.test), curve.losses


def suggested_rate(workload: Workload, problem: Problem, seed: int) -> float:
    """Returns the rate that wins a race."""
    batches = random_batches(TensorDataset(*problem.training), workload.batch, workload.steps, seed)
    module = Trained(problem, own_optimizer(workload, problem, 1.0))  # whose rate does not count
    return ExactGeN.suggest(quiet_trainer(max_steps=workload.steps), module, batches).lr


def settle_batch_norm(problem: Problem) -> None:
    """Measures the statistics of BatchNorm at averaged weights, as schedule-free training needs it."""
    problem.net.train()
    with torch.no_grad():
        for batch in random_batches(TensorDataset(*problem.training), 100, 50, 0):
            problem.loss(batch)


def run(workloads: list[str], seeds: list[int], results: Results, chosen: list[str]) -> Results:
    """Tunes what is tuned, and trains the chosen methods with each seed."""
    for name in workloads:
        losses: Results = {}
        results["held_out"][name], results["test"][name], results["reached"][name] = {}, losses, {}
        for method in (name for name in TUNED if name in chosen):
            grid = {f"{rate:g}": {str(s): train(name, method, s, rate)[0] for s in CHOOSING} for rate in rates(name)}
            results["held_out"][name][method] = grid
            best = best_rate(grid)
            losses[method] = {str(seed): train(name, method, seed, best)[1] for seed in seeds}
            print(f"{name}, {method}: {best:g} of {', '.join(grid)}; {number(mean(losses[method]), 4)}", flush=True)
        curves: dict[str, dict[str, list[float]]] = {}
        for method in (name for name in chosen if name not in TUNED):
            runs = {str(seed): train(name, method, seed) for seed in seeds}
            losses[method] = {seed: test for seed, (_, test, _) in runs.items()}
            curves[method] = {seed: curve for seed, (_, _, curve) in runs.items()}
            print(f"{name}, {method}: {number(mean(losses[method]), 4)}", flush=True)
        for seed in map(str, seeds) if {"ExactGeN", "fixed"} <= curves.keys() else ():
            results["reached"][name][seed] = moment(curves["ExactGeN"][seed], curves["fixed"][seed][-1])
    return results


def rates(name: str) -> list[float]:
    """Returns the grid of a workload."""
    return WORKLOADS[name].rates


def moment(curve: list[float], goal: float) -> float:
    """Returns the fraction of the run after which a loss has reached a goal; one if it has not."""
    reached = [place for place, loss in enumerate(curve, start=1) if loss <= goal]
    return min(reached) / len(curve) if reached else 1.0


def methods(results: Results) -> dict[str, str]:
    """Returns names and titles of the methods in the results."""
    present = [set(losses) for losses in results["test"].values()]
    return {name: title for name, title in (UNTUNED | FOUND | TUNED).items() if all(name in found for found in present)}


def best_tuned(losses: Results) -> float:
    """Returns the lowest mean loss of a tuned method."""
    return min(mean_or_infinity(losses[method]) for method in TUNED)


def ranks(results: Results, among: list[str]) -> dict[str, float]:
    """Returns the mean rank of each method over the workloads, by the mean loss."""
    orders = [sorted(among, key=lambda m: mean_or_infinity(losses[m])) for losses in results["test"].values()]
    return {method: fmean(order.index(method) + 1 for order in orders) for method in among}


def not_worse(losses: Results) -> bool:
    """Returns whether the loss with `ExactGeN` is at most that of the fixed setting plus a standard error."""
    pairs = zip(values(losses["ExactGeN"]), values(losses["fixed"]), strict=True)
    differences = [ours - fixed for ours, fixed in pairs]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return fmean(differences) <= error


def summary(results: Results) -> dict[str, float]:
    """Returns mean ranks among the methods that were not tuned, and how often `ExactGeN` is good enough."""
    among = [name for name in methods(results) if name in UNTUNED]
    tests = results["test"].values()
    found = {f"rank of {name}": rank for name, rank in ranks(results, among).items()}
    return found | {
        "workloads": float(len(results["test"])),
        "not worse than the fixed setting": float(sum(map(not_worse, tests))),
        "within 3 % of the best tuned": float(
            sum(mean(losses["ExactGeN"]) <= LEVEL * best_tuned(losses) for losses in tests)
        ),
        "suggested, over the best tuned": fmean(
            mean(losses["suggested"]) / best_tuned(losses) for losses in tests if "suggested" in losses
        ),
        "part of the run to the fixed setting's loss": fmean(mean(found) for found in results["reached"].values()),
    }


def table(results: Results) -> str:
    """Returns the mean test loss of each method on each workload."""
    shown = methods(results)
    rows = []
    for name, losses in results["test"].items():
        workload = WORKLOADS[name]
        least = min(mean_or_infinity(losses[method]) for method in shown if method in UNTUNED)
        cells = [number(mean(losses[method]), 4) for method in shown]
        marked = [
            f"**{cell}**" if method in UNTUNED and mean(losses[method]) == least else cell
            for method, cell in zip(shown, cells, strict=True)
        ]
        rows.append([f"{name}, {workload.optimizer}, {workload.steps} steps", *marked])
    among = [name for name in shown if name in UNTUNED]
    order = ranks(results, among)
    rows.append(["mean rank of those not tuned", *(number(order[m], 1) if m in order else "" for m in shown)])
    return markdown(["test loss", *shown.values()], rows)


ROLES: dict[str, Role] = {
    "fixed": PLAIN,
    "ExactGeN": OURS,
    "suggested": OURS._replace(marker="P", dash=(0, (4, 1.5))),
    "constant": BOUND._replace(dash=(0, (1, 1.5))),
    "cosine": BOUND,
}


def profile(results: Results, method: str, within: list[float]) -> list[float]:
    """Returns on which fraction of the workloads a method is within a factor of the best, for each factor.

    That is a performance profile (Dolan and Moré 2002); the best is that of all methods, tuned or not.
    """
    found = results["test"].values()
    ratios = [
        mean_or_infinity(losses[method]) / min(mean_or_infinity(losses[m]) for m in methods(results))
        for losses in found
    ]
    return [fmean(ratio <= factor for ratio in ratios) for factor in within]


def draw(results: Results) -> Figure:
    """Returns a picture of each method's loss over that of the best tuned one, and a performance profile."""
    found, shown = results["test"], methods(results)
    figures = summary(results)
    near, level = figures["within 3 % of the best tuned"], figures["not worse than the fixed setting"]
    headline = (
        f"Without tuning, ExactGeN is within 3 % of the best tuned rate on {near:.0f} of {len(found)} workloads,\n"
        f"and not worse than the usual AdamW setting on {level:.0f}"
    )
    figure = page(2.6 + 0.42 * len(found), headline)
    panel, below = figure.subplots(2, height_ratios=[0.42 * len(found), 1.6])
    marks, dashes = iter("v^D<"), iter(((0, (1, 1)), (0, (3, 1, 1, 1)), (0, (5, 1)), (0, (2, 3))))
    factors = [1.0 + 0.01 * step for step in range(101)]
    for method, title in shown.items():
        role = ROLES.get(method) or OTHER._replace(marker=next(marks), dash=next(dashes))
        below.plot(factors, profile(results, method, factors), **role.line(linewidth=1.4, drawstyle="steps-post"))
        label = title.replace("`", "")
        if method in TUNED:
            panel.plot([], [], **role.line(label=label))
            continue
        ratios = [min(mean_or_infinity(losses[method]) / best_tuned(losses), FARTHEST) for losses in found.values()]
        places = [place + 0.11 * (list(shown).index(method) - 3) for place in range(len(found))]
        panel.plot(ratios, places, **role.points(zorder=3))
        panel.plot([], [], **role.points(linestyle=role.dash, label=label))
    panel.axvline(1.0, color=BOUND.color, linewidth=1.0)
    name_rows(panel, [f"{name}, {WORKLOADS[name].optimizer}" for name in found])
    panel.set(
        xscale="log", xlabel=f"test loss over that of the best tuned rate (mean of the seeds; {FARTHEST:g}: or more)"
    )
    panel.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    panel.minorticks_off()
    below.set(
        xlabel="test loss over that of the best method",
        ylabel="workloads within that",
        xlim=(1.0, 2.0),
        ylim=(-0.03, 1.03),
    )
    below.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def main(argv: list[str] | None = None) -> Figures:
    """Runs the comparison; returns what the last line says."""
    parser = make_parser(__doc__, seeds=SEEDS)
    methods = [*TUNED, *UNTUNED, *FOUND]
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    args = parser.parse_args(argv)
    start(ignore=["`torch.jit.script", "Covariance of the", "Detected call of `lr_scheduler", "Seems like `optimizer"])
    present = installed(args.methods, PACKAGES)
    is_part = set(args.methods) != set(methods)
    if is_part and (reason := unfit(args.methods, present, args.seeds)):
        parser.error(reason)
    results = run(args.workloads, args.seeds, {"held_out": {}, "test": {}, "reached": {}}, present)
    if is_part:
        results = merged(recorded(args.workloads, args.seeds), results)
    return conclude(NAME, results, args, summary=summary, table=table, draw=draw)


def unfit(chosen: list[str], present: list[str], seeds: list[int]) -> str:
    """Returns why a part of the methods cannot stand beside the recorded runs; nothing if it can."""
    if ("ExactGeN" in chosen) != ("fixed" in chosen):
        return "--methods takes ExactGeN and fixed together, because times are compared along both runs"
    if not set(seeds) <= set(SEEDS):
        return f"--methods leaves the others as recorded, for seeds {', '.join(map(str, SEEDS))} only"
    return "" if present else f"not installed: {', '.join(chosen)}"


def recorded(workloads: list[str], seeds: list[int]) -> Results:
    """Returns what was recorded of some workloads, of these seeds."""

    def of_seeds(losses: Results) -> Results:
        return {seed: loss for seed, loss in losses.items() if int(seed) in seeds}

    found = read(NAME)
    return {
        "held_out": {name: found["held_out"][name] for name in workloads},
        "test": {name: {m: of_seeds(x) for m, x in found["test"][name].items()} for name in workloads},
        "reached": {name: of_seeds(found["reached"][name]) for name in workloads},
    }


if __name__ == "__main__":
    main()
