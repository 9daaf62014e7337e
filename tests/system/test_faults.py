"""What is left when a run ends in an unusual way: nothing but its checkpoints, from which it goes on."""

import multiprocessing
import os
import random
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.nn.modules import module as torch_module

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.solvers import Direct
from tests.helpers import killed
from tests.helpers.features import Simple
from tests.helpers.trainers import quiet_trainer, same

pytestmark = pytest.mark.slow

KILLS = 20


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.killed"])
    return context


def lived(processes, *arguments):
    process = processes.Process(target=killed.live, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(processes, tmp_path, record_property):
    """Each run is killed once: a run of Lightning alone, resumed twice across an epoch, miscounts its epochs."""
    whole = tmp_path / "whole"
    assert lived(processes, whole) == 0
    wanted = torch.load(killed.newest(whole), weights_only=False, map_location="cpu")
    assert wanted["global_step"] == killed.EPOCHS * killed.BATCHES
    moments = random.Random(0)
    while_saving = 0
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        folder.mkdir()
        death = ("saving" if kill % 2 else "training", moments.random(), moments.randint(2, wanted["global_step"]))
        assert lived(processes, folder, death) == -signal.SIGKILL
        while_saving += (folder / "death.txt").read_text() == "saving"
        assert lived(processes, folder) == 0
        got = torch.load(killed.newest(folder), weights_only=False, map_location="cpu")
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert same(got[key], wanted[key]), (key, death)
        for name, state in wanted["callbacks"].items():
            assert name.startswith("Checkpoints") or same(got["callbacks"][name], state), (name, death)
    record_property("kills", KILLS)
    record_property("kills while a checkpoint was being written", while_saving)
    assert while_saving >= 5


class UserError(Exception):
    pass


LEFT: dict[int, int] = {}


class Countdown:
    """Raises at the n-th call; it counts in a global variable, out of reach of what callbacks put back."""

    def __init__(self, calls, error=UserError):
        self.error = error
        LEFT[id(self)] = calls

    @property
    def calls(self):
        return LEFT[id(self)]

    @calls.setter
    def calls(self, calls):
        LEFT[id(self)] = calls

    def __call__(self):
        LEFT[id(self)] -= 1
        if LEFT[id(self)] == 0:
            raise self.error


class Failing(Simple):
    """Fails in the n-th evaluation of its losses, whoever asks for it."""

    def __init__(self, countdown, **options):
        super().__init__(**options)
        self.countdown = countdown

    def inner_loss(self, batch):
        loss = super().inner_loss(batch)
        self.countdown()
        return loss

    def outer_loss(self, batch):
        loss = super().outer_loss(batch)
        self.countdown()
        return loss


class Witness(Callback):
    """Notes what must not be changed, before and after each turn of the callbacks around which it stands."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = seen(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen = seen(trainer, pl_module)


def seen(trainer, module):
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "learning rates": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "modes": [submodule.training for submodule in module.modules()],
        "flags": [parameter.requires_grad for parameter in module.parameters()],
    }


def left_behind(trainer, module):
    """Returns all hooks and replaced methods that are still there."""
    module_hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [name for name in ("log", "log_dict") if name in vars(module)]
    found += [name for submodule in module.modules() for name in module_hooks if vars(submodule)[name]]
    found += [name for name in ("_global_forward_hooks", "_global_forward_pre_hooks") if vars(torch_module)[name]]
    for optimizer in trainer.optimizers:
        found += [name for name, value in vars(optimizer).items() if name.startswith("_optimizer_step_") and value]
    found += ["loggers"] if trainer.loggers else []
    return found


OBSERVED = {
    **{
        f"IFTHypergradient, {curvature}": lambda curvature=curvature: IFTHypergradient(2, curvature=curvature)
        for curvature in ("hessian", "gauss_newton", "finite_difference")
    },
    "IFTHypergradient, kfac": lambda: IFTHypergradient(2, curvature="kfac", solver=Direct(damping=0.1)),
    **{
        f"SharpnessMonitor, {curvature}": lambda curvature=curvature: SharpnessMonitor(
            2, curvature=curvature, max_iterations=3, max_overhead=None
        )
        for curvature in ("hessian", "finite_difference")
    },
    **{
        f"ExactGeN, {curvature}": lambda curvature=curvature: ExactGeN(2, curvature=curvature)
        for curvature in ("three_point", "hessian", "finite_difference")
    },
}


def fit(callbacks, countdown, **options):
    """Returns what a run ends with, and what it raised."""
    torch.manual_seed(0)
    module, witness = Failing(countdown), Witness()
    trainer = quiet_trainer(
        **{"limit_val_batches": 0} | options, callbacks=[witness, *callbacks, witness], max_epochs=2
    )
    try:
        trainer.fit(module)
    except BaseException as error:
        return trainer, module, witness, error
    return trainer, module, witness, None


@pytest.mark.filterwarnings("ignore:SharpnessMonitor. a measurement failed")
@pytest.mark.parametrize("name", OBSERVED)
def test_an_error_in_a_loss_leaves_everything_as_it_was(name):
    """Whichever evaluation it is: one of training, or one of the callback."""
    countdown = Countdown(10**6)
    trainer, module, _, error = fit([OBSERVED[name]()], countdown)
    assert error is None
    assert left_behind(trainer, module) == []
    evaluations = 10**6 - countdown.calls
    assert evaluations > 8  # batches that are trained on
    for calls in range(1, evaluations + 1):
        trainer, module, witness, error = fit([OBSERVED[name]()], Countdown(calls))
        assert left_behind(trainer, module) == []
        is_report = isinstance(error, UserWarning) and "could not measure the outer loss at the end: UserError" in str(
            error
        )
        if not name.startswith("SharpnessMonitor"):  # which survives errors
            assert type(error) is UserError or is_report
            assert not is_report or calls > evaluations - 4  # training is over
        if error is not None:
            assert same(seen(trainer, module), witness.seen), calls


@pytest.mark.parametrize("name", OBSERVED)
def test_an_interruption_leaves_everything_as_it_was(name):
    for calls in (2, 4, 5, 7, 10):
        trainer, module, witness, error = fit([OBSERVED[name]()], Countdown(calls, KeyboardInterrupt))
        assert isinstance(error, (KeyboardInterrupt, SystemExit))
        assert left_behind(trainer, module) == []
        assert same(seen(trainer, module), witness.seen), calls


class Terminated(Callback):
    """Gets the signal by which clusters end a job."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", OBSERVED)
