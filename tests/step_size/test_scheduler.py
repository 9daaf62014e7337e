"""ExactGeNLR in plain loops."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_ifthpo.step_size import (
    ExactGeNLR,
    exact_parabola,
)
from tests.helpers.device import DEVICE, FLOAT64, randn
from tests.helpers.problems import quadratic, spd_matrix


def test_groups_keep_the_relation_of_their_rates():
    weights = [nn.Parameter(torch.ones(2, device=DEVICE)), nn.Parameter(torch.ones(2, device=DEVICE))]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 3e-5}, {"params": weights[1:], "lr": 1e-5}])
    scheduler = ExactGeNLR(optimizer)
    for _ in range(20):
        scheduler.probe(lambda: sum(weight.square().sum() for weight in weights))
        optimizer.zero_grad()
        sum(weight.square().sum() for weight in weights).backward()
        optimizer.step()
        scheduler.step()
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first == pytest.approx(3 * second)
    moved = [1 - weight.detach() for weight in weights]
    assert moved[0][0] > 2 * moved[1][0] > 0


def two_groups(per_group, curvature="three_point", steps=300):
    """Noisy targets; the second group is a hundred times as steep, and both act on each other."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.full((3,), 5.0, **FLOAT64)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1.0} for weight in weights])
    scheduler = ExactGeNLR(optimizer, per_group=per_group, curvature=curvature, final_decay=0.0)
    for _ in range(steps):
        targets = [0.1 * torch.randn(3, generator=generator).to(**FLOAT64) for _ in weights]

        def loss(targets=targets):
            first, second = (weight - target for weight, target in zip(weights, targets, strict=True))
            return (first.square().sum() + 100 * second.square().sum() + first @ second) / 2

        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
    return scheduler, [group["lr"] for group in optimizer.param_groups]


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["three_point", "hessian"])
def test_each_group_finds_its_own_rate(curvature):
    scheduler, (first, second) = two_groups(per_group=True, curvature=curvature)
    assert 0.2 < first < 2.0
    assert 0.003 < second < 0.02
    assert len(scheduler.parabolas) == 2
    _, (first, second) = two_groups(per_group=False, curvature=curvature)
    assert first == second < 0.02


def test_plain_gradient_descent_with_the_published_rule_is_exact_line_search():
    """Without smoothing; the Kantorovich bound on each step: a factor ((κ − 1) / (κ + 1))²."""
    matrix = spd_matrix(8, 20.0, dtype=torch.float64)
    weight = nn.Parameter(torch.ones(8, **FLOAT64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(
        optimizer,
        rule="published",
        probe="same_batch",
        curvature="hessian",
        every_n_steps=1,
        final_decay=0.0,
        lr_max=100.0,
    )
    scheduler.rules[0].smoothing = 0.0

    def loss():
        return weight @ matrix @ weight / 2

    for _ in range(30):
        before = loss().item()
        gradient = matrix @ weight.detach()
        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
        assert loss().item() <= before * (19 / 21) ** 2 * (1 + 1e-9)
        # an exact line search ends where the new gradient is orthogonal to the old
        assert abs(gradient @ matrix @ weight.detach()) < 1e-9 * gradient.norm() ** 2


def test_probing_on_the_next_batch_agrees_with_probing_at_the_start():
    """On a quadratic the slope where a step ends says what it was where the step began."""
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer)
    for _ in range(12):
        start = weight.detach().clone()
        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        gradient = weight.grad.clone()
        optimizer.step()
        scheduler.step()
    scheduler.probe(loss)
    with torch.no_grad():
        weight.copy_(start)
    expected = exact_parabola(loss, [weight], [gradient])
    assert scheduler.parabolas[0].slope == pytest.approx(expected.slope, rel=1e-9)
    assert scheduler.parabolas[0].curvature == pytest.approx(expected.curvature, rel=1e-9)


def loop(optimizer, scheduler, loss, steps):
    for _ in range(steps):
        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()


def test_the_relation_of_groups_survives_a_warm_up_that_is_replaced():
    weights = [nn.Parameter(torch.ones(2, device=DEVICE)), nn.Parameter(torch.ones(2, device=DEVICE))]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 3e-4}, {"params": weights[1:], "lr": 1e-4}])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    scheduler = ExactGeNLR(optimizer)
    loop(optimizer, scheduler, lambda: sum(weight.square().sum() for weight in weights), 5)
    first, second = scheduler.get_lr()
    assert first == pytest.approx(3 * second) != 0.0


