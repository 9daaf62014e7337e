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
from examples.experiments.problems.label_noise import LEARN_STEPS, NOISY, Data, Learned, learn

FINAL_STEPS = 600
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
    "ours": "**the recipe: transition and weights tuned, corrected targets**",
    "no_step": "the recipe without weights one step ahead",
    "weights": "the recipe, only weights tuned",
    "transition": "the recipe, only the transition tuned",
    "no_hyper": "the recipe, nothing tuned: the transition as estimated",
}
BOUNDS = {"oracle": "oracle: wrong labels left out"}
ROWS = RIVALS | OURS | BOUNDS
RANKINGS = {  # of the labels, from the most suspicious one
    "margins": "mean margin of a plain run (AUM)",
    "confidence": "confidence out of sample (cleanlab)",
    "margins_checked": "mean margin, trained on the checked examples too",
    "gold": "posterior of gold loss correction",
    "ours": "**posterior of the recipe's network**",
    "learned_weights": "the tuned weights",
}


class Comparison(NamedTuple):
    """Test accuracies by method, AUC with which wrong labels are found, and what the picture needs.

    Attributes:
        accuracy: By key of `ROWS`.
        auc: By key of `RANKINGS`.
        error: Mean absolute error of the learned transition, and of the one estimated from checked examples.
        learned: Weights and transition.
        label_score: Probability that each given label is right, by the network of the recipe, [3000].
        outcomes: Finished runs by key of `ROWS`.
    """

    accuracy: dict[str, float]
    auc: dict[str, float]
    error: dict[str, float]
    learned: Learned
    label_score: Tensor
    outcomes: dict[str, Outcome]


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
    both = learn(data, seed, learn_steps, weighted=True, transition=estimate, **options)
    assert both.transition is not None
    assert both.weights is not None
    final = train(data, _corrected(data, both.probabilities, both.transition), seed, final_steps)
    outcomes = {"ours": final}
    scores = {"margins": plain.margins, "learned_weights": both.weights}

    def add(name: str, method: Method, **changes: Any) -> None:
        if name in rows:
            outcomes[name] = train(data, method, seed, final_steps, **changes)

    add("equal", Method(targets))
    if "checked" in rows:
        alone = data._replace(noisy=data.checked)
        outcomes["checked"] = train(alone, Method(one_hot(data.checked[1])), seed, final_steps, checked=0.0)
    if "margins" in rows:
        outcomes["margins"] = left_out(data, -plain.margins, seed, final_steps)
    if "confidence" in rows:
        scores["confidence"] = _of_given(out_of_sample(data, seed, learn_steps), given)
        outcomes["confidence"] = left_out(data, -scores["confidence"], seed, final_steps)
    add("gold", Method(targets, transition=estimate))
    add("reweight", Method(targets, one_step=1.0))
    add("meta", Method(targets, network=meta_weight_net()))
    add("no_step", _corrected(data, both.probabilities, both.transition)._replace(one_step=0.0))
    for name, weighted, transition in (("weights", True, None), ("transition", False, estimate)):
        if name in rows:
            some = learn(data, seed, learn_steps, weighted=weighted, transition=transition)
            matrix = estimate if some.transition is None else some.transition
            add(name, _corrected(data, some.probabilities, matrix))
    if "no_hyper" in rows:
        gold = train(data, Method(targets, transition=estimate), seed, learn_steps, checked=0.0)
        add("no_hyper", _corrected(data, gold.probabilities, estimate))
    add("oracle", Method(targets, (~data.wrong).float()))
    scores["ours"] = _of_given(posterior(final.probabilities, both.transition, given), given)
    if "gold" in outcomes:
        scores["gold"] = _of_given(posterior(outcomes["gold"].probabilities, estimate, given), given)
    if "equal" in outcomes:
        scores["margins_checked"] = outcomes["equal"].margins
    truth = data.true_transition()
    return Comparison(
        accuracy={name: outcomes[name].accuracy for name in ROWS if name in outcomes},
        auc={name: float(roc_auc_score(data.wrong, -scores[name])) for name in RANKINGS if name in scores},
        error={
            name: float((matrix - truth).abs().mean())
            for name, matrix in {"learned": both.transition, "estimated": estimate}.items()
        },
        learned=both,
        label_score=scores["ours"],
        outcomes=outcomes,
    )


def _corrected(data: Data, probabilities: Tensor, transition: Tensor) -> Method:
    """Returns the training on probabilities of each class, given the example, its label and the transition."""
    targets = posterior(probabilities, transition, data.noisy[1])
    return Method(targets, confusion=transition, one_step=EVEN)


def _of_given(probabilities: Tensor, given: Tensor) -> Tensor:
    """Returns the probability of each given label, [3000]."""
    return probabilities[torch.arange(NOISY), given]
