"""What a learned augmentation costs beside a ResNet-18 and images of 32 × 32 pixels, in units of a plain iteration.

In one run, stretches of plain iterations take turns with stretches of augmented ones, which end with a hyper step, so
that whatever else the machine does slows all of them alike; what counts is processor time. Weights and images are
random: they cost the same.

Two sums are reported for a hyper step every n iterations: the mean iteration while the augmentation is tuned, which
Lorraine, Vicol, Duvenaud (2019) put at 3, and that of a whole run as in `learned_augmentation.py`, which tunes for the
first 60 % and keeps the augmentation, for which they have 2.

Run:
    python examples/augmentation_cost.py                 # three minutes on two cores
    python examples/augmentation_cost.py --batch-size 16 --rounds 10
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import lightning as L
import torch
import torchvision  # type: ignore[import-untyped]
from distill_dataset import silence_lightning
from learned_augmentation import START, TUNED, Classifier, RandomDistortion, loader
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import AugmentationNetwork

STRETCH = 2  # iterations of the same kind
AUGMENTATIONS: dict[str, Callable[[], nn.Module]] = {
    "U-Net": lambda: AugmentationNetwork(3),
    "distribution": lambda: RandomDistortion(START),
}
# A hyper step every n iterations: cost of an iteration and of a run, on one core, in batches of 64.
EXPECTED = {
    "U-Net": {5: (3.26, 2.36), 10: (2.13, 1.68), 15: (1.76, 1.46)},
    "distribution": {5: (3.23, 2.33), 10: (2.11, 1.66), 15: (1.74, 1.44)},
}


def resnet18() -> nn.Module:
    """Returns a ResNet-18 for small images: its first convolution keeps the resolution."""
    net: nn.Module = torchvision.models.resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


class Stopwatch(Callback):
    """Notes when batches start, and turns the augmentation on and off in turns of `STRETCH` batches."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes the time; in eval mode images stay as they are."""
        pl_module.augment.train(batch_idx // STRETCH % 2 == 0)
        self.starts.append(time.process_time())


def seconds(augment: nn.Module, rounds: int, batch_size: int) -> list[list[float]]:
    """Returns how long each iteration takes, in stretches: plain and augmented ones take turns, in this order."""
    torch.manual_seed(0)
    examples = torch.rand(4 * batch_size, 3, 32, 32), torch.randint(10, (4 * batch_size,))
    steps = STRETCH * (2 * rounds + 1) + 1  # the first stretch warms up, and the start of one more ends the last
    classifier = Classifier(resnet18(), augment, steps, hyper_rate=0.01, hyper_steps=rounds)
    hypergradient = IFTHypergradient(
        2 * STRETCH,
        start_after_batches=STRETCH,  # so that the hyper steps end the third stretch, the fifth, ...
        outer_dataloader=DataLoader(TensorDataset(*examples), batch_size),
        on_failure="use",
    )
    stopwatch = Stopwatch()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[stopwatch, hypergradient],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(classifier, loader(examples, batch_size, steps, seed=0))
    iterations = [end - start for start, end in itertools.pairwise(stopwatch.starts)]
    return [iterations[first : first + STRETCH] for first in range(STRETCH, len(iterations), STRETCH)]


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measures each augmentation; returns what the last line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--augmentations", nargs="+", choices=list(AUGMENTATIONS), default=list(AUGMENTATIONS))
    parser.add_argument("--rounds", type=int, default=3, help="hyper steps that are timed")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args(argv)
    silence_lightning()
    torch.set_num_threads(1)
    result = {}
    for name in options.augmentations:
        stretches = seconds(AUGMENTATIONS[name](), options.rounds, options.batch_size)
        plain = median(itertools.chain(*stretches[0::2]))
        augmented = median(itertools.chain(*(stretch[:-1] for stretch in stretches[1::2]))) / plain
        hyper = median(stretch[-1] for stretch in stretches[1::2]) / plain - augmented
        print(
            f"{name}: augmented iterations {augmented:.2f} of the {plain:.2f} s of plain ones, hyper steps {hyper:.2f}"
        )
        for every, expected in EXPECTED[name].items():
            ratios = augmented + hyper / every, augmented + TUNED * hyper / every
            for unit, ratio, wanted in zip(("iteration", "run"), ratios, expected, strict=True):
                print(
                    f"    a hyper step every {every:2} iterations: {unit:9} {ratio:.2f} (expected: {wanted})",
                    flush=True,
                )
                result[f"{name}, {unit}, every {every}"] = {"measured": round(ratio, 2), "expected": wanted}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