def test_groups_that_come_later_are_taken_over():
    weights = [nn.Parameter(torch.full((2,), 3.0, device=DEVICE)), nn.Parameter(torch.full((2,), 3.0, device=DEVICE))]
    loss = lambda: sum(weight.square().sum() for weight in weights)  # noqa: E731
    for per_group in (False, True):
        optimizer = torch.optim.SGD(weights[:1], lr=1.0)
        scheduler = ExactGeNLR(optimizer, per_group=per_group)
        loop(optimizer, scheduler, loss, 10)
        optimizer.add_param_group({"params": weights[1:], "lr": float(scheduler.get_lr()[0]) / 4})
        loop(optimizer, scheduler, loss, 1)
        first, second = scheduler.get_lr()
        assert second == (0.0 if per_group else pytest.approx(first / 4))  # its own rule has seen nothing yet
        loop(optimizer, scheduler, loss, 10)
        assert all(rate > 0.0 for rate in scheduler.get_lr())
        assert len(scheduler.get_lr()) == 2


@pytest.mark.parametrize("what", ["no gradient", "frozen"])
def test_a_group_that_does_not_move_holds_up_no_other(what):
    weights = [
        nn.Parameter(torch.full((2,), 3.0, device=DEVICE)),
        nn.Parameter(torch.ones(2, device=DEVICE), requires_grad=what == "no gradient"),
    ]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0)
    scheduler = ExactGeNLR(optimizer, per_group=True)
    loop(optimizer, scheduler, lambda: weights[0].square().sum(), 30)
    assert scheduler.looks == 30  # once a step: the first on its own batch, the others on the next
    assert scheduler.get_lr()[0] > 0.0
    assert torch.equal(weights[1].detach(), torch.ones(2, device=DEVICE))


def test_a_group_that_does_not_move_asks_for_no_look_and_begins_when_it_is_trained():
    """Before, every step was looked at, because the rate of such a group had not settled."""
    looks = []
    for count in (1, 2):
        weights = [nn.Parameter(torch.full((2,), 3.0, device=DEVICE)) for _ in range(count)]
        optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0)
        scheduler = ExactGeNLR(optimizer, total_steps=600, per_group=True)
        loop(optimizer, scheduler, lambda weights=weights: weights[0].square().sum(), 300)
        looks.append(scheduler.looks)
    assert looks[0] == looks[1] < 100
    loop(optimizer, scheduler, lambda: sum(weight.square().sum() for weight in weights), 3)
    assert scheduler.get_lr()[1] > 0.0


def test_states_of_others_are_refused():
    def make(**options):
        return ExactGeNLR(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), **options)

    with pytest.raises(ValueError, match="state of another scheduler"):
        make().load_state_dict({"last_epoch": 3})
    with pytest.raises(ValueError, match=r"state of \['PublishedRule'\], .* rules \['AveragedRule'\]"):
        make().load_state_dict(make(rule="published").state_dict())


