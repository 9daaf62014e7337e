"""Whole runs of networks that fill a GPU: what tuning adds to their time and to their memory.

    python -m tests.benchmarks.large --json docs/benchmarks/large.json    # four minutes of a large GPU
    python -m tests.benchmarks.large --device cpu --models small          # to see that it works

Each run trains through the Trainer. Its time is that of all batches but the first ten, over that of a run without the
callback; the runs without it stand before and behind the others. Memory is the most that tensors held on the device.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from torchvision.models import resnet50

from examples.experiments.watching import watched
from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import IndexedDataset
from lightning_ifthpo.solvers import SAMA, Identity
from tests.benchmarks.cases import EXAMPLES, MODELS, Classifier, SentenceClassifier, Workload

WARM = 10
"""Batches at the start that are not counted."""
BATCHES = 40
"""Batches that are counted."""
WORKLOADS = {
    "BERT-sized, 109 M weights, 32 × 128 tokens": Workload(
        partial(SentenceClassifier, width=768, depth=12), batch=32, shape=(128,), vocabulary=30_522
    ),
    "ResNet-50, 64 images of 224 × 224": Workload(partial(resnet50, num_classes=10), batch=64, shape=(3, 224, 224)),
    "small, the transformer of the other tables": MODELS["transformer"],
}
SOLVERS: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "Identity": lambda: Identity(step_size=1e-3),
    "SAMA": SAMA,
}


class Timer(L.Callback):
    """Measures the seconds and the memory of the batches that are counted."""

    seconds = memory = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        """Starts the clock once the run is warm."""
        if index == WARM:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
            self.memory = torch.cuda.max_memory_allocated() / 2**30
        self.seconds += time.perf_counter()


def run(workload: Workload, precision: Any, device: str, callback: L.Callback | None = None) -> Timer:
    """Trains, with a callback or without one."""
    gc.collect()
    torch.manual_seed(0)
    timer = Timer()
    trainer = L.Trainer(
        accelerator="gpu" if device.startswith("cuda") else "cpu",
        devices=1,
        precision=precision,
        max_steps=WARM + BATCHES,
        callbacks=[timer, *([] if callback is None else [callback])],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    data = IndexedDataset(workload.data(EXAMPLES, 3))
    loader = DataLoader(data, workload.batch, shuffle=True, num_workers=2)  # so that the GPU waits for no images
    trainer.fit(Classifier(workload, "AdamW"), loader)
    return timer


def figures(workload: Workload, precision: str, device: str) -> dict[str, Any]:
    """Returns milliseconds and GiB of a plain run, and the ratios of each solver's runs to it."""
    outer = DataLoader(workload.data(EXAMPLES, 4), workload.batch, num_workers=2)
    plain = [run(workload, precision, device)]
    tuned = {
        f"{name}, every {every}": run(
            workload,
            precision,
            device,
            IFTHypergradient(every, solver=SOLVERS[name](), outer_dataloader=outer, on_failure="use"),
        )
        for name, every in watched(list(product(SOLVERS, (5, 10))), "solvers")
    }
    plain.append(run(workload, precision, device))
    seconds = statistics.mean(timer.seconds for timer in plain)
    return {
        "ms": 1e3 * seconds / BATCHES,
        "plain runs differ by": abs(plain[1].seconds / plain[0].seconds - 1.0),
        "GiB": plain[0].memory,
        "time": {name: timer.seconds / seconds for name, timer in tuned.items()},
        "memory": {name: timer.memory / plain[0].memory if plain[0].memory else 0.0 for name, timer in tuned.items()},
    }


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.large", description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--models", nargs="+", default=["BERT", "ResNet"], help="words that their names begin with")
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--json", type=Path, help="a file to keep the figures in")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    on_gpu = args.device.startswith("cuda")
    about = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__}
    kept: dict[str, Any] = {"about": {**about, "lightning": L.__version__}, "large": {}}
    for name, workload in WORKLOADS.items():
        if name.startswith(tuple(args.models)):
            for precision in args.precisions:
                found = figures(workload, precision, args.device)
                kept["large"][f"{name}, {precision}"] = found
                print(f"{name}, {precision}: {json.dumps(found, indent=1)}", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
