"""The methods against wrong labels, side by side on one problem."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from examples.experiments.problems.label_methods import (
    EVEN,
    Method,
    Outcome,
    left_out,
    meta_weight_net,
    one_hot,
    out_of_sample,
    posterior,
    train,
)
from examples.experiments.problems.label_noise import LEARN_STEPS, Data, Learned, learn

FINAL_STEPS = 600
CLEARLY = 0.1  # of a held-out loss, which has 100 examples
RIVALS = {
    "equal": "all labels, equal weights",
    "checked": "the checked examples alone",
    "margins": "lowest margins left out (AUM)",
    "confidence": "lowest confidence left out (cleanlab)",
    "gold": "gold loss correction",
    "reweight": "learning to reweight",
    "meta": "Meta-Weight-Net",
}
OURS = {
    "ours": "**the recipe: the better of both, with a tuned transition**",
    "forward": "the recipe, only trained through the transition",
    "relabelled": "the recipe, only trained on corrected targets",
    "no_step": "the recipe without weights one step ahead",
    "no_weights": "the recipe, transition tuned without weights",
    "no_hyper": "the recipe, nothing tuned: the transition as estimated",
}
BOUNDS = {"oracle": "oracle: wrong labels left out"}
ROWS = RIVALS | OURS | BOUNDS
RANKINGS = {  # of the labels, from the most suspicious one
    "margins": "mean margin of a plain run (AUM)",
    "confidence": "confidence out of sample (cleanlab)",
    "margins_checked": "mean margin, trained on the checked examples too",
    "gold": "posterior of gold loss correction",
    "ours": "**posterior of the recipe's networks**",
    "learned_weights": "the tuned weights",
}


class Comparison(NamedTuple):
    """Test accuracies by method, AUC with which wrong labels are found, and what the picture needs.

    Attributes:
        accuracy: By key of `ROWS`.
        auc: By key of `RANKINGS`.
        error: Mean absolute error of the learned transition, and of the one estimated from checked examples.
        learned: Weights and transition.
        label_score: Probability that each given label is right, by the networks of the recipe, [3000].
        outcomes: Finished runs by key of `ROWS`.
    """

    accuracy: dict[str, float]
    auc: dict[str, float]
    error: dict[str, float]
    learned: Learned
    label_score: Tensor
    outcomes: dict[str, Outcome]


class Recipe(NamedTuple):
    """Two ways to train with a transition.

    Attributes:
        forward: Trained on given labels, through the transition.
        relabelled: Trained on the posterior of the first network, with weights one step ahead.
        label_score: Probability that each given label is right, the mean of what both networks say, [3000].
    """

    forward: Outcome
    relabelled: Outcome
    label_score: Tensor

    @property
    def kept(self) -> Outcome:
        """The second one where its held-out loss is clearly lower, else the first one."""
        is_clear = self.relabelled.held_out_loss < (1.0 - CLEARLY) * self.forward.held_out_loss
        return self.relabelled if is_clear else self.forward


def train_forward(data: Data, transition: Tensor, seed: int, steps: int) -> Outcome:
    """Trains through a transition: forward correction."""
    return train(data, Method(one_hot(data.noisy[1]), transition=transition), seed, steps)


def relabel(data: Data, transition: Tensor, forward: Outcome, seed: int, steps: int, one_step: float = EVEN) -> Recipe:
    """Trains again, on what a network that was trained through the transition says of each label."""
    given = data.noisy[1]
    targets = posterior(forward.probabilities, transition, given)
    relabelled = train(data, Method(targets, confusion=transition, one_step=one_step), seed, steps)
    scores = [_of_given(posterior(run.probabilities, transition, given), given) for run in (forward, relabelled)]
    return Recipe(forward, relabelled, torch.stack(scores).mean(0))


def compare(
    data: Data,
    seed: int,
    *,
    rows: Any = ROWS,
    learn_steps: int = LEARN_STEPS,
    final_steps: int = FINAL_STEPS,
    **options: Any,
) -> Comparison:
    """Runs some methods on a problem; options are those of the Trainer of the tuned run."""
    given, targets = data.noisy[1], one_hot(data.noisy[1])
    plain = train(data, Method(targets), seed, learn_steps, checked=0.0)
    estimate = plain.confusion
    learned = learn(data, seed, learn_steps, transition=estimate, **options)
    assert learned.weights is not None
    forward = train_forward(data, learned.transition, seed, final_steps)
    recipe = relabel(data, learned.transition, forward, seed, final_steps)
    outcomes = {"ours": recipe.kept, "forward": recipe.forward, "relabelled": recipe.relabelled}
    scores = {"margins": plain.margins, "learned_weights": learned.weights, "ours": recipe.label_score}

    def add(name: str, method: Method) -> None:
        if name in rows:
            outcomes[name] = train(data, method, seed, final_steps)

    add("equal", Method(targets))
    if "checked" in rows:
        sure = data._replace(noisy=data.checked)
        outcomes["checked"] = train(sure, Method(one_hot(data.checked[1])), seed, final_steps, checked=0.0)
    if "margins" in rows:
        outcomes["margins"] = left_out(data, -plain.margins, seed, final_steps)
    if "confidence" in rows:
        scores["confidence"] = _of_given(out_of_sample(data, seed, learn_steps), given)
        outcomes["confidence"] = left_out(data, -scores["confidence"], seed, final_steps)
    if {"gold", "no_hyper"} & set(rows):
        outcomes["gold"] = train_forward(data, estimate, seed, final_steps)
    add("reweight", Method(targets, one_step=1.0))
    add("meta", Method(targets, network=meta_weight_net()))
    if "no_step" in rows:
        outcomes["no_step"] = relabel(data, learned.transition, forward, seed, final_steps, one_step=0.0).kept
    if "no_weights" in rows:
        transition = learn(data, seed, learn_steps, transition=estimate, weighted=False).transition
        alone = train_forward(data, transition, seed, final_steps)
        outcomes["no_weights"] = relabel(data, transition, alone, seed, final_steps).kept
    if "no_hyper" in rows:
        outcomes["no_hyper"] = relabel(data, estimate, outcomes["gold"], seed, final_steps).kept
    add("oracle", Method(targets, (~data.wrong).float()))
    if "gold" in outcomes:
        scores["gold"] = _of_given(posterior(outcomes["gold"].probabilities, estimate, given), given)
    if "equal" in outcomes:
        scores["margins_checked"] = outcomes["equal"].margins
    truth = data.true_transition()
    return Comparison(
        accuracy={name: outcomes[name].accuracy for name in ROWS if name in rows},
        auc={name: float(roc_auc_score(data.wrong, -scores[name])) for name in RANKINGS if name in scores},
        error={
            name: float((matrix - truth).abs().mean())
            for name, matrix in {"learned": learned.transition, "estimated": estimate}.items()
        },
        learned=learned,
        label_score=recipe.label_score,
        outcomes=outcomes,
    )


def _of_given(probabilities: Tensor, given: Tensor) -> Tensor:
    """Returns the probability of each given label, [3000]."""
    return probabilities.gather(1, given.unsqueeze(1)).squeeze(1)
