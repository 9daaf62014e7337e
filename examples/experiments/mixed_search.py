"""Discrete choices by Optuna outside, a thousand continuous hyperparameters by hypergradients inside each trial.

Implicit differentiation cannot choose a width, a depth, an activation, a batch size or an optimizer, nor a learning
rate, because the optimum does not depend on it. Optuna can choose these, but not a weight for each of 1,000 training
images of digits, 30 % of which are labelled one too high. Four searches for a perceptron:

    clean      Optuna: choices, decay, smoothing; 70 clean images train, 30 validate, noisy ones stay unused
    alone      Optuna: choices, decay, smoothing; 1,000 noisy images train, 100 clean ones validate, as below
    every      Optuna: choices, decay, smoothing, and the weight of each training image
    inside     Optuna: choices; `IFTHypergradient` tunes decay, smoothing and weights inside each trial

Optuna and the hypergradients minimize the validation loss, which also stops each training early. A tuned trial takes
longer than a plain one, so all searches get the same training time, not the same number of trials: they take turns, and
each goes on until it has spent as much as `inside`. Test images decide nothing. They measure the network of the best
trial, and one retrained on training and validation images, as long and with the hyperparameters found.

With few continuous hyperparameters (decay of each tensor, smoothing, input noise; clean labels) searching and tuning
tie.

    python -m examples.experiments.mixed_search --seeds 0 1 2 3 4    # one minute a seed on one core
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from textwrap import fill
from typing import Any, Literal, NamedTuple, TypeAlias

import lightning as L
import optuna
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.experiments.common import (
    Examples,
    Figures,
    Results,
    accuracy,
    conclude,
    digits_8x8,
    make_parser,
    markdown,
    mean,
    number,
    quiet_trainer,
    random_batches,
    spread,
    start,
    values,
)
from examples.experiments.style import OURS, PLAIN, curve, dots, name_rows, page
from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import LabelSmoothing, SampleWeights, WeightDecay

NAME = "mixed_search"
Method: TypeAlias = Literal["clean", "alone", "every", "inside"]
METHODS: dict[Method, str] = {
    "clean": "Optuna: scalars; clean images only",
    "alone": "Optuna: scalars",
    "every": "Optuna: scalars and weights",
    "inside": "Optuna; scalars and weights inside",
}
# Bounds of the parameters behind decays (1e-6 to 0.5), smoothing (0.003 to 0.48) and weights (0.04 to 1.96).
RANGES = {"decay": (-13.8, 0.0), "smoothing": (-5.0, 3.0), "weights": (-4.0, 4.0)}
SCALARS = {"decay", "smoothing"}
SEARCHED: dict[Method, set[str]] = {"clean": SCALARS, "alone": SCALARS, "every": set(RANGES), "inside": set()}

PARTS = [1000, 100, 697]  # training, validation, test
WRONG = 300  # training labels
STEPS = 400  # of each trial, unless it stops early
CHECK_EVERY = 20  # steps; the validation loss, for early stopping
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}
DECAY, SMOOTHING = 1e-3, 0.05  # where `inside` begins, with weights of one
# With a rate of 0.1, or a hyper step every 10 steps, the validation loss on other splits was 1.5 times as high or more.
HYPER_AFTER, HYPER_EVERY, HYPER_LR = 40, 5, 0.2


class Choices(NamedTuple):
    """What no hypergradient reaches."""

    width: int
    depth: int
    activation: str
    batch_size: int
    optimizer: str
    learning_rate: float

    @classmethod
    def suggested(cls, trial: optuna.Trial) -> Choices:
        """Returns what Optuna wants to try."""
        optimizer = trial.suggest_categorical("optimizer", ["sgd", "adam"])
        slowest, fastest = (0.01, 0.2) if optimizer == "sgd" else (1e-3, 1e-2)
        return cls(
            trial.suggest_categorical("width", [16, 32, 64, 128]),
            trial.suggest_int("depth", 1, 3),
            trial.suggest_categorical("activation", list(ACTIVATIONS)),
            trial.suggest_categorical("batch_size", [25, 50, 100]),
            optimizer,
            trial.suggest_float(f"{optimizer}_learning_rate", slowest, fastest, log=True),
        )


class Classifier(BilevelLightningModule, L.LightningModule):
    """A perceptron for `count` training images, whose hyperparameters stay unless `IFTHypergradient` tunes them."""

    decay: WeightDecay
    smoothing: LabelSmoothing
    weights: SampleWeights

    def __init__(self, choices: Choices, count: int) -> None:
        super().__init__()
        self.choices = choices
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([64] + [choices.width] * choices.depth):
            layers += [nn.Linear(inputs, outputs), ACTIVATIONS[choices.activation]()]
        self.net = nn.Sequential(*layers, nn.Linear(choices.width, 10))
        self.register_hyperparameter("decay", WeightDecay(self.net, initial=DECAY))
        self.register_hyperparameter("smoothing", LabelSmoothing(10, initial=SMOOTHING))
        self.register_hyperparameter("weights", SampleWeights(count))

    def inner_loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Returns what the network minimizes."""
        images, digits, index = batch
        logits = self.mark_outputs(self.net(images))
        losses = F.cross_entropy(logits, self.smoothing(digits), reduction="none")
        total: Tensor = (self.weights(index) * losses).mean() + self.decay()
        return total

    def outer_loss(self, batch: Examples) -> Tensor:
        """Returns what the hyperparameters minimize."""
        images, digits = batch
        return F.cross_entropy(self.net(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer that was chosen."""
        rate = self.choices.learning_rate
        if self.choices.optimizer == "adam":
            return torch.optim.Adam(self.inner_parameters(), lr=rate)
        return torch.optim.SGD(self.inner_parameters(), lr=rate, momentum=0.9)

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the hyperparameters."""
        return torch.optim.Adam(self.hyperparameters(), lr=HYPER_LR)


class EarlyStopping(L.Callback):
    """Returns a module to where its validation loss was lowest, hyperparameters included."""

    def __init__(self, validation: Examples) -> None:
        self.validation = validation
        self.loss, self.step = math.inf, 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        """Remembers the best state."""
        assert isinstance(pl_module, Classifier)
        if trainer.global_step % CHECK_EVERY == 0:
            loss = float(pl_module.outer_loss(self.validation))
            if loss < self.loss:
                self.loss, self.step = loss, trainer.global_step
                self.state = copy.deepcopy(pl_module.state_dict())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores it, unless training diverged before the first look."""
        if self.step:
            pl_module.load_state_dict(self.state)


class Search:
    """A search by Optuna, one trial of so many training steps after another."""

    def __init__(self, method: Method, split: list[Examples], seed: int, steps: int) -> None:
        self.method, self.seed, self.steps = method, seed, steps
        self.training, self.validation, self.test = split
        if method == "clean":
            images, digits = self.validation
            self.training, self.validation = (images[:70], digits[:70]), (images[70:], digits[70:])
        self.study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self.spent = 0.0  # seconds of training
        self.progress: list[tuple[float, float]] = []  # seconds spent, test accuracy of the best trial so far
        self.retrained: float  # test accuracy of the retrained network
        self.best: Classifier
        self.best_step: int

    def run_trial(self) -> None:
        """Trains one network and tells Optuna its validation loss."""
        trial = self.study.ask()
        torch.manual_seed(self.seed)
        module = Classifier(Choices.suggested(trial), len(self.training[1]))
        for name, parameter in module.named_hyperparameters():
            kind = name.split(".")[0]
            if kind in SEARCHED[self.method]:
                values = [trial.suggest_float(f"{name} {i}", *RANGES[kind]) for i in range(parameter.numel())]
                parameter.copy_(torch.tensor(values).view_as(parameter))  # which asks for no gradient
        stopping = EarlyStopping(self.validation)
        callbacks: list[L.Callback] = [stopping]
        if self.method == "inside":
            outer = [self.validation]
            callbacks.insert(0, IFTHypergradient(HYPER_EVERY, start_after_batches=HYPER_AFTER, outer_dataloader=outer))
        began = time.process_time()  # one thread; on a busy machine the clock on the wall would be unfair
        train(module, self.training, self.steps, self.seed, callbacks)
        self.spent += time.process_time() - began
        self.study.tell(trial, stopping.loss)
        if self.study.best_trial.number == trial.number:
            self.best, self.best_step = module, stopping.step
        self.progress.append((self.spent, accuracy(self.best.net, self.test)))

    def retrain(self) -> None:
        """Trains a fresh network on training and validation images, the latter of weight one."""
        torch.manual_seed(self.seed + 1000)
        images, digits = map(torch.cat, zip(self.training, self.validation, strict=True))
        module = Classifier(self.best.choices, len(digits))
        for fresh, found in zip(module.hyperparameters(), self.best.hyperparameters(), strict=True):
            fresh.view(-1)[: found.numel()] = found.view(-1)
        train(module, (images, digits), self.best_step, self.seed, [])
        self.retrained = accuracy(module.net, self.test)


def train(module: Classifier, examples: Examples, steps: int, seed: int, callbacks: list[L.Callback]) -> None:
    """Trains a network on random batches."""
    dataset = TensorDataset(*examples, torch.arange(len(examples[1])))
    quiet_trainer(callbacks).fit(module, random_batches(dataset, module.choices.batch_size, steps, seed))


def load_data(seed: int) -> list[Examples]:
    """Splits the 1,797 digits of scikit-learn into three sets at random, and makes training labels wrong."""
    images, digits = digits_8x8()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    digits[order[:WRONG]] = (digits[order[:WRONG]] + 1) % 10
    return [(images[part], digits[part]) for part in torch.split(order, PARTS)]


def search_all(split: list[Examples], seed: int, trials: int, steps: int) -> dict[Method, Search]:
    """Runs all searches for the same training time, which is that of `trials` tuned trials."""
    searches = {method: Search(method, split, seed, steps) for method in METHODS}
    for _ in range(trials):
        searches["inside"].run_trial()
        for search in searches.values():
            while search.spent < searches["inside"].spent:
                search.run_trial()
    return searches


def run(seeds: list[int], trials: int, steps: int) -> Results:
    """Searches in all four ways for each seed."""
    keys = ("trials", "seconds", "best trial", "retrained", "progress")
    results: Results = {method: {key: {} for key in keys} for method in METHODS}
    for seed in seeds:
        for method, search in search_all(load_data(seed), seed, trials, steps).items():
            search.retrain()
            spent, found = search.progress[-1]
            progress = [[round(seconds, 3), round(score, 4)] for seconds, score in search.progress]
            measured = (len(progress), round(spent, 2), found, search.retrained, progress)
            for key, value in zip(keys, measured, strict=True):
                results[method][key][str(seed)] = value
        scores = (f"{method} {results[method]['retrained'][str(seed)]:.3f}" for method in METHODS)
        print(f"seed {seed}", *scores, sep="   ", flush=True)
    return {"searches": results}


def summary(results: Results) -> dict[str, float]:
    """Returns mean test accuracies."""
    searches = results["searches"]
    return {f"{name}, {key}": mean(searches[name][key]) for name in METHODS for key in ("best trial", "retrained")}


def table(results: Results) -> str:
    """Returns test accuracies and the number of trials."""
    rows = []
    for name, meaning in METHODS.items():
        search = results["searches"][name]
        trials = f"{mean(search['trials']):.0f}" if search["trials"] else ""
        rows.append([meaning, trials, spread(search["best trial"]), spread(search["retrained"])])
    return markdown(["search", "trials", "test accuracy of the best trial", "retrained with what was found"], rows)


def draw(results: Results) -> Figure:
    """Returns how each search proceeds, and the accuracy of networks retrained with what was found."""
    searches = results["searches"]
    found = {name: mean(search["retrained"]) for name, search in searches.items()}
    others = max(accuracy for name, accuracy in found.items() if name != "inside")
    figure = page(
        5.2,
        f"Searches of the same training time, then retrained: hypergradients inside reach {number(found['inside'])},\n"
        f"the best search without them {number(others)}; 30 % of the training labels are wrong",
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1.0))
    above, below = parts
    panels = above.subplots(1, len(searches), sharex=True, sharey=True)
    final = below.subplots()
    name_rows(final, [METHODS[name] for name in searches])
    for place, (panel, (name, search)) in enumerate(zip(panels, searches.items(), strict=True)):
        role = OURS if name == "inside" else PLAIN
        seconds, accuracies = progress(list(search["progress"].values()))
        curve(panel, seconds, accuracies, role)
        panel.set_title(f"{fill(METHODS[name], 20)}\n({mean(search['trials']):.0f} trials)")
        dots(final, place, values(search["retrained"]), role)
    above.supxlabel("seconds of training; a line for the mean, a band for all seeds", fontsize="medium")
    panels[0].set_ylabel("test accuracy\nof the best trial so far")
    final.set_xlabel("test accuracy after retraining; a point for each seed, a bar for the mean")
    return figure


def progress(searches: Sequence[Sequence[Sequence[float]]]) -> tuple[list[float], Tensor]:
    """Returns step functions of time, from where all have begun: seconds, and values [searches, seconds].

    Args:
        searches: (seconds, value) of the steps of each.
    """
    begin = max(search[0][0] for search in searches)
    seconds = sorted({begin, *(step[0] for search in searches for step in search if step[0] >= begin)})
    return seconds, torch.tensor(
        [[[value for time, value in search if time <= second][-1] for second in seconds] for search in searches]
    )


def silence() -> None:
    """Hides the log of each trial, what Lightning prints, and warnings about trials that diverge."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start(ignore=["hyper step"])


def main(argv: list[str] | None = None) -> Figures:
    """Searches for each seed; returns what the last line says."""
    parser = make_parser(__doc__, seeds=[0])
    parser.add_argument("--trials", type=int, default=8, help="with hypergradients; the others get the same time")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training in each trial, at least {CHECK_EVERY}")
    args = parser.parse_args(argv)
    silence()
    return conclude(NAME, run(args.seeds, args.trials, args.steps), args, summary=summary, table=table, draw=draw)


if __name__ == "__main__":
    main()
