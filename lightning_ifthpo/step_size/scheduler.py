"""GeN as a learning-rate scheduler of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_ifthpo.core.loss import LossValue
from lightning_ifthpo.core.validation import is_ascending, is_number, require_at_least, require_choice, require_flag
from lightning_ifthpo.curvature import AllReduce, LossCurvature
from lightning_ifthpo.step_size.linearity import check_linear_in_lr
from lightning_ifthpo.step_size.parabola import DirectionalModel, directional_model, three_point_model
from lightning_ifthpo.step_size.rules import AveragedRule, PublishedRule

DirectionalCurvature: TypeAlias = Literal["three_point"] | LossCurvature
DIRECTIONAL_CURVATURES: tuple[str, ...] = ("three_point", *get_args(LossCurvature))
_Change: TypeAlias = list[tuple[Tensor, Tensor]]  # parameters and a tensor for each


class _Rule(Protocol):
    lr: float | None
    refused: int

    @property
    def settled(self) -> bool: ...

    def observe(self, model: DirectionalModel) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


_RULES: dict[str, Callable[[float, float], _Rule]] = {"averaged": AveragedRule, "published": PublishedRule}


class ExactGeNLR(LRScheduler):
    """Chooses the learning rate from slope and curvature along the updates that the optimizer really makes.

    Now and then, and on every step until the rate has settled, the optimizer makes its step at a rate of one, so that
    its update ω with all its momentum, preconditioning, decay and clipping can be read off and be applied with the
    rate that is wanted; the state of the optimizer advances once. During such a step `param_groups[...]["lr"]` reads
    one, or what the groups' rates are to each other. `probe` then takes slope and curvature along ω. The
    initial rates of the groups count only in relation to each other.

    Call `probe` with the loss of each batch before `optimizer.step()`, and `step()` after it:

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
        optimizer: One whose update is linear in its learning rate; see `check_linear_in_lr`.
        total_steps: Optimizer steps of the whole run, which the final decay needs; None for no decay.
        every_n_steps: Optimizer steps between two probes once the rate has settled.
        rule: "averaged", see `AveragedRule`; "published", see `PublishedRule`.
        probe: "next_batch": slope and curvature on the batch after the one that made the update; "same_batch": on the
            same, which is safe for plain gradient descent only.
        curvature: Of the loss along the update: "three_point", from the losses at both ends of the step and one step
            beyond, by forward passes alone; "hessian", "gauss_newton" or "finite_difference", see `directional_model`.
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.
        final_decay: Fraction of the run, at its end, over which the rate goes to zero linearly, without further probes.
        per_group: Choose a rate for each parameter group, from the loss along its own part of the update while the
            other groups make theirs; the initial rates then do not count at all. As many looks as groups.

    Cost of a probe: as `three_point_model` or `directional_model`, and a copy of the weights.

    Attributes:
        looks: Number of looks so far.
        models: What the last look saw: one parabola, or one for each group; empty before the first.
        accepted: Whether it was of use.
        total_steps: As above; may be set as long as the decay has not begun.

    Raises:
        ValueError: If an argument is out of range, or the optimizer's update is not linear in its rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int | None = None,
        every_n_steps: int = 8,
        rule: Literal["averaged", "published"] = "averaged",
        probe: Literal["next_batch", "same_batch"] = "next_batch",
        curvature: DirectionalCurvature = "three_point",
        lr_min: float = 1e-8,
        lr_max: float = 10.0,
        final_decay: float = 0.3,
        per_group: bool = False,
    ) -> None:
        check_options(
            every_n_steps=every_n_steps,
            rule=rule,
            probe=probe,
            curvature=curvature,
            lr_min=lr_min,
            lr_max=lr_max,
            final_decay=final_decay,
            per_group=per_group,
        )
        if total_steps is not None:
            require_at_least("total_steps", total_steps, 1)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected a torch optimizer, got {optimizer!r}")
        check_linear_in_lr(optimizer)
        # a warm-up that is being replaced has already set the rates themselves to zero
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        highest = max(rates)
        self._multipliers = [1.0 if per_group or not highest else rate / highest for rate in rates]
        self._make_rule = partial(_RULES[rule], lr_min, lr_max)
        self._per_group = per_group
        self._rules = [self._make_rule() for _ in (rates if per_group else [highest])]
        self.total_steps = total_steps
        self._every = every_n_steps
        self._on_same_batch = probe == "same_batch"
        self._curvature = curvature
        self._final_decay = final_decay
        self._loss: Callable[[], LossValue] | None = None
        self._context: Callable[[], AbstractContextManager[object]] = nullcontext
        self._all_reduce: AllReduce | None = None
        self._before: _Change | None = None
        self._update: _Change | None = None
        self._applied = [0.0] * len(self._rules)
        self.looks = 0
        self.models: list[DirectionalModel] = []
        self.accepted = True
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        super().__init__(optimizer)

    @property
    def refused(self) -> int:
        """Probes that could not be used."""
        return sum(rule.refused for rule in self._rules)

    @property
    def pending(self) -> bool:
        """Whether there is an update to look along, and the next `probe` will."""
        return self._update is not None

    @property
    def wants_loss(self) -> bool:
        """Whether `probe` is of any use at this moment; calling it at any other does no harm."""
        return self.pending or self._on_same_batch or not self._has_rates

    def probe(
        self,
        loss: Callable[[], LossValue],
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        *,
        all_reduce: AllReduce | None = None,
    ) -> None:
        """Takes the loss of the batch at hand, and looks along the last update where there is one to look along.

        Args:
            loss: Callable without arguments that returns the scalar loss.
            context: Makes a context manager in which the loss is evaluated and differentiated. Use it to undo what an
                evaluation changes beside the weights: running statistics of BatchNorm, random numbers, metrics.
            all_reduce: Sums over processes that have a share of the loss each, and all take the same steps; None where
                there is one process.
        """
        self._adopt_new_groups()
        self._loss, self._context, self._all_reduce = loss, context, all_reduce
        if self._update is not None:
            update, self._update = self._update, None
            self._look(update, self._applied)
            self._set_rates(self.get_lr())

    def step(self, epoch: int | None = None) -> None:
        """Counts an optimizer step, also one that a loss scaler has skipped, and sets the rates of the next."""
        self._adopt_new_groups()
        self.last_epoch += 1
        self._last_lr = self.get_lr()
        self._set_rates(self._last_lr)

    def get_lr(self) -> list[float | Tensor]:
        """Returns the rate of each group."""
        rates = self._rates()
        return [rates[self._rule_of(index)] * multiplier for index, multiplier in enumerate(self._multipliers)]

    def state_dict(self) -> dict[str, Any]:
        """Returns all that changes, as tensors and plain numbers."""
        return {
            "last_epoch": self.last_epoch,
            "multipliers": self._multipliers,
            "rules": [{"name": type(rule).__name__} | rule.state_dict() for rule in self._rules],
            "update": None if self._update is None else [moved for _, moved in self._update],
            "applied": self._applied,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: If it is that of another scheduler, or of other options.
        """
        names = [rule.get("name") for rule in state_dict.get("rules", [])]
        if names != [type(rule).__name__ for rule in self._rules]:
            raise ValueError(
                f"the checkpoint holds the state of {names or 'another scheduler'}, and this ExactGeN has the rules "
                f"{[type(rule).__name__ for rule in self._rules]}; resume with the options of the run that wrote it"
            )
        self.last_epoch = state_dict["last_epoch"]
        self._multipliers = state_dict["multipliers"]
        for rule, state in zip(self._rules, state_dict["rules"], strict=True):
            rule.load_state_dict(state)
        update = state_dict["update"]
        if update is not None:
            pairs = zip(self._trainable(), update, strict=True)
            self._update = [(parameter, moved.to(parameter.device)) for parameter, moved in pairs]
        self._applied = state_dict["applied"]
        self._set_rates(self.get_lr())

    def detach(self) -> None:
        """Leaves the optimizer alone from now on, at the present rate, and forgets losses and data."""
        for hook in self._hooks:
            hook.remove()
        self._set_rates(self.get_lr())
        self._loss, self._context, self._update = None, nullcontext, None

    @property
    def _has_rates(self) -> bool:
        return any(rule.lr is not None for rule in self._rules)

    def _rates(self) -> list[float]:
        """Returns what each rule wants of the step that comes, after decay."""
        return [(rule.lr or 0.0) * self._decay() for rule in self._rules]

    def _rule_of(self, group: int) -> int:
        """Returns which rule a parameter group follows."""
        return group if self._per_group else 0

    def _adopt_new_groups(self) -> None:
        """Takes over groups that were added during training, in the relation of their rate to the highest of now."""
        new = self.optimizer.param_groups[len(self._multipliers) :]
        if not new:
            return
        present = max(float(rate) for rate in self.get_lr())
        for group in new:
            self._multipliers.append(1.0 if self._per_group or not present else float(group["lr"]) / present)
            if self._per_group:
                self._rules.append(self._make_rule())
                self._applied.append(0.0)

    def _decay(self) -> float:
        """Returns the factor of the final decay; one before it."""
        if not self.total_steps or not self._final_decay:
            return 1.0
        left = (self.total_steps - self.last_epoch) / (self._final_decay * self.total_steps)
        return min(1.0, max(left, 0.0))

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._adopt_new_groups()
        due = self.last_epoch % self._every == 0 or not all(rule.settled for rule in self._rules)
        # the decay is not to be undone, nor is there anything to gain from looking on
        if not self._has_rates or (due and self._decay() == 1.0):
            self._before = [(parameter, parameter.detach().clone()) for parameter in self._trainable()]
            self._set_rates(self._multipliers)
        else:
            self._before = None
            self._set_rates(self.get_lr())  # whatever an interrupted step has left behind

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._before is None:
            return
        update, self._before = self._before, None
        for parameter, value in update:
            moved = value - parameter
            parameter.copy_(value)
            value.copy_(moved)
        if self._on_same_batch or not self._has_rates:
            if self._loss is None:
                raise RuntimeError("ExactGeNLR needs a loss to look at: call probe(loss) before optimizer.step()")
            self._look(update, [0.0] * len(self._rules))
        self._applied = self._rates()
        for part, rate in zip(self._parts(update), self._applied, strict=True):
            for parameter, moved in part:
                parameter.sub_(moved, alpha=rate)
        self._update = None if self._on_same_batch else update
        self._set_rates(self.get_lr())

    def _look(self, update: _Change, applied: list[float]) -> None:
        """Shows each rule the loss along its update, as seen from where it began, `applied` times the update ago."""
        self.looks += 1
        self.models, used = [], []
        for part, rate, rule in zip(self._parts(update), applied, self._rules, strict=True):
            model = DirectionalModel(0.0, 0.0, 0.0)
            if part:
                with torch.enable_grad(), self._context():
                    model = self._model([parameter for parameter, _ in part], [moved for _, moved in part], rate)
            self.models.append(model.at(-rate))
            used.append(rule.observe(self.models[-1]))
        self.accepted = any(used)

    def _model(self, parameters: list[Tensor], direction: list[Tensor], step: float) -> DirectionalModel:
        assert self._loss is not None
        if self._curvature == "three_point":
            return three_point_model(self._loss, parameters, direction, step=step, all_reduce=self._all_reduce)
        return directional_model(
            self._loss, parameters, direction, curvature=self._curvature, all_reduce=self._all_reduce
        )

    def _trainable(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [tensor for group in groups for tensor in group["params"] if tensor.requires_grad]

    def _parts(self, change: _Change) -> list[_Change]:
        """Returns what of a change belongs to each rule."""
        parts: list[_Change] = [[] for _ in self._rules]
        groups = enumerate(self.optimizer.param_groups)
        rules = {id(tensor): self._rule_of(index) for index, group in groups for tensor in group["params"]}
        for parameter, value in change:
            parts[rules[id(parameter)]].append((parameter, value))
        return parts

    def _set_rates(self, rates: Sequence[float | Tensor]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def check_options(
    *,
    every_n_steps: int,
    rule: str,
    probe: str,
    curvature: str,
    lr_min: float,
    lr_max: float,
    final_decay: float,
    per_group: bool,
) -> None:
    """Raises ValueError if an option is out of range."""
    require_at_least("every_n_batches", every_n_steps, 1)
    require_choice("rule", rule, tuple(_RULES))
    require_choice("probe", probe, ("next_batch", "same_batch"))
    require_choice("curvature", curvature, DIRECTIONAL_CURVATURES)
    if not (is_ascending(0.0, lr_min, math.inf) and is_ascending(0.0, lr_max, math.inf) and lr_min <= lr_max):
        raise ValueError(f"expected 0 < lr_min <= lr_max < infinity, got {lr_min!r} and {lr_max!r}")
    if not (is_number(final_decay) and 0.0 <= final_decay <= 1.0):
        raise ValueError(f"expected 0 <= final_decay <= 1, a fraction of the run, got {final_decay!r}")
    require_flag("per_group", per_group)
    if per_group and probe == "same_batch":
        raise ValueError(
            "per_group=True needs probe='next_batch': where a step began, groups do not see yet what the others will do"
        )
