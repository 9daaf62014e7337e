"""What is written in a configuration reaches the callbacks, the solver and the hyper-optimizer."""

import sys

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from examples import cli as example
from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.solvers import ConjugateGradient


@pytest.fixture(autouse=True)
def _no_other_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cli.py"])


QUIET = [f"--trainer.enable_{option}=false" for option in ("progress_bar", "model_summary", "checkpointing")]
SHORT = ["--trainer.max_epochs", "1", "--trainer.logger=false", *QUIET]


def configured(name, *arguments):
    """What LightningCLI makes of a file."""
    arguments = ["--config", str(example.CONFIGS / f"{name}.yaml"), *SHORT, *arguments]
    return LightningCLI(
        example.Digits,
        example.DigitsData,
        run=False,
        seed_everything_default=0,
        save_config_callback=None,
        args=arguments,
    )


def callback_of(cli, kind):
    (found,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, kind))
    return found


def test_solver_and_hyper_optimizer():
    cli = configured("tune", "--trainer.callbacks.every_n_batches", "7")
    callback = callback_of(cli, IFTHypergradient)
    assert callback.every_n_batches == 7
    assert callback.curvature == "gauss_newton"
    assert callback.solver == ConjugateGradient(5, damping="horizon")
    optimizer = cli.model.configure_hyper_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_all_three_callbacks():
    cli = configured("everything")
    assert callback_of(cli, IFTHypergradient).max_overhead == 1.0
    assert callback_of(cli, SharpnessMonitor).every_n_batches == 50
    assert callback_of(cli, ExactGeN).curvature == "auto"


def test_a_wrong_name_is_told(capsys):
    with pytest.raises(SystemExit):
        configured("tune", "--trainer.callbacks.every_n_steps", "7")
    assert "every_n_steps" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in example.CONFIGS.glob("*.yaml")))
def test_every_configuration_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = example.main(["--config", str(example.CONFIGS / f"{name}.yaml"), "--trainer.max_epochs", "10", *QUIET])
    assert result["test accuracy"]["measured"] > 0.6
