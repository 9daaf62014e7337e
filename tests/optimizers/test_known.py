"""The table of known optimizers."""

import pytest
import torch

from lightning_ifthpo.optimizers import StabilityEdge, UpdateRule, has_edge, is_known

KNOWN = ["SGD", "RMSprop", "Adam", "AdamW", "NAdam", "Adagrad"]


@pytest.mark.parametrize("name", KNOWN)
def test_an_own_subclass_is_read_like_its_base(name):
    base = getattr(torch.optim, name)
    own = type("Own", (base,), {})
    found = []
    for kind in (base, own):
        weight = torch.ones(3, requires_grad=True)
        optimizer = kind([weight], lr=0.1, weight_decay=0.2)
        for gradient in (1.0, 0.5):
            weight.grad = torch.tensor([1.0, -2.0, 4.0]) * gradient
            optimizer.step()
        assert is_known(optimizer)
        assert has_edge(optimizer)
        rule, edge = UpdateRule.of([optimizer], [weight]), StabilityEdge.of(optimizer, [weight])
        found.append([torch.as_tensor(part) for part in (rule.step_size, rule.decay, edge.sharpness, edge.decay)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_group_at_rest_has_no_decay_in_half_precision_either():
    """In float16, 1e-30 is 0, and the decay of AdamW was once lr · d₀ / max(step, 1e-30) = 0 / 0."""
    moving, resting = (torch.ones(2, dtype=torch.float16, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [moving]}, {"params": [resting], "lr": 0.0}], lr=0.01, eps=1e-4)
    moving.grad = resting.grad = torch.ones(2, dtype=torch.float16)
    optimizer.step()
    rule = UpdateRule.of([optimizer], [moving, resting])
    # the step is the learning rate over |g| = 1, and so d = d₀, up to the rounding of float16
    assert rule.decay.tolist() == pytest.approx([0.01, 0.01, 0.0, 0.0], rel=2e-3)


def test_a_number_for_a_step_of_zero_has_no_decay_either():
    weight = torch.ones(2, requires_grad=True)
    assert UpdateRule.of([torch.optim.AdamW([weight], lr=0.0)], [weight]).decay == 0.0