@pytest.mark.parametrize(
    ("curvature", "forward", "backward"),
    [("three_point", 3, 0), ("hessian", 1, 3), ("finite_difference", 3, 3), ("gauss_newton", 1, 0)],
)
def test_looks_take_the_passes_of_their_curvature(curvature, forward, backward):
    net = nn.Linear(3, 2).to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = ExactGeNLR(optimizer, curvature=curvature)
    calls = {"forward": 0, "backward": 0}

    def loss():
        calls["forward"] += 1
        features = net(torch.ones(4, 3, device=DEVICE))
        node = features.grad_fn
        node.register_hook(lambda _, after: calls.update(backward=calls["backward"] + (after[0] is not None)))
        outputs = 2 * features
        return outputs.square().mean(), outputs

    scheduler.probe(loss)
    loss()[0].backward()
    optimizer.step()
    scheduler.step()
    calls.update(forward=0, backward=0)
    scheduler.probe(loss)
    assert calls["forward"] == forward
    assert (calls["backward"] > 0) == (backward > 0)


def test_the_final_decay_ends_at_zero():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer, total_steps=100, final_decay=0.5)
    rates = []
    for _ in range(100):
        scheduler.probe(loss)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0] / scheduler.rules[0].lr)
    assert rates[48] == 1.0
    assert rates[74] == pytest.approx(0.5)
    assert rates[-1] == 0.0


