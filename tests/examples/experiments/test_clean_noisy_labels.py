from examples.experiments import clean_noisy_labels as example


def test_the_main_job_reaches_its_target(tmp_path, capsys):
    """Mean of three seeds; one test image of 1,500 is 0.0007."""
    result = example.main(["--seeds", "0", "1", "2", "--output", str(tmp_path)])
    measured = {name: entry["measured"] for name, entry in result.items()}
    assert measured["learned"] >= 0.925
    assert measured["auc"] >= 0.95
    baseline = max(measured[name] for name in ("noisy", "clean", "both"))
    assert measured["learned"] - baseline >= 0.5 * (measured["oracle"] - baseline)
    assert len(list(tmp_path.rglob("metrics.csv"))) == 3
    assert list(tmp_path.rglob("events.out.tfevents*"))
