"""The inverses of Fig. 2, at a quarter of the pixels."""

import pytest

from tests.test_examples import load


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inverse_hessian")
    result = load("inverse_hessian").main(["--pooling", "7", "--output", str(folder)])
    assert 10_000 < (folder / "inverse_hessian.png").stat().st_size < 300_000
    return {name: entry["measured"] for name, entry in result.items()}


def test_exact_methods_are_exact(figures):
    assert figures["Gauss–Newton, error"] == 0.0
    assert figures["Gauss–Newton, cosine"] == 1.0
    assert figures["unrolled beside Neumann"] == 0.0


def test_more_products_come_nearer(figures):
    for family, numbers in (("Neumann", (1, 5, 20, 100)), ("CG", (5, 20))):
        errors = [figures[f"{family} {number}, error"] for number in numbers]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.7 * errors[0]
    assert figures["identity, error"] > figures["Neumann 1, error"]


def test_kfac_is_nearer_than_a_hundred_terms_and_the_gradient_knows_nothing(figures):
    assert figures["KFAC, error"] < 0.3 < figures["Neumann 100, error"]
    # zero at the minimum, where the damping alone is inverted: a multiple of the identity
    assert figures["gradient outer product, cosine"] == figures["identity, cosine"]


def test_nothing_is_expected_of_other_sizes(tmp_path):
    result = load("inverse_hessian").main(["--pooling", "14", "--output", str(tmp_path)])
    assert {entry["expected"] for name, entry in result.items() if name != "unrolled beside Neumann"} == {None}
