"""What is in the pictures."""

import csv
import math

import pytest
import torch
from matplotlib.figure import Figure

from lightning_ifthpo import label_issues
from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.plots import (
    plot_hyperparameters,
    plot_label_issues,
    plot_rate_suggestion,
    plot_sharpness,
    plot_spectral_density,
)
from lightning_ifthpo.spectrum import SpectralDensity, spectral_density
from lightning_ifthpo.step_size import RateSuggestion, RateTrial


def test_the_density_shows_each_eigenvalue_and_its_sign():
    # as many as there are iterations, where the density is exact
    values = torch.cat([torch.full((5,), -0.5), torch.full((40,), 1e-2), torch.full((5,), 20.0)])
    figure = plot_spectral_density(spectral_density(MatrixOperator(torch.diag(values.double()))))
    (axes,) = figure.axes
    bars = [bar for bar in axes.patches if bar.get_height() > 1e-6]
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1.0)
    assert [bar.get_height() for bar in bars] == pytest.approx([0.1, 0.8, 0.1], abs=1e-6)
    for bar, value in zip(bars, (-0.5, 1e-2, 20.0), strict=True):
        assert bar.get_x() <= value <= bar.get_x() + bar.get_width()
    assert len({bar.get_facecolor() for bar in bars}) == 3
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "log")
    assert axes.get_title() == "λ from -0.5 to 20: 10.0% below −0.02, 80.0% within 0.02 of zero"


def test_bins_are_as_fine_as_asked():
    density = spectral_density(MatrixOperator(torch.eye(3)))
    counts = [len(plot_spectral_density(density, bins_per_decade=number).axes[0].patches) for number in (2, 4)]
    assert counts == [2 * 7 + 1, 2 * 13 + 1]


@pytest.mark.parametrize("values", [[0.0], [3.0], [-2.0, -1.0]], ids=str)
def test_densities_of_few_points_are_drawn(values, tmp_path):
    matrix = torch.diag(torch.tensor(values).repeat(5).double())
    plot_spectral_density(spectral_density(MatrixOperator(matrix))).savefig(tmp_path / "density.png")


def test_a_density_that_is_not_finite_is_refused():
    nothing = torch.full((3,), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        plot_spectral_density(SpectralDensity(nothing, nothing, 0.0, 3, converged=False))


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)


def test_the_run_is_drawn_from_the_log(tmp_path):
    rows = [
        {"step": step, "sharpness/lambda_max": step / 2, "sharpness/lambda_min": -1.0, "sharpness/edge": 20.0}
        for step in (0, 10, 20)
    ]
    write(tmp_path / "metrics.csv", [*rows, {"step": 20, "loss": 0.5}])
    axes = plot_sharpness(tmp_path / "metrics.csv")
    lines = {line.get_label(): line for line in axes.lines}
    assert lines.keys() == {"λ_max", "λ_min", "stability edge"}
    assert list(lines["λ_max"].get_xdata()) == [0, 10, 20]
    assert list(lines["λ_max"].get_ydata()) == [0.0, 5.0, 10.0]
    axes.figure.savefig(tmp_path / "run.png")
    assert plot_sharpness(tmp_path / "metrics.csv", axes) is axes


def test_critical_sharpness_is_drawn_with_its_edge(tmp_path):
    rows = [{"step": step, "sharpness/critical": 1.0 + step, "sharpness/edge": 20.0} for step in (0, 10)]
    rows = [row | {"sharpness/bound": 0.0} for row in rows]
    rows.insert(1, {"step": 5, "sharpness/critical": 2e5, "sharpness/edge": 20.0, "sharpness/bound": 1.0})
    write(tmp_path / "metrics.csv", rows)
    axes = plot_sharpness(tmp_path / "metrics.csv", log=True)
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {"critical sharpness": [1.0, 11.0], "stability edge": [20.0, 20.0, 20.0]}
    assert axes.get_yscale() == "symlog"


def test_a_run_without_a_known_edge_has_no_line_for_it(tmp_path):
    write(tmp_path / "metrics.csv", [{"step": 0, "sharpness/lambda_max": 1.0, "sharpness/lambda_min": -1.0}])
    assert len(plot_sharpness(tmp_path / "metrics.csv").lines) == 2


def test_a_log_without_measurements_is_refused(tmp_path):
    write(tmp_path / "metrics.csv", [{"step": 0, "loss": 1.0}])
    with pytest.raises(ValueError, match="train with SharpnessMonitor and CSVLogger"):
        plot_sharpness(tmp_path / "metrics.csv")


