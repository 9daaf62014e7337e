"""A race of learning rates on two processes, which the Trainer starts by this script; see test_suggestion.py."""

import sys
from pathlib import Path

import torch

from lightning_ifthpo import ExactGeN
from tests.helpers.learning_rates import Plain
from tests.helpers.trainers import loader, quiet_trainer


def main(folder):
    found = {}
    for suggests in (True, False):
        torch.manual_seed(1)
        module = Plain(torch.optim.AdamW)
        trainer = quiet_trainer(max_epochs=4, accelerator="cpu", strategy="ddp", devices=2)
        data = loader(40, batch_size=4)
        if suggests:
            found["suggestion"] = repr(ExactGeN.suggest(trainer, module, data, steps=2))
        trainer.fit(module, data)
        found[f"weights, {suggests}"] = {name: value.clone() for name, value in module.state_dict().items()}
    torch.save(found, Path(folder) / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
