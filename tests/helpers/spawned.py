"""A run on two processes that the Trainer starts itself; started by test_two_ranks.py."""

import sys

import torch
from torch.utils.data import DataLoader

from lightning_ifthpo import IFTHypergradient
from tests.helpers.trainers import OWN_METRICS, quiet_trainer
from tests.helpers.two_ranks import EVEN, Net, part


class Spawned(Net):
    """Takes its part of the data when its process knows its rank."""

    def train_dataloader(self):
        return DataLoader(part(1, EVEN, self.trainer.global_rank), batch_size=None)

    def outer_dataloader(self):
        return part(2, EVEN, self.trainer.global_rank)


def main(file):
    module = Spawned(lr=0.1)
    trainer = quiet_trainer(
        callbacks=[IFTHypergradient(2, on_failure="raise")],
        strategy="ddp_spawn",
        accelerator="cpu",  # which has room for two
        devices=2,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(module)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(OWN_METRICS)}
    torch.save({"state": module.state_dict(), "metrics": metrics}, file)


if __name__ == "__main__":
    main(sys.argv[1])