def test_a_signal_to_terminate_leaves_everything_as_it_was(name):
    before = signal.getsignal(signal.SIGTERM)
    trainer, module, _, error = fit([OBSERVED[name](), Terminated()], Countdown(10**6))
    assert isinstance(error, SIGTERMException)
    assert left_behind(trainer, module) == []
    assert trainer.global_step == 4  # the batch during which the signal came is finished
    assert signal.getsignal(signal.SIGTERM) == before


class Hungry(Simple):
    """Asks for more memory than there is, but not in the first evaluation of the outer loss, which is a rehearsal."""

    def __init__(self, countdown):
        super().__init__()
        self.countdown = countdown

    def outer_loss(self, batch):
        self.countdown()
        return super().outer_loss(batch)


class Exhaustion(Countdown):
    def __call__(self):
        self.calls -= 1
        if self.calls < 0:
            torch.empty(10**15)


@pytest.mark.filterwarnings("ignore:IFTHypergradient could not measure the outer loss at the end")
@pytest.mark.parametrize("policy", ["skip", "use"])
def test_a_hyper_step_without_memory_is_skipped_and_told(policy):
    countdown = Exhaustion(10**6)
    quiet_trainer(callbacks=[IFTHypergradient(1)], limit_val_batches=0, max_steps=1).fit(Hungry(countdown))
    needed = 10**6 - countdown.calls - 1  # without the evaluation for the summary
    module, callback = Hungry(Exhaustion(needed)), IFTHypergradient(1, on_failure=policy)
    start = [value.clone() for value in module.hyperparameters()]
    trainer = quiet_trainer(callbacks=[callback, witness := Witness()], limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"hyper step 2 ran out of memory \(.*allocate.*\).*It is skipped") as told:
        trainer.fit(module)
    assert len([warning for warning in told if "out of memory" in str(warning.message)]) == 1
    assert trainer.global_step == 4
    assert callback.skipped == 3
    assert float(trainer.callback_metrics["hypergrad/skipped"]) == 3.0
    assert not same(list(module.hyperparameters()), start)  # the first step was made
    assert same(seen(trainer, module), witness.seen)
    assert left_behind(trainer, module) == []


def test_a_hyper_step_without_memory_is_an_error_where_failures_are():
    trainer = quiet_trainer(callbacks=[IFTHypergradient(1, on_failure="raise")], limit_val_batches=0)
    with pytest.raises(RuntimeError, match="allocate"):
        trainer.fit(Hungry(Exhaustion(3)))
