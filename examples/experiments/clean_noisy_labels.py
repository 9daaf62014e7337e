"""Which labels are wrong, and how? Learned by hypergradients while a network trains, beside what others do about it.

45 % of the digits in 3,000 images of MNIST are one too high: labels that are wrong in a pattern, as annotators, scripts
and weak rules make them. 400 images have checked labels. In a single `trainer.fit`, `IFTHypergradient` tunes a weight
for each image and a matrix of how labels are confused. A fresh network is trained through that matrix, and another one
on what the first says of each label; the second is kept where it is clearly better. Beside it stands what else can be
done with the same images, and an oracle that knows which labels are wrong. Each network is stopped where its loss on
100 further checked images is lowest. Test labels decide nothing.

    python -m examples.experiments.clean_noisy_labels                                  # less than two minutes
    python -m examples.experiments.clean_noisy_labels --noise symmetric --rate 0.4     # labels that are wrong at random
    python -m examples.experiments.clean_noisy_labels --noise instance --rate 0.4      # depending on the image
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    extent,
    make_parser,
    markdown,
    mean,
    number,
    rounded,
    start,
)
from examples.experiments.problems import label_noise as problem
from examples.experiments.problems.label_comparison import FINAL_STEPS, RANKINGS, ROWS, Comparison, compare
from examples.experiments.problems.label_methods import LOOK_EVERY
from examples.experiments.style import BOUND, OTHER, OURS, OUTER, PLAIN, WRONG, page

NAME = "clean_noisy_labels"
# rows that take seconds; `--all` has the others too
QUICK = ("equal", "checked", "gold", "ours", "forward", "relabelled", "no_hyper", "oracle")
CURVES = {
    "oracle": (BOUND, "wrong labels left out (oracle)"),
    "ours": (OURS, "the recipe: confusions tuned, labels corrected"),
    "gold": (OTHER, "gold loss correction"),
    "checked": (OUTER, "checked images alone"),
    "equal": (PLAIN, "all labels, equal weights"),
}


def run(args: Any) -> Results:
    """Makes the comparison for each seed; of the first one, what was learned is kept for the picture."""
    results: Results = {"noise": args.noise, "rate": args.rate, "accuracy": {}, "auc": {}, "error": {}}
    for seed in args.seeds:
        data, folder = problem.load_data("MNIST", args.noise, args.rate, seed), args.output / NAME / f"seed_{seed}"
        found = compare(
            data,
            seed,
            rows=ROWS if args.all else QUICK,
            learn_steps=args.learn_steps,
            final_steps=args.final_steps,
            callbacks=[RichProgressBar()],
            logger=[CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard")],
            log_every_n_steps=problem.HYPER_EVERY,
            enable_progress_bar=True,
        )
        for key in ("accuracy", "auc", "error"):
            for name, value in getattr(found, key).items():
                results[key].setdefault(name, {})[str(seed)] = value
        print(f"seed {seed}", *(f"{name} {value:.3f}" for name, value in found.accuracy.items()), sep="   ", flush=True)
        if "picture" not in results:
            results["picture"] = {"seed": seed, **_for_the_picture(data, found)}
    return results


def _for_the_picture(data: problem.Data, found: Comparison) -> Results:
    """Returns what was learned on one split."""
    return {
        "transition": [[rounded(entry) for entry in row] for row in found.learned.transition.tolist()],
        "true_transition": [[rounded(entry) for entry in row] for row in data.true_transition().tolist()],
        "label_score": [rounded(score) for score in found.label_score.tolist()],
        "likely": found.outcomes["ours"].probabilities.argmax(1).tolist(),
        "curves": {name: [rounded(a) for a in found.outcomes[name].curve] for name in CURVES},
        "stops": {name: [found.outcomes[name].step, rounded(found.outcomes[name].accuracy)] for name in CURVES},
    }


def summary(results: Results) -> dict[str, float]:
    """Returns means over seeds."""
    auc = {f"AUC, {name}": mean(values) for name, values in results["auc"].items()}
    error = {f"error of the {name} transition": mean(values) for name, values in results["error"].items()}
    return {name: mean(values) for name, values in results["accuracy"].items()} | auc | error


def table(results: Results) -> str:
    """Returns means and ranges over seeds."""
    rows = [
        [ROWS[name], number(mean(results["accuracy"][name])), extent(results["accuracy"][name])]
        for name in ROWS
        if name in results["accuracy"]
    ]
    return markdown(["trained on", "test accuracy", "from – to"], rows)


def rankings(results: Results) -> str:
    """Returns with which AUC each ranking finds the wrong labels."""
    rows = [[title, number(mean(results["auc"][n]))] for n, title in RANKINGS.items() if n in results["auc"]]
    return markdown(["ranked by", "AUC"], rows)


def draw(results: Results) -> Figure:
    """Returns a picture of the rejected images, of the learned confusions, and of what they are worth."""
    picture = results["picture"]
    data = problem.load_data("MNIST", results["noise"], results["rate"], picture["seed"])
    score = torch.tensor(picture["label_score"])
    worst = score.argsort()[: int(data.wrong.sum())]
    share = float(data.wrong[worst].float().mean())
    figure = page(5.0, f"Of the labels that the recipe trusts least, {share:.0%} are wrong")
    panels = figure.subplot_mosaic(
        [["images", "learned", "true"], ["images", "accuracy", "accuracy"]], width_ratios=(1.5, 1, 1)
    )
    draw_rejected(panels["images"], data, worst, picture["likely"])
    for name, title in (("learned", "Tuned confusions"), ("true", "True ones")):
        draw_matrix(panels[name], picture["transition" if name == "learned" else "true_transition"], title)
    panel = panels["accuracy"]
    for name, (role, label) in CURVES.items():
        steps = range(LOOK_EVERY, LOOK_EVERY * len(picture["curves"][name]) + 1, LOOK_EVERY)
        panel.plot(steps, picture["curves"][name], **role.line(label=label))
        panel.plot(*picture["stops"][name], **role.points(markersize=8))
    panel.set(xlabel="step (marks: stopped by 100 held-out images)", ylabel="test accuracy", ylim=(0.25, 1.0))
    panel.legend(loc="lower right")
    return figure


def draw_matrix(panel: Axes, matrix: list[list[float]], title: str) -> None:
    """Shows a matrix of probabilities."""
    panel.imshow(torch.tensor(matrix).numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    panel.set(title=title, xlabel="given label", ylabel="true class", xticks=range(10), yticks=range(10))
    panel.grid(visible=False)


def draw_rejected(panel: Axes, data: problem.Data, worst: Any, likely: list[int]) -> None:
    """Shows images whose labels are trusted least, with the given and the likely label; wrong proposals are marked."""
    columns, lines, (height, width) = 5, 6, (44, 44)  # pixels of a tile: an image and, above it, room for its labels
    shown = worst[:: max(1, len(worst) // (columns * lines))][: columns * lines]  # from all over the rejected ones
    images, labels = data.noisy
    tiles = F.pad(images[shown, 0], (8, 8, 15, 1)).view(lines, columns, height, width)
    panel.imshow(tiles.transpose(1, 2).reshape(lines * height, columns * width).numpy(), cmap="gray_r")
    for place, index in enumerate(shown.tolist()):
        row, column = divmod(place, columns)
        right = likely[index] == int(data.truth[index])
        spot, color = ((column + 0.5) * width, row * height + 13), OURS.color if right else WRONG.color
        panel.annotate(f"{int(labels[index])} → {likely[index]}", spot, ha="center", color=color)
    panel.set_title("Rejected labels → likely ones (vermilion: not right)")
    panel.set_axis_off()


def main(argv: list[str] | None = None) -> Figures:
    """Runs the comparison for each seed; returns what the last line says."""
    parser = make_parser(__doc__, seeds=[3])
    parser.add_argument("--noise", choices=problem.NOISES, default="pair")
    parser.add_argument("--rate", type=float, default=0.45, help="share of wrong labels")
    parser.add_argument("--all", action="store_true", help="all methods, and the recipe without each ingredient")
    parser.add_argument("--learn-steps", type=int, default=problem.LEARN_STEPS)
    parser.add_argument("--final-steps", type=int, default=FINAL_STEPS)
    args = parser.parse_args(argv)
    start(ignore=["`torch.jit.script"])
    is_default = (args.noise, args.rate) == (parser.get_default("noise"), parser.get_default("rate"))
    return conclude(NAME, run(args), args, summary=summary, table=table, draw=draw, comparable=is_default)


if __name__ == "__main__":
    main()
