"""Killed at any batch and resumed equals uninterrupted, bit for bit."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.solvers import ConjugateGradient, Identity
from tests.helpers.trainers import Deterministic, quiet_trainer

BATCHES = 12  # three epochs of four


class KilledError(Exception):
    """Stands for the end of the process."""


class Kill(Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.after:
            raise KilledError


def run(folder, callback, *, kill_after=None, resume=None):
    torch.manual_seed(3)
    module = Deterministic()
    # last, so that the checkpoint of a batch knows the hyper step after it
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [callback, checkpoint, *([Kill(kill_after)] if kill_after else [])]
    trainer = quiet_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, ckpt_path=resume)
    return module, trainer


def everything(module, trainer, callback):
    state = {f"weights/{k}": v for k, v in module.state_dict().items() if "accuracy" not in k}
    hyper = callback.state_dict()["stepper"]
    state |= {
        f"hyper/{i}/{k}": torch.as_tensor(v) for i, s in hyper["optimizer"]["state"].items() for k, v in s.items()
    }
    state |= {"x0": hyper["x0"]} if hyper["x0"] is not None else {}
    state |= {k: torch.tensor(hyper[k]) for k in ("steps", "seed", "consumed")}
    return {name: value.cpu() for name, value in state.items()}  # what has just been loaded is there, too


COLD = ConjugateGradient(3, damping=1.0)
CALLBACKS = {
    "amortized": lambda: IFTHypergradient(2),
    "cold": lambda: IFTHypergradient(3, solver=COLD, warm_start=False, start_after_batches=2),
    "finite differences": lambda: IFTHypergradient(1, curvature="finite_difference", solver=Identity(step_size=0.02)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", CALLBACKS)
def test_killed_at_any_batch_and_resumed_equals_uninterrupted(name, tmp_path):
    whole = CALLBACKS[name]()
    wanted = everything(*run(tmp_path / "whole", whole), whole)
    assert wanted["steps"] >= 3
    for batch in range(1, BATCHES):
        folder = tmp_path / str(batch)
        with pytest.raises(KilledError):
            run(folder, CALLBACKS[name](), kill_after=batch)
        again = CALLBACKS[name]()
        got = everything(*run(folder, again, resume=folder / f"step={batch}.ckpt"), again)
        different = [key for key in wanted if not torch.equal(got[key], wanted[key])]
        assert not different, f"killed at batch {batch}: {different}"


def test_state_loads_with_weights_only_and_holds_plain_values(tmp_path):
    callback = IFTHypergradient(2)
    _, trainer = run(tmp_path, callback)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state["stepper"]["steps"] == 6
    assert state["stepper"]["consumed"] == 6
    assert state["skipped"] == 0


def test_a_checkpoint_can_be_validated(tmp_path):
    _, trainer = run(tmp_path, IFTHypergradient(2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = IFTHypergradient(2)
    trainer = quiet_trainer(
        callbacks=[callback, ModelCheckpoint(tmp_path, every_n_train_steps=1)], enable_checkpointing=True
    )
    trainer.validate(Deterministic(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert callback.state_dict()["stepper"]["steps"] == 6
