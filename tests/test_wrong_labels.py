"""The table of labels that are likely wrong."""

import csv

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo import label_issues, label_margins

LABELS = torch.tensor([2, 0, 1, 1, 0])


def some_logits():
    torch.manual_seed(0)
    return torch.randn(5, 3, dtype=torch.float64)


def test_the_worst_come_first_by_the_loss_of_the_given_label():
    logits = some_logits()
    issues = label_issues(logits, LABELS)
    assert issues.index.tolist() == F.cross_entropy(logits, LABELS, reduction="none").argsort(descending=True).tolist()
    assert torch.allclose(issues.label_score, logits.softmax(1)[issues.index, LABELS[issues.index]])
    assert issues.given_label.tolist() == LABELS[issues.index].tolist()
    assert issues.predicted_label.tolist() == logits.argmax(1)[issues.index].tolist()
    assert torch.equal(issues.is_label_issue, issues.given_label != issues.predicted_label)
    assert 0 < int(issues.is_label_issue.sum()) < 5
    assert torch.equal(issues.margin, label_margins(logits, LABELS)[issues.index])


def test_a_transition_gives_the_posterior_of_bayes_rule():
    logits, transition = some_logits(), torch.tensor([[0.1, 0.8, 0.1], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]])
    issues = label_issues(logits, LABELS, transition=transition)
    for row in issues:
        joint = logits[row["index"]].softmax(0) * transition[:, row["given_label"]]
        assert row["label_score"] == pytest.approx(float(joint[row["given_label"]] / joint.sum()))
        assert row["predicted_label"] == int(joint.argmax())
    assert issues.predicted_label.tolist() != label_issues(logits, LABELS).predicted_label.tolist()


def test_a_margin_is_the_distance_to_the_best_other_class():
    margins = label_margins(torch.tensor([[4.0, 1.0, 3.0], [0.0, 5.0, 7.0]]), torch.tensor([0, 1]))
    assert margins.tolist() == [1.0, -2.0]


def test_a_tie_is_no_issue():
    assert not label_issues(torch.zeros(3, 2), torch.tensor([0, 1, 1])).is_label_issue.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_may_be_small_integers(dtype):
    issues = label_issues(some_logits(), LABELS.to(dtype))
    assert torch.equal(issues.index, label_issues(some_logits(), LABELS).index)


def test_margins_need_a_label_for_each_example():
    with pytest.raises(ValueError, match=r"labels of shape \(5,\)"):
        label_margins(some_logits(), LABELS[:2])


def test_weights_are_shown_with_their_example():
    weights = torch.rand(5)
    issues = label_issues(some_logits(), LABELS, weights=weights)
    assert torch.equal(issues.weight, weights[issues.index].double())
    assert "weight" not in label_issues(some_logits(), LABELS).columns()


def test_table_rows_frame_and_file_agree(tmp_path):
    issues = label_issues(some_logits(), LABELS, weights=torch.rand(5))
    names = ["index", "is_label_issue", "label_score", "given_label", "predicted_label", "margin", "weight"]
    rows, frame = list(issues), issues.to_pandas()
    issues.to_csv(tmp_path / "issues.csv")
    read = list(csv.DictReader((tmp_path / "issues.csv").read_text().splitlines()))
    assert list(rows[0]) == list(read[0]) == [frame.index.name, *frame.columns] == names
    assert frame.equals(pd.DataFrame(rows).set_index("index").astype({"weight": "float64"}))
    assert [float(row["label_score"]) for row in read] == issues.label_score.tolist()
    assert [row["is_label_issue"] for row in read] == [str(value) for value in issues.is_label_issue.tolist()]


def test_the_head_is_what_is_printed():
    torch.manual_seed(0)
    issues = label_issues(torch.randn(30, 4), torch.randint(4, (30,)))
    lines = str(issues).splitlines()
    assert lines[0] == f"{int(issues.is_label_issue.sum())} of 30 labels are likely to be wrong; the worst first"
    assert [int(line.split()[0]) for line in lines[2:]] == issues.head(10).index.tolist()
    assert (len(issues), len(issues.head(3)), len(issues.head(99))) == (30, 3, 30)
    with pytest.raises(ValueError, match="n to be an integer >= 0"):
        issues.head(-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(5)}, r"finite logits \[n, C\] of at least two classes, got shape \(5,\)"),
        ({"logits": torch.full((5, 3), torch.nan)}, "finite logits"),
        ({"logits": torch.zeros(5, 1)}, "at least two classes"),
        ({"transition": torch.tensor([[1.0, 0.0, 0.0]] * 3)}, "no column of zeros alone"),
        ({"transition": -torch.eye(3)}, "without negative"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0])}, "labels from 0 to 2, got 0 to 3"),
        ({"labels": torch.zeros(5)}, "labels to be an integer tensor"),
        ({"labels": torch.tensor([0, 1])}, r"labels of shape \(5,\).*got \(2,\)"),
        ({"weights": torch.ones(4)}, r"weights of shape \(5,\)"),
        ({"transition": torch.eye(2)}, r"transition of shape \(3, 3\)"),
    ],
)
def test_refuses(changes, message):
    arguments = {"logits": some_logits(), "labels": LABELS} | changes
    with pytest.raises(ValueError, match=message):
        label_issues(**arguments)
