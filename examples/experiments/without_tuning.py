"""Eight problems with the callback as it comes, against the best of a grid of hyper learning rates.

Each problem is run for several lengths of training, with hyperparameters that start at a usual value or 30 times off to
either side, and several seeds. "Gain" is what a method takes off the loss without tuning, as a fraction of what the
best of the grid takes off, which is chosen for each problem, length and start by the very loss that is shown. A run
without tuning trains with the start values. The constants of the default were chosen on these problems with seeds 0 to
2.

    python -m examples.experiments.without_tuning                                       # a minute: 300 steps, one seed
    python -m examples.experiments.without_tuning --steps 300 1000 --seeds 0 1 2 --grid 5 --workers 2
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from statistics import fmean, median, pstdev
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    make_parser,
    markdown,
    number,
    quiet_trainer,
    random_batches,
    start,
)
from examples.experiments.problems.eight import PROBLEMS, Problem
from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.solvers import SAMA, Amortized, Solver

NAME = "without_tuning"
RATES = (0.01, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)  # of Adam
FACTORS = (1 / 30, 1.0, 30.0)
STARTS = dict(zip(FACTORS, ("30 times less", "usual", "30 times more"), strict=True))
EVERY = 5
CEILING = 20.0  # of a loss, where training diverged
SAME = 0.03  # change of a loss that is not counted as a change
SMALL = 0.02  # a gain of the best method below this fraction of the loss is not counted
UNTUNED, DEFAULT = "untuned", "default"
CHOSEN = ("0", "1", "2")  # seeds by which the constants of the default were chosen


class Variant(NamedTuple):
    """Another choice of a default.

    Args:
        every: Training batches between two hyper steps.
        cost: Of a hyper step, in gradients of the training loss, as in docs/benchmarks.md.
        solver: Of the linear system.
    """

    every: int = EVERY
    cost: float = 5.0
    solver: Solver = Amortized(products=2, horizon=100)

    def steps(self, budget: int) -> int:
        """Returns how many training steps take as long as so many with the defaults."""
        return round(budget * (1.0 + Variant().cost / EVERY) / (1.0 + self.cost / self.every))


VARIANTS = {
    "every batch": Variant(1),
    "every 2": Variant(2),
    "every 10": Variant(10),
    "every 20": Variant(20),
    "every 50": Variant(50),
    "horizon 30": Variant(solver=Amortized(products=2, horizon=30)),
    "horizon 300": Variant(solver=Amortized(products=2, horizon=300)),
    "five products": Variant(cost=10.0, solver=Amortized(products=5, horizon=100)),
    "SAMA": Variant(cost=3.0, solver=SAMA()),
}


class Run(NamedTuple):
    """One run of one method on one problem; the method is "untuned", "default", a variant or "<every>:<rate>"."""

    problem: str
    steps: int
    factor: float
    method: str
    seed: int


def measure(run: Run) -> dict[str, Any]:
    """Returns the losses after a run, on all outer and all held-out examples, and the verdict of the callback."""
    start(ignore=["would have moved the hyperparameters", "ended with status"])
    kind = PROBLEMS[run.problem]
    split = kind.data(run.seed)
    torch.manual_seed(run.seed)
    module = kind(run.factor, split)
    every, _, rate = run.method.partition(":")
    variant = VARIANTS.get(run.method, Variant(int(every) if rate else EVERY))
    if rate:
        module.configure_hyper_optimizer = lambda: torch.optim.Adam(module.hyperparameters(), lr=float(rate))  # type: ignore[method-assign]
    callbacks = []
    if run.method != UNTUNED:
        outer = DataLoader(split.outer, module.batch_size, shuffle=True)
        callbacks = [IFTHypergradient(variant.every, solver=variant.solver, outer_dataloader=outer)]
    batch_size = min(module.batch_size, len(split.train))
    steps = variant.steps(run.steps) if run.method in VARIANTS else run.steps
    quiet_trainer(callbacks, limit_val_batches=0).fit(module, random_batches(split.train, batch_size, steps, run.seed))
    found: dict[str, Any] = {"outer": loss(module, split.outer), "held out": loss(module, split.held_out)}
    if callbacks:
        summary = callbacks[0].summary()
        found |= {"verdict": summary.verdict, "replaced": summary.replaced}
    return found


@torch.no_grad()
def loss(module: Problem, examples: Any) -> float:
    """Returns the outer loss on all examples of a part, to seven digits, and at most the ceiling, as if it is NaN."""
    module.eval()
    value = float(module.outer_loss(examples.tensors))
    return float(f"{value:.7g}") if value < CEILING else CEILING


# Results: {problem: {steps: {factor: {method: {seed: what `measure` returns}}}}}


def nested(runs: Iterable[Run], measured: Iterable[dict[str, Any]]) -> Results:
    """Returns what runs have measured, as nested dicts."""
    results: Results = {}
    for run, values in zip(runs, measured, strict=True):
        level = results
        for key in (run.problem, str(run.steps), f"{run.factor:.3g}", run.method):
            level = level.setdefault(key, {})
        level[str(run.seed)] = values
    return results


class Cell(NamedTuple):
    """Means over seeds for one problem, number of steps and start, of one of the two losses."""

    problem: str
    steps: int
    factor: str
    losses: dict[str, float]
    untuned_error: float

    @property
    def best(self) -> str:
        """The method with the lowest mean loss, of the grid and no tuning."""
        return min(
            (method for method in self.losses if method == UNTUNED or ":" in method), key=self.losses.__getitem__
        )

    def gain(self, method: str) -> float:
        """Returns how much of the gain of the best method a method has; NaN if there is hardly anything to gain."""
        possible = self.losses[UNTUNED] - self.losses[self.best]
        if possible < SMALL * self.losses[UNTUNED]:
            return math.nan
        return (self.losses[UNTUNED] - self.losses[method]) / possible

    def harm(self, method: str) -> bool:
        """Returns whether a method is worse than no tuning, by more than the standard error and by over one percent."""
        return self.losses[method] - self.losses[UNTUNED] > max(self.untuned_error, 0.01 * self.losses[UNTUNED])


def cells(
    results: Results, which: str, steps: int | None = None, methods: Iterable[str] = (UNTUNED, DEFAULT)
) -> Iterator[Cell]:
    """Yields all cells in which some methods were run, with the seeds that these share, and who else has them."""
    needed = {UNTUNED, DEFAULT, *methods}
    for problem in PROBLEMS:
        for length, by_factor in results.get(problem, {}).items():
            for factor, by_method in by_factor.items() if steps in (None, int(length)) else ():
                if needed <= by_method.keys():
                    seeds = known(set.intersection(*(set(by_method[method]) for method in needed)))
                    losses = {
                        method: fmean(by_seed[seed][which] for seed in seeds)
                        for method, by_seed in by_method.items()
                        if by_seed.keys() >= set(seeds)
                    }
                    error = pstdev(by_method[UNTUNED][seed][which] for seed in seeds) / math.sqrt(len(seeds))
                    yield Cell(problem, int(length), factor, losses, error)


def known(seeds: Collection[str]) -> list[str]:
    """Returns the seeds by which constants were chosen, if there are any; else all."""
    return sorted(set(seeds) & set(CHOSEN) or seeds)


def fresh(results: Results) -> str:
    """Returns `table` for the seeds by which nothing was chosen."""

    def without(level: Results, depth: int) -> Results:
        if not depth:
            return {seed: run for seed, run in level.items() if seed not in CHOSEN}
        deeper = {key: without(value, depth - 1) for key, value in level.items()}
        return {key: value for key, value in deeper.items() if value}

    return table(without({problem: results[problem] for problem in PROBLEMS if problem in results}, 4))


def over_untuned(cells: Iterable[Cell], method: str) -> float:
    """Returns the geometric mean of the loss of a method over that without tuning."""
    return math.exp(fmean(math.log(cell.losses[method] / cell.losses[UNTUNED]) for cell in cells))


def lengths(results: Results) -> list[int]:
    """Returns the numbers of steps that were run."""
    return sorted({cell.steps for cell in cells(results, "outer")})


def grid(results: Results) -> list[str]:
    """Returns the methods of the grid that were run in all cells."""
    methods = [set(cell.losses) for cell in cells(results, "outer")]
    common = set.intersection(*methods) if methods else set()
    return sorted(
        (method for method in common if ":" in method), key=lambda method: tuple(map(float, method.split(":")))
    )


def summary(results: Results) -> dict[str, float]:
    """Returns, for outer and held-out loss, the median gain of the default, and the fraction of cells that it harms."""
    found = {}
    for which in ("outer", "held out"):
        every = list(cells(results, which))
        gains = [gain for cell in every if not math.isnan(gain := cell.gain(DEFAULT))]
        if gains:
            found[f"{which}: median gain of the default"] = median(gains)
        found[f"{which}: loss over untuned"] = over_untuned(every, DEFAULT)
        found[f"{which}: fraction of cells harmed"] = fmean(cell.harm(DEFAULT) for cell in every)
    return found


def table(results: Results) -> str:
    """Returns `gains` with the default's cadence, and the verdicts on the default."""
    same = [method for method in grid(results) if method.startswith(f"{EVERY}:")]
    return f"{gains(results, same)}\n\n{verdicts(results)}"


