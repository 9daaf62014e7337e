"""Wrong labels of three kinds at three rates, in images and in sentences: hypergradients beside what others do.

3,000 examples have noisy labels, 400 checked ones, and 100 more choose where to stop. All methods have the same
network, schedule and examples (`problems/label_methods.py`). The settings of the recipe are the same for all problems.
They were chosen on splits 0 to 2; the table has other splits.

    python -m examples.experiments.label_noise --datasets MNIST --noises pair --rates 0.45 --seeds 3     # two minutes
    python -m examples.experiments.label_noise                     # hours; sentences need 'lightning_ifthpo[text]'
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    make_parser,
    markdown,
    mean,
    number,
    start,
    values,
)
from examples.experiments.problems.label_comparison import FINAL_STEPS, RANKINGS, RIVALS, ROWS, compare
from examples.experiments.problems.label_noise import DATASETS, LEARN_STEPS, NOISES, load_data
from examples.experiments.style import BOUND, OTHER, OURS, PLAIN, name_rows, page

NAME = "label_noise"
RATES = {"symmetric": (0.2, 0.4, 0.6), "pair": (0.3, 0.45, 0.6), "instance": (0.2, 0.4, 0.6)}
LEVEL = 0.005  # of accuracy


def run(
    datasets: list[str], noises: list[str], rates: list[float] | None, seeds: list[int], learn: int, final: int
) -> Results:
    """Makes the comparison on each problem, for each seed."""
    results: Results = {"accuracy": {}, "auc": {}, "error": {}}
    for seed in seeds:
        for dataset in datasets:
            for noise in noises:
                for rate in rates or RATES[noise]:
                    data = load_data(dataset, noise, rate, seed)
                    found = compare(data, seed, learn_steps=learn, final_steps=final)
                    problem = f"{dataset}, {noise}, {rate:g}"
                    for key in results:
                        for name, value in getattr(found, key).items():
                            results[key].setdefault(problem, {}).setdefault(name, {})[str(seed)] = round(value, 4)
                    print(problem, f"seed {seed}", *(f"{n} {a:.3f}" for n, a in found.accuracy.items()), sep="  ")
    return results


def problems(results: Results) -> list[str]:
    """Returns the problems that were run, in their order."""
    order = [f"{d}, {n}, {r:g}" for d in DATASETS for n, rates in RATES.items() for r in rates]
    found = results["accuracy"]
    return [problem for problem in order if problem in found] + [problem for problem in found if problem not in order]


def best_rival(results: Results, problem: str) -> str:
    """Returns the key of the rival with the highest mean accuracy."""
    scores = results["accuracy"][problem]
    return max((name for name in RIVALS if name in scores), key=lambda name: mean(scores[name]))


def distance(results: Results, problem: str, rival: str) -> tuple[float, float]:
    """Returns how much more accurate ours is than a rival, and the standard error of that over seeds."""
    scores = results["accuracy"][problem]
    pairs = [(scores["ours"][seed], scores[rival][seed]) for seed in scores["ours"] if seed in scores[rival]]
    differences = [ours - theirs for ours, theirs in pairs]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return fmean(differences), error


def summary(results: Results) -> dict[str, float]:
    """Returns mean accuracies over all problems, and in how many ours is as good as the best rival."""
    found = problems(results)
    scores = [results["accuracy"][problem] for problem in found]
    means = {name: fmean(mean(each[name]) for each in scores) for name in ROWS if all(name in each for each in scores)}
    gaps = [distance(results, problem, best_rival(results, problem)) for problem in found]
    return means | {
        "problems": float(len(found)),
        "not below the best rival by more than half a point": float(sum(gap >= -LEVEL for gap, _ in gaps)),
        "best or level within a standard error": float(sum(gap >= -error for gap, error in gaps)),
    }


def table(results: Results) -> str:
    """Returns for each problem the test accuracies of some methods, and of the best rival."""
    header = ["problem", "equal weights", "checked alone", "best of seven rivals", "", "ours", "oracle"]
    rows = []
    for problem in problems(results):
        scores, rival = results["accuracy"][problem], best_rival(results, problem)
        gap, error = distance(results, problem, rival)
        ours = number(mean(scores["ours"]))
        cells = [number(mean(scores[name])) for name in ("equal", "checked", rival)]
        name = RIVALS[rival].removeprefix("lowest ")
        rows.append([problem, *cells, name, f"**{ours}**" if gap >= -error else ours, number(mean(scores["oracle"]))])
    return markdown(header, rows)


def methods(results: Results) -> str:
    """Returns the mean test accuracy of each method for each kind of noise, over data sets and rates."""
    kinds = [noise for noise in RATES if any(f", {noise}, " in problem for problem in problems(results))]
    rows = []
    for name, title in ROWS.items():
        means = []
        for kind in kinds:
            found = [results["accuracy"][p] for p in problems(results) if f", {kind}, " in p]
            means.append(number(fmean(mean(scores[name]) for scores in found)))
        rows.append([title, *means])
    return markdown(["method", *kinds], rows)


def rankings(results: Results) -> str:
    """Returns with which AUC each ranking finds the wrong labels, and how far the transition is from the true one."""
    shown = [name for name in RANKINGS if all(name in results["auc"][problem] for problem in problems(results))]
    rows = []
    for problem in problems(results):
        found, errors = results["auc"][problem], results["error"][problem]
        rows.append([problem, *(number(mean(found[n])) for n in shown), *(number(mean(e)) for e in errors.values())])
    titles = [RANKINGS[name] for name in shown]
    return markdown(["problem", *titles, "error of the tuned transition", "of the estimated one"], rows)


def draw(results: Results) -> Figure:
    """Returns a picture of the accuracy on each problem: ours, the best rival, equal weights and the oracle."""
    found = problems(results)
    level = int(summary(results)["best or level within a standard error"])
    headline = f"One recipe is best or level on {level} of {len(found)} problems with wrong labels"
    figure = page(1.2 + 0.27 * len(found), headline)
    panel = figure.add_subplot()
    for place, problem in enumerate(found):
        scores = results["accuracy"][problem]
        marks: list[tuple[str, Any]] = [
            ("equal", PLAIN),
            ("oracle", BOUND),
            (best_rival(results, problem), OTHER),
            ("ours", OURS),
        ]
        for name, role in marks:
            label = {"equal": "equal weights", "oracle": "wrong labels left out", "ours": "the recipe"}.get(name)
            label = (label or "best of seven rivals") if place == 0 else None
            seeds = values(scores[name])
            panel.plot(mean(scores[name]), place, **role.points(label=label, markersize=8, zorder=3))
            if len(seeds) > 1:
                panel.plot([min(seeds), max(seeds)], [place, place], color=role.color, linewidth=1, alpha=0.5)
    name_rows(panel, found)
    panel.set(xlabel="test accuracy (lines: from the lowest to the highest seed)")
    panel.legend(loc="lower left")
    return figure


def main(argv: list[str] | None = None) -> Figures:
    """Runs the comparison; returns what the last line says."""
    parser = make_parser(__doc__, seeds=[3, 4, 5, 6, 7])
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--rates", nargs="+", type=float, help="three rates for each kind of noise by default")
    parser.add_argument("--learn-steps", type=int, default=LEARN_STEPS)
    parser.add_argument("--final-steps", type=int, default=FINAL_STEPS)
    args = parser.parse_args(argv)
    start(ignore=["`torch.jit.script"])
    results = run(args.datasets, args.noises, args.rates, args.seeds, args.learn_steps, args.final_steps)
    return conclude(NAME, results, args, summary=summary, table=table, draw=draw)


if __name__ == "__main__":
    main()
