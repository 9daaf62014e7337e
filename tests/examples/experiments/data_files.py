"""Small files in the formats of MNIST and CIFAR, so that reading them is tested without a download."""

import pickle
import struct

import numpy as np
import pytest
from torchvision.datasets import CIFAR10


def write_mnist(root, generator):
    """Idx files: magic number, sizes, bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def write_cifar(root, generator, name):
    """Pickled batches, as the python version of CIFAR has them."""
    ten = name == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    classes, key = (10, "labels") if ten else (100, "fine_labels")
    train = [f"data_batch_{number}" for number in range(1, 6)] if ten else ["train"]
    for file, count in [(file, 4 * classes) for file in train] + [("test_batch" if ten else "test", classes)]:
        pixels = generator.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        batch = {"data": pixels, key: [index % classes for index in range(count)]}
        (folder / file).write_bytes(pickle.dumps(batch))
    meta = {"label_names" if ten else "fine_label_names": [str(label) for label in range(classes)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta))


def accept_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images do not have the checksums of the real ones."""
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
