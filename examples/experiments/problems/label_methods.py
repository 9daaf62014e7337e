"""What can be done about wrong labels: one training loop, in which all methods differ by their targets and weights.

All train the same network at the end, for the same number of steps, on the same examples: noisy ones and checked ones,
of which each counts four times in the loss, because their labels are right. Some make other runs before, to rank or to
correct labels. Training stops where the loss on 100 held-out checked examples is lowest. A method with a choice left,
as how many labels to leave out, makes it by that loss too. Test labels decide nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from examples.experiments.common import Examples
from examples.experiments.problems.label_noise import (
    BATCH_SIZE,
    CHECKED,
    CLASSES,
    LEARNING_RATE,
    NOISY,
    Data,
    check,
    make_net,
)
from lightning_ifthpo import label_margins

LOOK_EVERY, LOOKS = 20, 8  # steps between predictions for all examples, and how many of the last are averaged
CHECKED_WEIGHT = 4.0  # of a checked example, relative to a noisy one
CHECKED_BATCH = round(BATCH_SIZE * CHECKED / NOISY)  # checked examples in each step: as often as the noisy ones
OUTER_BATCH = 100  # checked examples by which weights are chosen one step ahead
LEFT_OUT = (0.2, 0.4, 0.6)  # fractions of the labels
FOLDS = 3
KEEP, CORRECT_AFTER = 0.3, 100  # of a target at each correction; steps before the first one
EVEN = 0.5  # share of the weight that all examples have, besides what they get one step ahead


class Method(NamedTuple):
    """How the noisy examples are trained on.

    Attributes:
        targets: Distributions over classes, [N, 10].
        weights: [N]; None for ones.
        transition: The loss is that of the given label, T p(x) (forward correction); None for that of p(x).
        confusion: Targets become T[c, y] p(c|x), scaled to sum to one, as the network learns; None for fixed targets.
        one_step: Share of the weight that goes to examples whose gradient agrees with that of checked examples.
        network: Gives weights from losses, and learns to, one step ahead. The gradient on checked examples is taken
            before that step, not after it as in Shu et al. (2019).
    """

    targets: Tensor
    weights: Tensor | None = None
    transition: Tensor | None = None
    confusion: Tensor | None = None
    one_step: float = 0.0
    network: nn.Module | None = None


class Outcome(NamedTuple):
    """A finished run; the least of several is the one with the lowest held-out loss.

    Attributes:
        held_out_loss: Where training was stopped.
        step: Where that was.
        accuracy: On test examples, there.
        curve: Test accuracy at each look.
        probabilities: Of classes, for the noisy examples, mean of the last looks, [N, 10].
        margins: Of the given labels, mean of all looks, [N].
        confusion: Mean probabilities for the checked examples of each class at the end, [10, 10].
    """

    held_out_loss: float
    step: int
    accuracy: float
    curve: list[float]
    probabilities: Tensor
    margins: Tensor
    confusion: Tensor


def one_hot(labels: Tensor) -> Tensor:
    """Returns targets [N, 10] of labels [N]."""
    return F.one_hot(labels, CLASSES).float()


def train(data: Data, method: Method, seed: int, steps: int, *, checked: float = CHECKED_WEIGHT) -> Outcome:
    """Trains a fresh network; `checked` is the weight of the checked examples, 0 to leave them out."""
    torch.manual_seed(seed)
    (inputs, given), (sure, labels) = data.noisy, data.checked
    net, generator = make_net(inputs), torch.Generator().manual_seed(seed + 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    noisy, right = _order(len(given), BATCH_SIZE, steps, generator), _order(len(labels), OUTER_BATCH, steps, generator)
    targets, sure_targets = method.targets.clone(), one_hot(labels)
    meta = None if method.network is None else torch.optim.Adam(method.network.parameters(), lr=1e-3)
    checks, looks = [], []
    for step, (index, outer) in enumerate(zip(noisy, right, strict=True), 1):
        weights = torch.ones(len(index)) if method.weights is None else method.weights[index]
        if meta is not None or method.one_step:
            agreement, losses = _agreement(net, inputs[index], targets[index], sure[outer], sure_targets[outer])
            if method.network is not None and meta is not None:
                weights = _meta_weights(method.network, meta, losses, agreement)
            else:
                ahead = agreement.clamp_min(0.0)
                ahead *= len(index) / ahead.sum().clamp_min(1e-12)  # all may disagree: no weight then
                weights = weights * (1.0 - method.one_step + method.one_step * ahead)
        part = outer[: CHECKED_BATCH if checked else 0]
        logits = net(torch.cat([inputs[index], sure[part]]))
        probabilities = logits.softmax(1)
        noisy_logs = logits[: len(index)].log_softmax(1)
        if method.transition is not None:
            noisy_logs = (probabilities[: len(index)] @ method.transition).log()
        loss = -(weights * (targets[index] * noisy_logs).sum(1)).sum()
        loss = loss - checked * (sure_targets[part] * logits[len(index) :].log_softmax(1)).sum()
        optimizer.zero_grad()
        (loss / (len(index) + len(part))).backward()
        optimizer.step()
        if method.confusion is not None and step > CORRECT_AFTER:
            corrected = posterior(probabilities[: len(index)].detach(), method.confusion, given[index])
            targets[index] = KEEP * targets[index] + (1.0 - KEEP) * corrected
        if step % LOOK_EVERY == 0:
            checks.append(check(net, data))
            looks.append(net(inputs).detach())
    best = min(range(len(checks)), key=lambda look: checks[look][0])
    return Outcome(
        held_out_loss=checks[best][0],
        step=LOOK_EVERY * (best + 1),
        accuracy=checks[best][1],
        curve=[accuracy for _, accuracy in checks],
        probabilities=torch.stack(looks[-LOOKS:]).softmax(-1).mean(0),
        margins=torch.stack([label_margins(logits, given) for logits in looks]).mean(0),
        confusion=_confusion(net, data.checked),
    )


def posterior(probabilities: Tensor, transition: Tensor, given: Tensor) -> Tensor:
    """Returns the probability of each class, given the example x, its label y and the transition: ∝ p(c|x) T[c, y]."""
    joint = probabilities * transition.T[given]
    return joint / joint.sum(1, keepdim=True)


def left_out(data: Data, suspicion: Tensor, seed: int, steps: int) -> Outcome:
    """Trains without the most suspicious labels; how many is chosen by the held-out loss."""
    order, outcomes = suspicion.argsort(descending=True), []
    for fraction in LEFT_OUT:
        weights = torch.ones(NOISY).index_fill(0, order[: int(fraction * NOISY)], 0.0)
        outcomes.append(train(data, Method(one_hot(data.noisy[1]), weights), seed, steps))
    return min(outcomes, key=lambda outcome: outcome.held_out_loss)


def out_of_sample(data: Data, seed: int, steps: int) -> Tensor:
    """Returns for each noisy example the probabilities of classes by a network that was not trained on it."""
    order = torch.randperm(NOISY, generator=torch.Generator().manual_seed(seed))
    probabilities = torch.empty(NOISY, CLASSES)
    for fold in range(FOLDS):
        weights = torch.ones(NOISY).index_fill(0, order[fold::FOLDS], 0.0)
        outcome = train(data, Method(one_hot(data.noisy[1]), weights), seed, steps, checked=0.0)
        probabilities[order[fold::FOLDS]] = outcome.probabilities[order[fold::FOLDS]]
    return probabilities


def meta_weight_net() -> nn.Module:
    """Returns the network of Shu et al. (2019): a weight from the loss of an example."""
    return nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid(), nn.Flatten(0))


def _agreement(
    net: nn.Module, inputs: Tensor, targets: Tensor, sure: Tensor, sure_targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the inner product of each example's gradient with that of checked examples [B], and its loss [B].

    It is how fast the loss on checked examples falls by a step along the gradient of the example, times the rate.
    """
    loss = F.cross_entropy(net(sure), sure_targets)
    names, weights = zip(*net.named_parameters(), strict=True)
    tangents = torch.autograd.grad(loss, weights)

    def losses(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(net, parameters, (inputs,)), targets, reduction="none")

    primal = {name: weight.detach() for name, weight in zip(names, weights, strict=True)}
    outputs = jvp(losses, (primal,), (dict(zip(names, tangents, strict=True)),))
    return outputs[1], outputs[0]


def _meta_weights(network: nn.Module, meta: torch.optim.Optimizer, losses: Tensor, agreement: Tensor) -> Tensor:
    """Returns weights [B] of the network, after a step that lowers the loss on checked examples one step ahead."""
    ahead = -LEARNING_RATE * (agreement * network(losses.unsqueeze(1))).mean()
    meta.zero_grad()
    ahead.backward()
    meta.step()
    weights: Tensor = network(losses.unsqueeze(1)).detach()
    return weights


@torch.no_grad()
def _confusion(net: nn.Module, examples: Examples) -> Tensor:
    """Returns the mean prediction for the examples of each class, [10, 10]; rows sum to one."""
    inputs, labels = examples
    probabilities = net(inputs).softmax(1)
    return torch.stack([probabilities[labels == label].mean(0) for label in range(CLASSES)])


def _order(examples: int, batch: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Returns the indices of each batch: whole epochs, each in an order of its own."""
    epochs = steps * batch // examples + 1
    order = torch.cat([torch.randperm(examples, generator=generator) for _ in range(epochs)])
    return list(torch.split(order[: steps * batch], batch))