@pytest.mark.parametrize(("per_group", "total"), [(False, 40), (True, 40), (False, 500)])
def test_the_scheduler_goes_on_from_its_state(tmp_path, per_group, total):
    """In a run of 500 steps each third one is looked at, so that some stops are between two looks."""
    matrix = spd_matrix(6, 20.0, dtype=torch.float32)

    def train(steps, resume=None):
        weights = [
            nn.Parameter(torch.linspace(-1, 1, 3, device=DEVICE)),
            nn.Parameter(torch.linspace(2, 1, 3, device=DEVICE)),
        ]
        optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0, momentum=0.9)
        scheduler = ExactGeNLR(optimizer, total_steps=total, per_group=per_group)

        def loss():
            return torch.cat(weights) @ matrix @ torch.cat(weights) / 2

        if resume is not None:
            state = torch.load(resume, weights_only=True)
            with torch.no_grad():
                for weight, value in zip(weights, state["weights"], strict=True):
                    weight.copy_(value)
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
        for _ in range(scheduler.last_epoch, steps):
            scheduler.probe(loss)
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            scheduler.step()
        values = [weight.detach() for weight in weights]
        state = {"weights": values, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(state, tmp_path / f"{steps}.pt")
        plain = {name: value for name, value in state["scheduler"].items() if name != "update"}
        return torch.cat(values), plain

    whole, last = train(40)
    for steps in (1, 7, 8, 9, 23):
        train(steps)
        values, state = train(40, resume=tmp_path / f"{steps}.pt")
        assert torch.equal(values, whole)
        assert state == last


def test_a_loss_is_needed():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    ExactGeNLR(optimizer)
    loss().backward()
    with pytest.raises(RuntimeError, match=r"call probe\(loss\) before optimizer.step"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps to be an integer >= 1"),
        ({"per_group": "no"}, "per_group to be True or False"),
        ({"every_n_steps": 0}, "every_n_steps to be an integer >= 1"),
        ({"rule": "magic"}, "expected rule to be one of"),
        ({"probe": "none"}, "expected probe to be one of"),
        ({"lr_min": 1.0, "lr_max": 0.1}, "0 < lr_min <= lr_max"),
        ({"lr_min": 0.0}, "0 < lr_min"),
        ({"final_decay": 2.0}, "0 <= final_decay <= 1"),
        ({"curvature": "kfac"}, "expected curvature to be one of"),
        ({"per_group": True, "probe": "same_batch"}, "per_group=True needs probe='next_batch'"),
    ],
    ids=str,
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ExactGeNLR(torch.optim.SGD([nn.Parameter(torch.ones(1, device=DEVICE))], lr=0.1), **options)


def test_the_final_decay_may_be_the_whole_run():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer, total_steps=4, final_decay=1.0)
    rates = []
    for _ in range(4):
        loop(optimizer, scheduler, loss, 1)
        rates.append(scheduler.get_lr()[0] / scheduler.rules[0].lr)
    assert rates == pytest.approx([0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("probe", ["next_batch", "same_batch"])
def test_a_loss_is_wanted_when_a_probe_looks_or_a_step_needs_it(probe):
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer, rule="published", probe=probe, every_n_steps=3)
    wanted, looks = [], []
    for _ in range(7):
        wanted.append(scheduler.wants_loss)
        loop(optimizer, scheduler, loss, 1)
        looks.append(scheduler.looks)
    if probe == "same_batch":
        assert wanted == [True] * 7
        assert looks == [1, 1, 1, 2, 2, 2, 3]
    else:  # the first look is at its own step, those at the steps 0, 3 and 6 are on the next batch
        assert wanted == [True, True, False, False, True, False, False]
        assert looks == [1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("curvature", ["three_point", "hessian", "gauss_newton", "finite_difference"])
def test_a_look_is_taken_in_the_session_of_the_loss_with_gradients_and_leaves_the_generators_unchanged(curvature):
    weight = nn.Parameter(torch.ones(50, **FLOAT64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer, curvature=curvature)
    opened, inside = [], []

    @contextmanager
    def session():
        opened.append(1)
        yield
        opened.pop()

    def function():
        inside.append(len(opened))
        outputs = nn.functional.dropout(weight, 0.5)
        return outputs.square().sum(), outputs

    def looked():
        state = torch.get_rng_state()
        with torch.no_grad():
            scheduler.probe(function, session)
        return torch.equal(torch.get_rng_state(), state)

    assert looked()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    scheduler.step()
    inside.clear()
    assert looked()
    assert inside
    assert all(count == 1 for count in inside)
    assert scheduler.looks == 2
    assert scheduler.parabolas[0].curvature > 0.0


def test_looks_are_rare_once_the_rate_has_settled_and_go_on_in_the_final_decay():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer, rule="published", every_n_steps=4, total_steps=20, final_decay=0.5)
    looks = []
    for _ in range(20):
        loop(optimizer, scheduler, loss, 1)
        looks.append(scheduler.looks)
    # along the updates of the steps 0, 4, 8, …, one step later each; the first one is also looked at in its own step
    assert looks == [1, *[2] * 4, *[3] * 4, *[4] * 4, *[5] * 4, *[6] * 3]


def test_after_detaching_the_optimizer_makes_plain_steps_at_its_last_rate():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer)
    loop(optimizer, scheduler, loss, 5)
    rate = scheduler.get_lr()[0]
    scheduler.detach()
    before, looks = weight.detach().clone(), scheduler.looks
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == rate
    assert torch.allclose(weight.detach(), before - rate * weight.grad, rtol=1e-14)
    assert scheduler.looks == looks
    assert not scheduler.is_pending


def test_a_look_counts_as_used_if_any_of_its_rules_used_it():
    weights = [nn.Parameter(torch.full((2,), 3.0, **FLOAT64)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0)
    scheduler = ExactGeNLR(optimizer, per_group=True, rule="published", curvature="hessian", every_n_steps=1)
    loop(optimizer, scheduler, lambda: weights[0].square().sum() - weights[1].square().sum(), 1)
    assert scheduler.accepted
    assert scheduler.refused == 1
    both = nn.Parameter(torch.full((2,), 3.0, **FLOAT64))
    optimizer = torch.optim.SGD([both], lr=1.0)
    scheduler = ExactGeNLR(optimizer, rule="published", curvature="hessian")
    loop(optimizer, scheduler, lambda: -both.square().sum(), 1)
    assert not scheduler.accepted


def losses_on_quadratic(start, curvatures, momentum, total):
    """The loss after each step of a run on Σ cᵢ wᵢ² / 2."""
    weight = nn.Parameter(start)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum)
    scheduler = ExactGeNLR(optimizer, total_steps=total)
    loss = lambda: (curvatures * weight**2).sum() / 2  # noqa: E731
    losses = []
    for _ in range(total):
        loop(optimizer, scheduler, loss, 1)
        losses.append(loss().item())
    return losses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("curvatures", [[1.0, 5.0, 0.3, 10.0], [2.0, 10.0], [1.0, 100.0]], ids=str)
@pytest.mark.parametrize("total", [200, 400])
def test_a_run_on_a_convex_quadratic_ends_near_its_least_loss(curvatures, momentum, total):
    """The rate outgrows 2/λ while the steepest direction is at 1e-30, where no look can see it, and then cuts back."""
    start = torch.tensor([3.0, -2.0, 1.0, 0.5][: len(curvatures)], **FLOAT64)
    losses = losses_on_quadratic(start, torch.tensor(curvatures, **FLOAT64), momentum, total)
    assert losses[-1] <= 10 * min(losses)
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dimensions", [2, 10])
@pytest.mark.parametrize("condition", [1.01, 10.0, 100.0, 1000.0, 10000.0])
@pytest.mark.parametrize("total", [50, 60, 100, 400])
def test_no_run_on_a_quadratic_ends_far_above_its_least_loss(total, condition, dimensions, momentum):
    """With momentum a run swings, and can pass very near to the minimum: there the least is that of ten steps' mean."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(dimensions, generator=generator, **FLOAT64)
    curvatures = torch.logspace(0, math.log10(condition), dimensions, **FLOAT64)
    losses = losses_on_quadratic(start, curvatures, momentum, total)
    window = 10 if momentum else 1
    means = torch.tensor(losses, **FLOAT64).unfold(0, window, 1).mean(1)
    assert losses[-1] <= 10 * means.min()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize("closure", [False, True])
def test_hooks_of_the_user_see_an_ordinary_step(when, closure):
    """Rates before a step and in its closure, and rates and weights after it."""
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    seen = {"before": [], "closure": [], "after": [], "weights": []}
    rate = lambda: optimizer.param_groups[0]["lr"]  # noqa: E731

    def register():
        optimizer.register_step_pre_hook(lambda *_: seen["before"].append(rate()))
        optimizer.register_step_post_hook(
            lambda *_: (seen["after"].append(rate()), seen["weights"].append(weight.detach().clone()))
        )

    if when == "before":
        register()
    scheduler = ExactGeNLR(optimizer, total_steps=30)
    if when == "after":
        register()

    def gradient():
        seen["closure"].append(rate())
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for index in range(30):
        if when == "later" and index == 5:
            register()
        scheduler.probe(loss)
        start = rate()  # what an ordinary scheduler would have left there
        if closure:
            optimizer.step(gradient)
        else:
            gradient()
            optimizer.step()
        if seen["before"]:
            assert seen["before"][-1] == start
            assert seen["after"][-1] == rate()
            assert torch.equal(seen["weights"][-1], weight.detach())
        assert seen["closure"][-1] == start
        assert seen["closure"][-1] != 1.0 or index == 0
        scheduler.step()
    assert len(seen["before"]) == len(seen["after"]) == (25 if when == "later" else 30)


def test_an_average_of_the_weights_follows_the_weights_and_not_the_step_at_rate_one():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer)
    module = nn.ParameterList([weight])
    average = torch.optim.swa_utils.AveragedModel(module, avg_fn=lambda old, new, _: (old + new) / 2)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(module))
    expected = None
    for _ in range(20):
        loop(optimizer, scheduler, loss, 1)
        now = weight.detach().clone()
        expected = now if expected is None else (expected + now) / 2
    assert torch.equal(next(average.module.parameters()).detach(), expected)


@pytest.mark.parametrize("curvature", ["three_point", "hessian", "gauss_newton", "finite_difference"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SparseAdam(p[:1]),
    ],
    ids=["SGD", "momentum", "SparseAdam"],
)
def test_sparse_gradients_give_the_rates_of_dense_ones(make, curvature):
    """SparseAdam, which takes no dense ones, lowers the loss."""
    index = torch.arange(64, device=DEVICE) % 50
    ends = []
    for sparse in (True, False) if make([torch.ones(1, requires_grad=True)]).__class__.__name__ == "SGD" else (True,):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(100, 4, sparse=sparse, **FLOAT64), nn.Linear(4, 3, **FLOAT64)
        optimizer = make([embedding.weight, *head.parameters()])
        scheduler = ExactGeNLR(optimizer, curvature=curvature)

        def loss(embedding=embedding, head=head):
            outputs = head(embedding(index))
            return nn.functional.cross_entropy(outputs, index % 3), outputs

        first = loss()[0].item()
        for _ in range(30):
            scheduler.probe(loss)
            optimizer.zero_grad()
            loss()[0].backward()
            optimizer.step()
            scheduler.step()
        ends.append((scheduler.rules[0].lr, loss()[0].item()))
        assert ends[-1][1] < first
    # differences of losses have six digits in float64, and a rate follows them
    assert ends[0] == pytest.approx(ends[-1], rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 0.04)], ids=str)
@pytest.mark.parametrize("curvature", ["three_point", "hessian", "finite_difference"])
def test_unused_weights_and_units_of_the_loss_do_not_change_the_rate(curvature, dtype, tolerance):
    """Rows of an embedding that no example uses, a thousand times as long as the others.

    In float64, differences of losses have six digits, and a rate follows them. In float32 a look by three points may be
    2 % off, which is what its least second difference leaves, and an update of 1e-4 beside weights of one is rounded;
    one of 1e-7 would have no digit. Another order of the sums in the loss changes which looks are off.
    """

    def rate(rows, *, scale=1.0, dtype=dtype):
        torch.manual_seed(0)
        head, index, embedding = nn.Linear(4, 3), torch.randint(0, 20, (64,)), nn.Embedding(20, 4)
        table = nn.Parameter(torch.cat([embedding.weight.detach(), 1e3 * torch.randn(rows, 4)]).to(DEVICE, dtype))
        head, index = head.to(DEVICE, dtype), index.to(DEVICE)  # the same numbers on every device
        optimizer = torch.optim.SGD([table, *head.parameters()], lr=1.0, momentum=0.9)
        scheduler = ExactGeNLR(optimizer, curvature=curvature, final_decay=0.0, lr_max=1e9, lr_min=1e-12)
        loss = lambda: scale * nn.functional.cross_entropy(head(table[index]), index % 3)  # noqa: E731
        loop(optimizer, scheduler, loss, 20)
        return scheduler.rules[0].lr

    wanted = pytest.approx(rate(0, dtype=torch.float64), rel=tolerance)
    assert rate(20_000) == wanted
    for scale in (1.0, 1e-3 if dtype == torch.float32 else 1e-6, 1e6):
        assert scale * rate(0, scale=scale) == wanted


def test_a_loss_unlike_its_gradient_is_looked_at_by_gradients_and_said_so_once(tmp_path):
    """The expected reward of a policy, whose value rises where its gradient descends."""
    x, labels = randn(90, 6, seed=0, dtype=torch.float32), torch.arange(90, device=DEVICE) % 3
    x[torch.arange(90), labels] += 2.0
    torch.manual_seed(0)
    net = nn.Linear(6, 3).to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = ExactGeNLR(optimizer, total_steps=150)

    def loss():
        log_policy = net(x).log_softmax(1)[torch.arange(90), labels]
        return -(log_policy.exp().detach() * log_policy).mean()

    assert scheduler.curvature == "three_point"
    with pytest.warns(UserWarning, match="does not change along its gradient") as caught:
        loop(optimizer, scheduler, loss, 150)
    assert sum("along its gradient" in str(warning.message) for warning in caught) == 1
    assert scheduler.curvature == "finite_difference"
    assert float((net(x).argmax(1) == labels).float().mean()) > 0.8
    resumed = ExactGeNLR(torch.optim.SGD(net.parameters(), lr=1.0))
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.curvature == "finite_difference"
    chosen = ExactGeNLR(torch.optim.SGD(net.parameters(), lr=1.0), curvature="hessian")
    loop(chosen.optimizer, chosen, loss, 2)
    assert chosen.curvature == "hessian"