def gains(results: Results, methods: Sequence[str] | None = None) -> str:
    """Returns the gain of some methods, or of all, over all cells, for each number of steps."""
    rows = []
    for length in lengths(results):
        for method in (DEFAULT, *(grid(results) if methods is None else methods)):
            row = [f"{length:,}", label(method)]
            for which in ("outer", "held out"):
                every = list(cells(results, which, length))
                found = [gain for cell in every if not math.isnan(gain := cell.gain(method))]
                reached = sum(gain >= 0.6 for gain in found)
                row += [
                    number(median(found), 2) if found else "–",
                    f"{reached} of {len(found)}",
                    f"{sum(cell.harm(method) for cell in every)} of {len(every)}",
                    number(over_untuned(every, method), 2),
                ]
            rows.append(row)
    header = ["steps", "method"]
    for which in ("outer", "held out"):
        header += [f"{which}: median gain", "gain of 0.6 or more", "worse than untuned", "loss over untuned"]
    return markdown(header, rows)


def variants(results: Results) -> str:
    """Returns what other defaults would have reached in the time that the defaults take."""
    rows = []
    for length in lengths(results):
        seeds_of = seeds_of_variants(results, length)
        for seeds in sorted(set(seeds_of.values()), key=len):
            methods = [method for method, own in seeds_of.items() if own >= seeds]
            every = {which: list(cells(results, which, length, methods)) for which in ("outer", "held out")}
            for method in (DEFAULT, *methods):
                ratios = [number(over_untuned(some, method), 2) for some in every.values()]
                harmed = sum(cell.harm(method) for cell in every["held out"])
                harmed_of = f"{harmed} of {len(every['held out'])}"
                rows.append([f"{length:,}", str(len(seeds)), label(method), *ratios, harmed_of])
    header = ["time of so many steps", "seeds", "defaults", "outer loss over untuned", "held-out loss over untuned"]
    return markdown([*header, "worse than untuned"], rows)


