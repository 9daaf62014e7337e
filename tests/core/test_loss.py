"""A loss on one batch: value, outputs, share, scale, moves along a direction, random numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lightning_ifthpo.core.loss import Loss, as_loss, sum_over_processes
from lightning_ifthpo.core.marking import mark_outputs
from tests.helpers.device import DEVICE, FLOAT64
from tests.helpers.problems import spd_matrix


def cubic():
    """L = w₁³ + w₂³ with gradient 3w²."""
    w = torch.tensor([1.0, 2.0], **FLOAT64, requires_grad=True)
    return w, lambda: (w**3).sum()


def noisy():
    """A loss that draws random numbers from torch."""
    w = torch.ones(100, device=DEVICE, requires_grad=True)
    return w, lambda: F.dropout(w, 0.5).sum()


def test_value_gradient_and_graph_are_those_of_the_function():
    w, function = cubic()
    loss = Loss(function, [w])
    assert loss.value().item() == 9.0
    assert loss.gradient().tolist() == [3.0, 12.0]
    assert loss.graph().gradient.tolist() == [3.0, 12.0]
    assert loss.parameters == [w]
    assert not loss.value().requires_grad
    assert not loss.gradient().requires_grad
    assert w.grad is None


def test_a_loss_may_return_one_output_or_several_or_mark_them():
    w = torch.ones(2, requires_grad=True, device=DEVICE)
    z = w * 2
    assert Loss(lambda: z.sum(), [w]).evaluate()[1] == []
    assert Loss(lambda: (z.sum(), z), [w]).evaluate()[1] == [z]
    assert Loss(lambda: (z.sum(), [z, z]), [w]).evaluate()[1] == [z, z]
    assert Loss(lambda: mark_outputs(z).sum(), [w]).evaluate()[1] == [z]
    assert Loss(lambda: (mark_outputs(w * 3).sum(), z), [w]).evaluate()[1] == [z]


def test_a_share_and_a_scale_multiply_what_is_differentiated_and_only_the_scale_is_taken_back():
    w, function = cubic()
    loss = Loss(function, [w], share=0.5, scale=8.0)
    own, _ = loss.evaluate()
    assert own.item() == 0.5 * 8.0 * 9.0
    assert loss.value().item() == 0.5 * 9.0
    assert loss.gradient().tolist() == [1.5, 6.0]


def test_processes_are_summed_once_for_each_quantity():
    w, function = cubic()
    calls = []

    def all_reduce(part):
        calls.append(tuple(part.shape))
        return part + 1.0

    loss = Loss(function, [w], share=0.5, scale=2.0, all_reduce=all_reduce)
    assert loss.value().item() == (9.0 + 1.0) / 2.0
    assert loss.gradient().tolist() == [(3.0 + 1.0) / 2.0, (12.0 + 1.0) / 2.0]
    assert calls == [(), (2,)]


def test_the_own_share_belongs_to_a_single_process():
    w, function = cubic()
    own = Loss(function, [w], share=0.5, all_reduce=lambda part: 100 * part).own_share()
    assert own.value().item() == 4.5


def test_a_loss_of_other_parameters_keeps_all_the_rest():
    w, function = cubic()
    other = torch.ones(3, requires_grad=True, device=DEVICE)
    loss = Loss(function, [w], name="mine", share=0.5, scale=2.0, all_reduce=torch.clone)
    moved = loss.over([other])
    assert moved.parameters == [other]
    kept = ("function", "name", "share", "scale", "all_reduce")
    assert all(getattr(moved, name) is getattr(loss, name) for name in kept)


def test_lists_are_combined_by_one_collective_and_none_is_zero_unless_all_have_none():
    w, function = cubic()
    sizes = []

    def all_reduce(part):
        sizes.append(part.numel())
        return 2 * part

    loss = Loss(function, [w], all_reduce=all_reduce)
    like = [torch.ones(2, **FLOAT64), torch.ones((), **FLOAT64)]
    missing, present = loss.combine_list([None, torch.tensor(3.0, **FLOAT64)], like)
    assert (missing, present.item()) == (None, 6.0)
    assert sizes == [2 + 2 + 1]
    assert Loss(function, [w]).combine_list([None, like[1]], like) == [None, like[1]]


def test_a_loss_along_a_direction_is_that_at_the_moved_weights_and_the_weights_come_back():
    w, function = cubic()
    before = w.detach().clone()
    with Loss(function, [w]).along([torch.tensor([1.0, -1.0], **FLOAT64)]) as at:
        assert at(0.5).item() == 1.5**3 + 1.5**3
        assert at(0.0).item() == 9.0
        assert at(-1.0).item() == 0.0 + 3.0**3
    assert torch.equal(w, before)


def test_weights_come_back_after_an_error_and_none_stands_for_no_move():
    w, v = (torch.tensor([1.0], **FLOAT64, requires_grad=True) for _ in range(2))
    values = []

    def function():
        values.append((w.item(), v.item()))
        if len(values) == 2:
            raise ArithmeticError
        return w.sum()

    loss = Loss(function, [w, v])
    with pytest.raises(ArithmeticError), loss.along([None, torch.ones(1, **FLOAT64)]) as at:
        [at(alpha) for alpha in (1.0, 2.0)]
    assert values == [(1.0, 2.0), (1.0, 3.0)]
    assert (w.item(), v.item()) == (1.0, 1.0)


def test_gradients_along_a_direction_are_right_under_activation_checkpointing():
    """The forward pass is computed again during the backward pass, at the weights of that moment."""
    w = torch.tensor([1.0, 2.0], **FLOAT64, requires_grad=True)
    loss = Loss(lambda: checkpoint(lambda x: (x**3).sum(), w, use_reentrant=False), [w])
    with loss.along([torch.ones(2, **FLOAT64)]) as at:
        (gradient,) = torch.autograd.grad(at(1.0), [w])
    assert gradient.tolist() == [12.0, 27.0]


def test_all_evaluations_draw_the_same_numbers_and_only_the_first_advances_the_generators():
    w, function = noisy()
    loss, state = Loss(function, [w]), torch.get_rng_state()
    function()
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    values = [loss.value().item() for _ in range(3)]
    assert values[0] == values[1] == values[2]
    assert torch.equal(torch.get_rng_state(), expected)
    assert Loss(function, [w]).value().item() != values[0]


def test_fixed_random_numbers_leave_the_generators_unchanged():
    w, function = noisy()
    loss, state = Loss(function, [w]), torch.get_rng_state()
    loss.fix_random_numbers()
    assert loss.value().item() == loss.value().item()
    assert torch.equal(torch.get_rng_state(), state)


def test_moves_leave_the_generators_unchanged():
    w, function = noisy()
    state = torch.get_rng_state()
    with Loss(function, [w]).along([torch.zeros(100, device=DEVICE)]) as at:
        assert at(1.0).item() == at(-1.0).item()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("other", [lambda w, v: [v, w], lambda w, v: [w], lambda w, v: [w, v, w.clone()]])
def test_a_loss_of_other_parameters_is_refused(other):
    w, v = (torch.ones(2, requires_grad=True, device=DEVICE) for _ in range(2))
    loss = Loss(lambda: (w * v).sum(), [w, v])
    with pytest.raises(ValueError, match=r"is a Loss of other parameters; pass loss.parameters, or loss.over"):
        as_loss(loss, other(w, v))


def test_a_value_needs_no_graph():
    w = torch.ones(2, device=DEVICE)
    assert Loss(lambda: w.sum(), [w]).value().item() == 2.0
    with torch.no_grad():
        assert Loss(lambda: w.sum(), [w]).value().item() == 2.0


@pytest.mark.parametrize("outputs", [{"a": 1}, [1.0], "z", 3])
def test_outputs_that_are_no_tensors_are_refused(outputs):
    w, function = cubic()
    with pytest.raises(TypeError, match=r"expected a scalar tensor or \(loss, outputs\)"):
        Loss(lambda: (function(), outputs), [w]).evaluate()


def test_a_triple_is_refused():
    w, function = cubic()
    with pytest.raises(TypeError, match=r"got a tuple of 3"):
        Loss(lambda: (function(), w, w), [w]).evaluate()


def test_a_loss_is_taken_as_it_is_and_a_function_gets_a_name():
    w, function = cubic()
    loss = Loss(function, [w])
    assert as_loss(loss, [w]) is loss
    assert as_loss(function, [w], "the inner loss").name == "the inner loss"


def test_without_a_process_group_there_is_nothing_to_sum_over():
    with pytest.raises(ValueError, match="process group has not been initialized"):
        sum_over_processes(torch.ones(1))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (1.0, TypeError, "the loss: expected a scalar tensor, got float"),
        (None, TypeError, "expected a scalar tensor, got NoneType"),
        (torch.ones(2, requires_grad=True), ValueError, r"expected a scalar, got shape \(2,\); take its mean or sum"),
        (torch.tensor(1), TypeError, "expected a real floating-point tensor, got torch.int64"),
        (torch.tensor(1j, requires_grad=True), TypeError, "got torch.complex64"),
        (torch.tensor(1.0), ValueError, r"the loss is detached.*Look for .detach\(\)"),
    ],
    ids=["float", "nothing", "vector", "integer", "complex", "detached"],
)
def test_what_is_no_loss_is_said_in_words(loss, error, message):
    with pytest.raises(error, match=message):
        Loss(lambda: loss, [torch.ones(1)]).evaluate()


def test_a_scalar_of_any_number_of_dimensions_is_a_loss():
    Loss(lambda: torch.ones(1, 1, requires_grad=True), [torch.ones(1)]).evaluate()


def test_the_name_stands_in_messages():
    with pytest.raises(ValueError, match="inner_loss: expected a scalar"):
        Loss(lambda: torch.ones(2, requires_grad=True), [torch.ones(1)], name="inner_loss").evaluate()


def quadratic_graph(matrix, weight, hyperparameter):
    """L = h wᵀAw/2, with gradient hAw, Hessian hA and mixed derivative Aw."""
    return Loss(lambda: hyperparameter * weight @ matrix @ weight / 2, [weight]).graph()


def test_products_are_those_of_the_closed_form_and_can_be_repeated():
    matrix = spd_matrix(4, 10.0, dtype=torch.float64)
    weight = torch.linspace(-1, 1, 4, **FLOAT64).requires_grad_()
    hyperparameter = torch.tensor(3.0, **FLOAT64, requires_grad=True)
    graph, v = quadratic_graph(matrix, weight, hyperparameter), torch.linspace(0, 1, 4, **FLOAT64)
    for _ in range(2):
        assert torch.allclose(graph.gradient, 3 * matrix @ weight.detach(), rtol=1e-14)
        assert torch.allclose(graph.hessian_product(v), 3 * matrix @ v, rtol=1e-14)
        (mixed,) = graph.mixed_product(v, [hyperparameter])
        assert mixed.item() == pytest.approx((v @ matrix @ weight).item(), rel=1e-14)
    assert not graph.gradient.requires_grad
    assert weight.grad is None


def test_what_enters_linearly_or_not_at_all_has_zero_blocks():
    curved, linear = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    frozen, unused, other = torch.ones(1), torch.ones(1, requires_grad=True), torch.ones((), requires_grad=True)
    graph = Loss(lambda: (curved**2 + linear + frozen).sum(), [curved, linear, frozen, unused]).graph()
    assert graph.gradient.tolist() == [4.0, 1.0, 0.0, 0.0]
    assert graph.hessian_product(torch.ones(4)).tolist() == [2.0, 0.0, 0.0, 0.0]
    assert graph.mixed_product(torch.ones(4), [other]) == [None]


def test_there_is_a_part_for_each_tensor():
    w, function = cubic()
    with pytest.raises(ValueError, match="longer"):
        Loss(function, [w], scale=2.0).combine_list([w], [w, w])


def test_lists_of_one_process_are_taken_from_the_scale_too_and_keep_their_dtypes():
    w, function = cubic()
    like = [torch.ones(2, **FLOAT64), torch.ones((), device=DEVICE), torch.ones(1, **FLOAT64)]
    parts = [torch.tensor([2.0, 4.0], **FLOAT64), torch.tensor(6.0, device=DEVICE), None]
    first, second, missing = Loss(function, [w], scale=2.0).combine_list(parts, like)
    assert (first.tolist(), second.item(), missing) == ([1.0, 2.0], 3.0, None)
    assert (first.dtype, second.dtype) == (torch.float64, torch.float32)