def test_a_monitor_with_a_name_and_a_logarithmic_scale(tmp_path):
    rows = [{"step": step, "held_out/lambda_max": 10.0**step, "held_out/lambda_min": -1.0} for step in (0, 1, 2)]
    write(tmp_path / "metrics.csv", rows)
    with pytest.raises(ValueError, match="pass the name of the monitor"):
        plot_sharpness(tmp_path / "metrics.csv")
    axes = plot_sharpness(tmp_path / "metrics.csv", name="held_out", log=True)
    assert axes.get_yscale() == "symlog"
    assert plot_sharpness(tmp_path / "metrics.csv", name="held_out").get_yscale() == "linear"


def of_hyperparameter(name, step, mean, low, high):
    return {
        "step": step,
        f"hyperparameter/{name}/mean": mean,
        f"hyperparameter/{name}/min": low,
        f"hyperparameter/{name}/max": high,
    }


def test_hyperparameters_are_drawn_from_the_log(tmp_path):
    rows = [of_hyperparameter("decay", step, 10.0**-step, 10.0 ** -(step + 1), 1.0) for step in (1, 2, 3)]
    rows[1]["hyperparameter/decay/net.weight"] = 0.5
    write(tmp_path / "metrics.csv", [*rows, {"step": 3, "loss": 0.5}])
    axes = plot_hyperparameters(tmp_path / "metrics.csv")
    (line,) = axes.lines
    assert line.get_label() == "decay"
    assert list(line.get_xdata()) == [1, 2, 3]
    assert list(line.get_ydata()) == pytest.approx([0.1, 0.01, 0.001])
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).ymin == pytest.approx(1e-4)
    assert axes.get_yscale() == "log"
    assert plot_hyperparameters(tmp_path / "metrics.csv", log=False).get_yscale() == "linear"
    assert plot_hyperparameters(tmp_path / "metrics.csv", axes) is axes


def test_negative_hyperparameters_are_drawn_on_a_linear_scale(tmp_path):
    write(tmp_path / "metrics.csv", [of_hyperparameter("shift", step, 0.0, -1.0, 1.0) for step in (1, 2)])
    assert plot_hyperparameters(tmp_path / "metrics.csv").get_yscale() == "linear"


def test_a_log_without_hyperparameters_is_refused(tmp_path):
    for rows in ([{"step": 0, "loss": 1.0}], [{"step": 0, "hyperparameter/decay/0": 1.0}]):
        write(tmp_path / "metrics.csv", rows)
        with pytest.raises(ValueError, match="train with IFTHypergradient and CSVLogger"):
            plot_hyperparameters(tmp_path / "metrics.csv")


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("as_dataset", [False, True])
def test_the_worst_images_are_shown_with_their_labels(shape, as_dataset):
    images, logits = torch.rand(3, *shape), torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    labels = torch.tensor([0, 1, 1])
    data = torch.utils.data.TensorDataset(images, labels) if as_dataset else images
    figure = plot_label_issues(label_issues(logits, labels), data, names=["cat", "dog"], count=2)
    assert [axes.get_title() for axes in figure.axes] == ["dog → cat", "dog"]
    shown = torch.tensor(figure.axes[0].images[0].get_array().data)
    assert torch.equal(shown, images[1].movedim(0, -1).squeeze(-1) if len(shape) == 3 else images[1])
    unnamed = plot_label_issues(label_issues(logits, labels), data)
    assert [axes.get_title() for axes in unnamed.axes] == ["1 → 0", "1", "0"]


def test_a_picture_of_no_images_is_refused():
    with pytest.raises(ValueError, match="count to be an integer >= 1, got 0"):
        plot_label_issues(label_issues(torch.zeros(1, 2), torch.tensor([0])), torch.zeros(1, 2, 2), count=0)


@pytest.mark.parametrize("edge", [0.5, math.inf])
def test_a_suggestion_is_drawn_with_its_trials_and_its_edge(edge):
    trials = (RateTrial(0.025, 1.3), RateTrial(0.1, 1.2), RateTrial(0.4, math.inf))
    axes = plot_rate_suggestion(RateSuggestion(0.1, (0.1,), edge, trials, trial_steps=20, steps=64))
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["trials"] == [[0.025, 1.3], [0.1, 1.2]]
    assert lines["suggestion 0.1"] == [[0.1, 1.2]]
    assert [x for x, _ in lines["diverged"]] == [0.4]
    assert ("edge 0.5" in lines) == math.isfinite(edge)
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == (
        "log",
        "learning rate",
        "training loss after 20 steps",
    )


def test_a_suggestion_is_drawn_on_given_axes():
    axes = Figure().add_subplot()
    assert plot_rate_suggestion(RateSuggestion(0.1, (0.1,), 0.5, (RateTrial(0.1, 1.2),), 1, 2), axes) is axes
    assert axes.get_ylabel() == "training loss after one step"
