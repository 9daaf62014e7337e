"""Which labels are wrong? One weight for each training image, learned by hypergradients while a network trains.

40 % of the labels of 3,000 MNIST images are wrong. A network learns from them, and 400 clean images tell, through the
outer loss, which labels to trust: `IFTHypergradient` tunes 3,000 weights inside a single `trainer.fit`. Fresh networks
then show what the weights are worth, next to what is possible without them and next to an oracle that knows the right
labels. Each of them is stopped where its loss on 100 further clean images is lowest. Test labels decide nothing.

Seeds differ more than methods do, so the table shows two sets of three seeds. Settings were chosen on other seeds.

    python -m examples.experiments.clean_noisy_labels                             # half a minute on two cores
    python -m examples.experiments.clean_noisy_labels --seeds 0 1 2 --controls    # two minutes
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader

from examples.experiments.common import (
    Figures,
    Results,
    conclude,
    extent,
    make_parser,
    markdown,
    mean,
    number,
    quiet_trainer,
    start,
    values,
)
from examples.experiments.problems import noisy_labels as problem
from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import IndexedDataset
from lightning_ifthpo.solvers import Identity, Solver

NAME = "clean_noisy_labels"
ROWS = {
    "noisy": "the noisy labels alone",
    "clean": "the clean images alone",
    "both": "both, all weights equal",
    "learned": "**both, weights learned by hypergradients**",
    "identity": "control: the same, but learned without curvature",
    "oracle": "oracle: both, wrong labels left out",
    "auc": "AUC with which the weights find the wrong labels",
    "identity_auc": "AUC of the control",
}
AUC = {"learned": "auc", "identity": "identity_auc"}
SETS = {"0–2": (0, 1, 2), "3–5": (3, 4, 5)}  # of seeds, in the table


def learn_weights(data: problem.Data, seed: int, steps: int, solver: Solver | None, logs: Path) -> Tensor:
    """Returns a weight for each noisy label, [3000], learned in a single run."""
    torch.manual_seed(seed)
    learner = problem.WeightLearner()
    hypergradient = IFTHypergradient(
        every_n_batches=problem.HYPER_EVERY,
        start_after_batches=problem.WARM_UP,
        solver=solver,
        outer_dataloader=DataLoader(data.clean, batch_size=problem.CLEAN),
    )
    trainer = quiet_trainer(
        [hypergradient, RichProgressBar()],
        logger=[CSVLogger(logs, name="csv"), TensorBoardLogger(logs, name="tensorboard")],
        log_every_n_steps=problem.HYPER_EVERY,
        enable_progress_bar=True,
    )
    trainer.fit(learner, problem.batches(IndexedDataset(data.noisy), steps, seed + 1))
    weights: Tensor = learner.weights(torch.arange(problem.NOISY))
    return weights


def run(seeds: list[int], solvers: dict[str, Solver | None], learn_steps: int, final_steps: int, logs: Path) -> Results:
    """Makes the comparison for each seed; of the first one, weights and curves are kept for the picture."""
    scores: dict[str, dict[str, float]] = {}
    picture: Results = {}
    for seed in seeds:
        data, checks, found = problem.load_data(seed), {}, {}
        folder = logs / f"seed_{seed}"
        learned = {name: learn_weights(data, seed, learn_steps, solvers[name], folder / name) for name in solvers}
        for name, weights in learned.items():
            found[AUC[name]] = float(roc_auc_score(data.wrong, -weights))
        for name, dataset in problem.training_sets(data, learned).items():
            checks[name] = problem.train(dataset, data, seed, final_steps)
            found[name] = min(checks[name]).test_accuracy
        print(f"seed {seed}", *(f"{name} {value:.3f}" for name, value in found.items()), sep="   ", flush=True)
        for name, value in found.items():
            scores.setdefault(name, {})[str(seed)] = value
        if not picture:
            curves = {name: [[c.step, c.test_accuracy] for c in checks[name]] for name in checks}
            stops = {name: [min(checks[name]).step, min(checks[name]).test_accuracy] for name in checks}
            rounded_weights = [round(weight, 4) for weight in learned["learned"].tolist()]
            picture = {"seed": seed, "weights": rounded_weights, "curves": curves, "stops": stops}
    return {"scores": scores, "picture": picture}


def summary(results: Results) -> dict[str, float]:
    """Returns means over seeds."""
    return {name: mean(results["scores"][name]) for name in ROWS if name in results["scores"]}


def table(results: Results) -> str:
    """Returns means and ranges for the sets of seeds that were run."""
    scores = results["scores"]
    sets = {title: seeds for title, seeds in SETS.items() if values(scores["both"], seeds)}
    header = ["trained on", *(column for title in sets for column in (f"test accuracy, seeds {title}", "from – to"))]
    rows = []
    for name in ROWS:
        if name in scores:
            pairs = [(number(mean(scores[name], seeds)), extent(scores[name], seeds)) for seeds in sets.values()]
            rows.append([ROWS[name], *(cell for pair in pairs for cell in pair)])
    return markdown(header, rows)


def draw(results: Results) -> Figure:
    """Returns a picture of what the weights say about single images and about all, and of what that is worth."""
    picture = results["picture"]
    data, weights = problem.load_data(picture["seed"]), torch.tensor(picture["weights"])
    figure = Figure(figsize=(12.5, 6.4), layout="constrained", dpi=100)
    figure.suptitle("Which labels are wrong? 3,000 weights, learned while the network trained", fontsize=17)
    panels = figure.subplot_mosaic([["images", "weights"], ["images", "accuracy"]], width_ratios=(1, 1.2))
    draw_rejected(panels["images"], data, weights)
    for kind, chosen, color in (("wrong", data.wrong, "tab:red"), ("right", ~data.wrong, "tab:blue")):
        found = weights[chosen].tolist()
        panels["weights"].hist(found, bins=50, range=(0, 2), color=color, alpha=0.6, label=f"{kind} labels")
    panels["weights"].set(xlabel="learned weight", ylabel="images", xlim=(0, 2))
    panels["weights"].legend(frameon=False, loc="upper center")
    panel = panels["accuracy"]
    curves = {
        "oracle": ("tab:green", "oracle: wrong labels left out"),
        "learned": ("tab:blue", "learned weights"),
        "both": ("tab:orange", "noisy and clean, all weights equal"),
        "noisy": ("tab:gray", "noisy labels alone"),
        "clean": ("tab:brown", "clean images alone"),
    }
    for name, (color, label) in curves.items():
        panel.plot(*zip(*picture["curves"][name], strict=True), color=color, label=label)
        panel.plot(*picture["stops"][name], "o", color=color, markersize=9)
    panel.set(xlabel="training step (dots: stopped by 100 held-out images)", ylabel="test accuracy", ylim=(0.75, 0.96))
    panel.legend(frameon=False, loc="lower right")
    for panel in (panels["weights"], panels["accuracy"]):
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_rejected(panel: Any, data: problem.Data, weights: Tensor) -> None:
    """Shows the images with the lowest weights and their labels, wrong ones in red."""
    side, (height, width) = 5, (42, 40)  # pixels of a tile: an image and, above it, room for its label
    rejected = weights.argsort()[: side**2]
    images, labels = data.noisy.tensors
    tiles = F.pad(images[rejected, 0], (6, 6, 13, 1)).view(side, side, height, width)
    panel.imshow(tiles.transpose(1, 2).reshape(side * height, side * width).numpy(), cmap="gray_r")
    for place, index in enumerate(rejected.tolist()):
        row, column = divmod(place, side)
        spot, color = ((column + 0.5) * width, row * height + 12), "tab:red" if data.wrong[index] else "tab:blue"
        panel.annotate(f"{labels[index]}?", spot, ha="center", fontsize=14, color=color)
    wrong = int(data.wrong[rejected].sum())
    panel.set_title(f"Lowest weights: {wrong} labels are wrong (red), {side**2 - wrong} right (blue)", fontsize=13)
    panel.set_axis_off()


def main(argv: list[str] | None = None) -> Figures:
    """Runs the comparison for each seed; returns what the last line says."""
    parser = make_parser(__doc__, seeds=[0])
    parser.add_argument("--controls", action="store_true", help="also learn weights without curvature")
    parser.add_argument("--learn-steps", type=int, default=problem.LEARN_STEPS)
    parser.add_argument("--final-steps", type=int, default=problem.FINAL_STEPS)
    args = parser.parse_args(argv)
    start()
    solvers: dict[str, Solver | None] = {"learned": None} | ({"identity": Identity()} if args.controls else {})
    results = run(args.seeds, solvers, args.learn_steps, args.final_steps, args.output / NAME)
    return conclude(NAME, results, args, summary=summary, table=table, draw=draw)


if __name__ == "__main__":
    main()