def seeds_of_variants(results: Results, length: int) -> dict[str, frozenset[str]]:
    """Returns the seeds with which variants were run in all cells of a length; without variants that were not."""
    runs = [by_method for problem in PROBLEMS for by_method in results.get(problem, {}).get(str(length), {}).values()]
    seeds = {method: frozenset.intersection(*(frozenset(run.get(method, ())) for run in runs)) for method in VARIANTS}
    return {method: own for method, own in seeds.items() if own}


def verdicts(results: Results) -> str:
    """Returns how often each verdict was given to runs of the default, by what became of the held-out loss."""
    counts: Counter[tuple[str, str]] = Counter()
    for problem in results.keys() & PROBLEMS.keys():
        for by_factor in results[problem].values():
            for by_method in by_factor.values():
                default = by_method.get(DEFAULT, {})
                for seed in known(default):
                    run = default[seed]
                    change = math.log(run["held out"] / by_method[UNTUNED][seed]["held out"])
                    truth = "same" if abs(change) <= SAME else "lower" if change < 0.0 else "higher"
                    counts[run["verdict"], truth] += 1
    truths = ("lower", "same", "higher")
    rows = [
        [f'"{verdict}"', *(str(counts[verdict, truth]) for truth in truths)]
        for verdict in ("helped", "did nothing", "unclear", "harmed")
    ]
    return markdown(["verdict", *(f"held-out loss is {truth}" for truth in truths)], rows)


def label(method: str) -> str:
    """Returns the name of a method for people."""
    every, _, rate = method.partition(":")
    return f"Adam {rate}, every {every}" if rate else "**the default**" if method == DEFAULT else method


def details(results: Results) -> str:
    """Returns the held-out loss in each cell: without tuning, by default, and of the best of the grid."""
    header = ["problem", "steps", "start", "untuned", "default", "best of the grid", "which"]
    rows = []
    for cell in cells(results, "held out"):
        row = [cell.problem, f"{cell.steps:,}", next(STARTS[f] for f in FACTORS if f"{f:.3g}" == cell.factor)]
        row += [number(cell.losses[method]) for method in (UNTUNED, DEFAULT, cell.best)]
        rows.append([*row, label(cell.best)])
    return markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> Figures:
    """Runs the experiment."""
    parser = make_parser(__doc__, seeds=[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[300])
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--grid", type=int, nargs="*", default=[], help="cadences of the grid, such as 5 1")
    parser.add_argument("--variants", action="store_true", help="other defaults, too, in the same time")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    methods = [UNTUNED, DEFAULT, *(f"{every}:{rate}" for every in args.grid for rate in RATES)]
    methods += VARIANTS if args.variants else ()
    runs = [Run(*run) for run in product(args.problems, args.steps, FACTORS, methods, args.seeds)]
    if args.workers == 1:
        results = nested(runs, map(measure, runs))
    else:
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            results = nested(runs, pool.map(measure, runs))
    return conclude(NAME, results, args, summary=summary, table=table)


if __name__ == "__main__":
    main()
