"""GeN as a learning-rate scheduler of PyTorch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from lightning_ifthpo.core.consistency import follows_its_gradient
from lightning_ifthpo.core.loss import Loss, LossFunction, NoLossError
from lightning_ifthpo.core.random_state import isolated
from lightning_ifthpo.core.validation import require_at_least, require_choice
from lightning_ifthpo.step_size.linearity import check_linear_in_lr
from lightning_ifthpo.step_size.options import DIRECTIONAL_CURVATURES, RULES, DirectionalCurvature, RateOptions
from lightning_ifthpo.step_size.parabola import Parabola, exact_parabola, three_point_parabola
from lightning_ifthpo.step_size.rates import GroupRates
from lightning_ifthpo.step_size.update import Update, trainable_weights
from lightning_ifthpo.step_size.watch import GradientWatch

_NOT_ITS_GRADIENT = (
    "the loss does not change along its gradient as the gradient says, as where a part of it is detached; ExactGeN "
    "measures by differences of gradients instead of losses. Pass curvature='finite_difference' to choose that"
)

_FIRST_MOVE = 1e-3  # of the length of the weights, by the first step
_CLIMBING = 0.3, 64  # fraction of the run in which the rate climbs, and looks in it


class ExactGeNLR(LRScheduler):
    """Chooses the learning rate from slope and curvature along the updates that the optimizer really makes.

    While the rate climbs, some 64 times in all, and at every n-th step after that, the optimizer makes its step at
    learning rate one (times the ratios of the groups). The scheduler reads off the update ω and applies it again at the
    chosen rate; the optimizer's state advances once. A look then measures slope and curvature of the loss along ω. Call
    `probe` with the loss of each batch before `optimizer.step()`, and `step()` after it:

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> scheduler = ExactGeNLR(optimizer, total_steps=200)
    >>> for _ in range(200):
    ...     loss = lambda: (weight**2 * torch.tensor([1.0, 5.0])).sum()
    ...     scheduler.probe(loss)
    ...     optimizer.zero_grad()
    ...     _ = loss().backward()
    ...     _ = optimizer.step()
    ...     scheduler.step()
    >>> bool(weight.norm() < 1e-3)
    True

    Args:
        optimizer: Its update must be linear in its learning rate; see `check_linear_in_lr`. The initial rates of its
            groups count only in relation to each other.
        total_steps: Optimizer steps of the whole run, for the final decay; None for no decay. May be set later.
        every_n_steps: Optimizer steps between two looks once the rate has settled, at least 1. Where gradients grow
            step after step, and where the rate has been lowered, looks come at every step.
        rule: "averaged", see `AveragedRule`; "published", see `PublishedRule`.
        probe: "next_batch" looks on the batch after the one that made the update; "same_batch" on the same batch, which
            is safe for plain gradient descent only.
        curvature: "three_point" fits a parabola to the losses at both ends of the step and one step beyond, by forward
            passes alone. Once, at the first look, the slope of the loss is compared with a gradient; where they differ,
            looks are made by "finite_difference". For "hessian", "gauss_newton" and "finite_difference" see
            `exact_parabola`.
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.
        final_decay: Fraction of the run, at its end, over which the rate goes to zero linearly. Looks can only lower it
            there.
        per_group: Choose a rate for each parameter group, from the loss along its own part of the update, with the
            updates of the other groups applied. The initial rates then do not count at all. One look for each group.

    Cost of a look: see `three_point_parabola` and `exact_parabola`; and a copy of the weights.

    Attributes:
        rules: The rule that chooses the rate, or one for each parameter group.
        looks: Number of looks so far.
        parabolas: The result of the last look: one parabola, or one for each group; empty before the first look.
        accepted: Whether the last look was used.

    Raises:
        ValueError: If an argument is out of range, or the optimizer's update is not linear in its rate.
        TypeError: If `optimizer` is no torch optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int | None = None,
        every_n_steps: int = 64,
        rule: Literal["averaged", "published"] = "averaged",
        probe: Literal["next_batch", "same_batch"] = "next_batch",
        curvature: DirectionalCurvature = "three_point",
        lr_min: float = 1e-8,
        lr_max: float = 1e3,
        final_decay: float = 0.6,
        per_group: bool = False,
    ) -> None:
        require_at_least("every_n_steps", every_n_steps, 1)
        require_choice("curvature", curvature, DIRECTIONAL_CURVATURES)
        self._options = RateOptions(rule, probe, lr_min, lr_max, final_decay, per_group)
        if total_steps is not None:
            require_at_least("total_steps", total_steps, 1)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected a torch optimizer, got {optimizer!r}")
        check_linear_in_lr(optimizer)
        self._rates = GroupRates(optimizer, partial(RULES[rule], lr_min, lr_max), per_group)
        self.rules = self._rates.rules
        self._watch = GradientWatch()
        self._last_look = 0  # step number
        self.total_steps = total_steps
        self.every_n_steps = every_n_steps
        self._curvature = curvature
        self._follows_gradient: bool | None = None  # the loss; None until the first look by three points
        self._loss: LossFunction | Loss | None = None
        self._session: Callable[[], AbstractContextManager[object]] = nullcontext
        self._before: tuple[list[Tensor], list[Tensor]] | None = None  # the weights, and copies of them
        self._update: Update | None = None
        self.looks = 0
        self.parabolas: list[Parabola] = []
        self.accepted = True
        self._pre_hook = optimizer.register_step_pre_hook(self._before_step)
        self._post_hook = optimizer.register_step_post_hook(self._after_step)
        super().__init__(optimizer)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None if they are unknown."""
        return self._rates.total_steps

    @total_steps.setter
    def total_steps(self, total_steps: int | None) -> None:
        self._rates.total_steps = total_steps

    @property
    def refused(self) -> int:
        """Number of parabolas that could not be used."""
        return sum(rule.refused for rule in self.rules)

    @property
    def shortened(self) -> int:
        """Number of steps that were partly taken back, because they had raised the loss by much."""
        return self._rates.shortened

    @property
    def applied(self) -> list[float]:
        """The rate at which each rule's part of the last update that was looked at has been applied."""
        return self._rates.applied

    @property
    def curvature(self) -> DirectionalCurvature:
        """The curvature of the next look: the chosen one, or "finite_difference" for a loss unlike its gradient."""
        return "finite_difference" if self._follows_gradient is False else self._curvature

    @curvature.setter
    def curvature(self, curvature: DirectionalCurvature) -> None:
        self._curvature = curvature

    @property
    def is_pending(self) -> bool:
        """Whether the next `probe` looks along an update."""
        return self._update is not None

    @property
    def wants_loss(self) -> bool:
        """Whether `probe` has an effect at present; at other times the call can be left out."""
        return self.is_pending or self._options.probe == "same_batch" or not self._rates.started

    def probe(
        self,
        loss: LossFunction | Loss,
        session: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Keeps the loss of the present batch, looks along the last update if there is one, and restores random states.

        Args:
            loss: Callable without arguments that returns the scalar loss; a `Loss` where each process has a share.
            session: Makes a context manager inside which the loss is evaluated and differentiated. Use it to undo side
                effects of an evaluation, such as new running statistics of BatchNorm.
        """
        self._rates.include_new_groups(self._decay())
        _move(self._pre_hook, last=True)
        self._loss, self._session = loss, session
        if self._update is not None:
            update, self._update = self._update, None
            if self._look(update, self._rates.applied):
                self._rates.correct(update)
            self._rates.write(self.get_lr())

    def step(self, epoch: int | None = None) -> None:
        """Counts an optimizer step, even if a loss scaler has skipped it, and sets the rates of the next step."""
        self._rates.include_new_groups(self._decay())
        _move(self._pre_hook, last=True)
        self.last_epoch += 1
        self._last_lr = self.get_lr()
        self._rates.write(self._last_lr)

    def get_lr(self) -> list[float | Tensor]:
        """Returns the rate of each group."""
        return self._rates.of_groups(self._decay())

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as tensors and plain numbers."""
        return self._rates.state_dict() | {
            "last_epoch": self.last_epoch,
            "last_look": self._last_look,
            "watch": self._watch.state_dict(),
            "follows_gradient": self._follows_gradient,
            "parabolas": [astuple(parabola) for parabola in self.parabolas],
            "update": None if self._update is None else self._update.omega,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a state; raises ValueError if it belongs to another scheduler, or to other options."""
        self._rates.load_state_dict(state_dict)
        self.last_epoch = state_dict["last_epoch"]
        self._last_look = state_dict["last_look"]
        self._watch.load_state_dict(state_dict["watch"])
        self._follows_gradient = state_dict["follows_gradient"]
        self.parabolas = [Parabola(*parabola) for parabola in state_dict["parabolas"]]
        if state_dict["update"] is not None:
            weights = trainable_weights(self.optimizer)
            omegas = zip(state_dict["update"], weights, strict=True)
            self._update = Update(weights, [omega.to(weight.device) for omega, weight in omegas])
        self._rates.write(self.get_lr())

    def detach(self) -> None:
        """Removes the hooks from the optimizer, which keeps its present rates, and releases the loss and its data."""
        self._pre_hook.remove()
        self._post_hook.remove()
        self._rates.write(self.get_lr())
        self._loss, self._session, self._update = None, nullcontext, None

    def _decay(self) -> float:
        """Returns the factor of the final decay; one before the decay."""
        if not self.total_steps or not self._options.final_decay:
            return 1.0
        left = (self.total_steps - self.last_epoch) / (self._options.final_decay * self.total_steps)
        return min(1.0, max(left, 0.0))

    def _is_due(self) -> bool:
        """Returns whether to look along the next step."""
        if not self._rates.started:
            return True
        decay, rules = self._decay(), self._rates.choosing
        if self._watch.is_alarmed or any(rule.watchful for rule in rules):
            return decay > 0.0
        is_climbing = decay == 1.0 and not all(rule.settled for rule in rules)
        interval = self._climbing_interval() if is_climbing else self.every_n_steps
        return decay > 0.0 and self.last_epoch % interval == 0

    def _climbing_interval(self) -> int:
        """Returns the number of steps between two looks before the rate is settled."""
        fraction, looks = _CLIMBING
        return min(max(1, math.ceil(fraction * (self.total_steps or 0) / looks)), self.every_n_steps)

    def _before_step(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> Any:
        """Prepares a look if one is due: after the closure, which may read the rates, if there is one."""
        self._rates.include_new_groups(self._decay())
        self._rates.write(self.get_lr())  # an interrupted step may have left other rates
        self._before = None
        _move(self._post_hook, last=False)  # hooks of the user see the weights and the rates after the whole step
        if not self._is_due():
            return None
        closure = keywords.get("closure", arguments[1] if len(arguments) > 1 else None)
        if closure is None:
            return self._prepare()
        changed = {"closure": partial(self._prepare, closure)}
        return arguments[:1], {key: value for key, value in keywords.items() if key != "closure"} | changed

    def _prepare(self, closure: Callable[[], Any] | None = None) -> Any:
        """Calls the closure, notes the weights and sets the rates to one times the ratios of the groups."""
        loss = None if closure is None else closure()
        weights = trainable_weights(self.optimizer)
        self._before = weights, [weight.detach().clone() for weight in weights]
        self._rates.write(self._rates.multipliers)
        return loss

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        _move(self._pre_hook, last=True)  # hooks of the user see the true rates before the step
        self._watch.observe([weight.grad for weight in trainable_weights(self.optimizer) if weight.grad is not None])
        if self._before is None:
            return
        update, self._before = Update.undo_step(*self._before), None
        on_same_batch = self._options.probe == "same_batch"
        if on_same_batch or not self._rates.started:
            self._look(update, [0.0] * len(self.rules))
        self._rates.apply(update, self._decay())
        self._update = None if on_same_batch else update
        self._rates.write(self.get_lr())

    def _look(self, update: Update, applied: list[float]) -> bool:
        """Measures the loss along each rule's part of an update, applied at these rates, and passes it to the rule.

        Returns whether there was a loss.
        """
        if self._loss is None:
            raise RuntimeError("ExactGeNLR needs a loss to look at: call probe(loss) before optimizer.step()")
        parts = self._rates.parts(update)
        last = self.parabolas if len(self.parabolas) == len(parts) else [None] * len(parts)
        looks = zip(parts, applied, last, strict=True)
        try:
            parabolas = [self._parabola(self._loss, *look) for look in looks]
        except NoLossError:  # training skips this batch, and the look is left out
            return False
        self.looks += 1
        self.parabolas = parabolas
        decay, steps, started = self._decay(), max(1, self.last_epoch - self._last_look), self._rates.started
        self._last_look = self.last_epoch
        used = [
            rule.observe(
                parabola,
                decay=decay,
                steps=steps,
                first_rate=math.inf if started else part.rate_of_move(_FIRST_MOVE),
            )
            for rule, parabola, part in zip(self.rules, parabolas, parts, strict=True)
        ]
        self.accepted = any(used)
        return True

    def _parabola(self, loss: LossFunction | Loss, update: Update, applied: float, last: Parabola | None) -> Parabola:
        """Returns the parabola of the loss along an update; its origin is at the weights before the update."""
        if not update.parameters:
            return Parabola(0.0, 0.0, 0.0)
        along = loss.over(update.parameters) if isinstance(loss, Loss) else Loss(loss, update.parameters)
        with isolated(along.space.device), torch.enable_grad(), self._session():
            if self.curvature == "three_point" and self._follows_gradient is None:
                self._follows_gradient = follows_its_gradient(along)
                if not self._follows_gradient:
                    warnings.warn(_NOT_ITS_GRADIENT, stacklevel=2)
            if self.curvature == "three_point":
                parabola = three_point_parabola(along, update.parameters, update.omega, step=applied, last=last)
            else:
                parabola = exact_parabola(
                    along, update.parameters, update.omega, curvature=self.curvature, step=applied
                )
            return parabola.at(-applied)


def _move(handle: RemovableHandle, *, last: bool) -> None:
    """Moves a hook of an optimizer behind all others, or before them."""
    hooks = handle.hooks_dict_ref()
    if hooks is not None and handle.id in hooks:
        hooks.move_to_end(handle.id, last=last)
