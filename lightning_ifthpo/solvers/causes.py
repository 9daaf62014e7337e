"""Every diagnosis, as data: why a hypergradient is missing or wrong, and what to do."""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import Enum
from typing import NamedTuple


class Remedy(NamedTuple):
    """An advice, with the settings under which it is given.

    Attributes:
        advice: What to do, with names of numbers in braces.
        unless: Settings that already are what it advises; one of them is enough to leave it out.
        only: Settings that it is for; one of them is enough. Empty stands for all.
    """

    advice: str
    unless: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def applies(self, settings: Collection[str]) -> bool:
        """Whether to give this advice under these settings."""
        return not set(self.unless) & set(settings) and (not self.only or bool(set(self.only) & set(settings)))


# curvatures that are positive semi-definite, where the loss is convex in the outputs
_SEMI_DEFINITE = ("gauss_newton", "kfac", "gradient_outer_product")


class Cause(Enum):
    """Why a hypergradient is missing or wrong.

    `describe` fills in numbers. Settings, by which remedies are chosen, are the names of the curvature, of the class of
    the solver and of the dtype, and "fit" inside a Trainer.
    """

    STEP_TOO_LONG = (
        "the step is too long ({step})",
        "a series with a step η converges only for curvatures below 2/η",
        Remedy("use step_size='auto'", only=("Neumann",), unless=("auto",)),
        Remedy("lower the learning rate of training", only=("optimizer",)),
        Remedy("use a step of at most {best}"),
    )
    NEGATIVE_CURVATURE = (
        "negative curvature ({spectrum}){damped}",
        "the weights are not at a minimum of the inner loss",
        Remedy("use Gauss–Newton curvature (mark the outputs)", unless=_SEMI_DEFINITE),
        Remedy("make the loss convex in the outputs", only=_SEMI_DEFINITE),
        Remedy("use a damping above {damping}"),
        Remedy("use few Neumann terms with the inner learning rate as step size", unless=("Neumann", "Amortized")),
        Remedy("train further"),
    )
    SINGULAR = (
        "singular and inconsistent ({spectrum})",
        "the matrix has a null space, and {share} of the right-hand side lies in it, so that no solution exists",
        Remedy("use damping, such as {damping}"),
        Remedy("use MinimumResidual(), which ends at the least-squares solution", unless=("MinimumResidual",)),
        Remedy("use MinimumResidual(rtol=None), which takes the least-squares solution", only=("MinimumResidual",)),
    )
    ILL_CONDITIONED = (
        "ill conditioned, not yet converged (relative residual {residual} after {products} products{spectrum})",
        "the solver needs more iterations",
        Remedy("allow more iterations{iterations}", unless=("Neumann", "Amortized", "Identity")),
        Remedy("use more terms", only=("Neumann",)),
        Remedy("raise the damping, which bounds the condition number"),
    )
    ROUNDING = (
        "rounding floor of {dtype} (relative residual {residual}, of which rounding leaves about {floor})",
        "more iterations do not lower it",
        Remedy("use float64", unless=("float64",)),
        Remedy("use exact products, curvature='hessian' or 'gauss_newton'", only=("finite_difference",)),
        Remedy("use an rtol above {residual}"),
        Remedy("raise the damping, which bounds the condition number"),
    )
    NOT_THE_SAME_MAP = (
        "not the same map twice (two equal products differ by {difference} of their length)",
        "the inner loss draws other random numbers, or reads a state that it changes, at each evaluation",
        Remedy("make the loss a function of weights and batch alone"),
    )
    NOT_SYMMETRIC = (
        "the matrix is not symmetric (uᵀAv and vᵀAu differ by {difference} of their size)",
        "a derivative in the inner loss is wrong, as that of a custom autograd.Function, a hook or a detached factor",
        Remedy("mend the derivative"),
        Remedy("use curvature='finite_difference'", unless=("finite_difference",)),
    )
    NOT_FINITE = (
        "NaN or infinity in {where}",
        "no number can be computed from it",
        Remedy("{advice}"),
    )
    OVERFLOW = (
        "NaN or infinity arose in the solve, from finite losses and derivatives",
        "its numbers overflow {dtype}",
        Remedy("keep the safeguard of the series", only=("Neumann",)),
        Remedy("use a solver that converges, such as ConjugateGradient", only=("Neumann",)),
        Remedy("look at the scale of the losses, of the damping and of the learning rate"),
    )
    ZERO_RIGHT_HAND_SIDE = (
        "zero right-hand side: the outer loss does not depend on the weights",
        "its gradient with respect to them is exactly zero, and so is every effect of the hyperparameters through them",
        Remedy("compute the outer loss from the weights that are trained, without .detach() or torch.no_grad()"),
    )
    NOT_AT_MINIMUM = (
        "the weights are not at a minimum of this inner loss ({numbers})",
        "the implicit function theorem holds only where the gradient is zero",
        Remedy("train the weights on this loss, batch and hyperparameters until the gradient is small"),
        Remedy("use damping='horizon' or Amortized() for weights that are still trained", unless=("Amortized",)),
    )
    NOT_ITS_GRADIENT = (
        "the inner loss does not change with {what} as its derivative says",
        "a part that depends on them is detached, or a backward pass is not the derivative, and hypergradients take "
        "that part for constant",
        Remedy("make the loss one whose derivative torch knows"),
        Remedy("trust the result only if that part does not matter"),
    )
    NO_INFLUENCE = (
        "{name} does not influence the gradient of the inner loss, nor the outer loss",
        "implicit differentiation cannot tune it",
        Remedy("use it in the inner loss, as a tensor and without .detach(), .item() or float()"),
        Remedy("for a learning rate, use ExactGeN or a sweep"),
    )
    UNKNOWN_WEIGHTS = (
        "the inner loss does not know {name}",
        "they have no curvature, so that the right-hand side along them is out of reach",
        Remedy("pass the weights that the inner loss uses"),
        Remedy("use damping", only=("undamped",)),
    )

    def __init__(self, title: str, meaning: str, *remedies: Remedy) -> None:
        self.title = title
        self.meaning = meaning
        self.remedies = remedies

    @property
    def words(self) -> str:
        """The words by which a diagnosis can be recognized: the longest part of its title without a number."""
        return max(re.split(r"{\w+}|[()]", self.title), key=len).strip()

    def describe(self, settings: Collection[str] = (), **numbers: object) -> str:
        """Returns the diagnosis in words: what, the numbers that show it, what it means and what to do."""
        advice = [remedy.advice for remedy in self.remedies if remedy.applies(settings)]
        *first, last = advice
        listed = f"{', '.join(first)}, or {last}" if first else last
        listed = listed.format(**numbers)
        return f"{self.title}: {self.meaning}. ".format(**numbers) + listed[:1].upper() + listed[1:]
