from examples.experiments import compare_inversions as example


def test_inversions_are_as_good_as_their_price(tmp_path):
    """At the optimum of logistic regression: conjugate gradients are exact, and KFAC is better than the identity."""
    result = example.main(["--models", "logistic regression", "--unroll", "5", "--output", str(tmp_path)])
    cosines = [
        result[f"logistic regression, {name}, at the optimum"]["measured"] for name in ("identity", "KFAC", "CG 20")
    ]
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.9 < 0.97 < cosines[1]
    assert cosines[2] == 1.0
