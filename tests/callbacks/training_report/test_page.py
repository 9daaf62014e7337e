"""Charts, sections and the page, without a Trainer."""

import math
import re
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest

from lightning_ifthpo.callbacks.training_report import page
from lightning_ifthpo.callbacks.training_report.chart import Chart, Line
from lightning_ifthpo.callbacks.training_report.drawing import draw
from lightning_ifthpo.callbacks.training_report.facts import Facts, Finding, Tuning
from lightning_ifthpo.callbacks.training_report.records import Records, Series
from lightning_ifthpo.callbacks.training_report.sections import Extras, sections_of
from lightning_ifthpo.curvature.kinds import OPERATORS

HEADING = page.Heading("Module", "Training is over.", 100, True)


def curve(*values):
    series = Series()
    for step, value in enumerate(values):
        series.add(step, value)
    return series


def chart(*lines, **options):
    return Chart("A title", tuple(Line(f"line {index}", line) for index, line in enumerate(lines)), **options)


def test_a_chart_is_an_image_with_words_in_the_colours_of_the_page():
    svg = draw(chart(curve(1.0, 2.0, 4.0), curve(3.0, 1.0, 2.0), marks=(0, 2), level=(1.5, "level")), "x")
    element = ET.fromstring(svg)
    assert element.get("role") == "img"
    assert element.get("aria-label").startswith("A title. line 0: from 1 to 4, between 1 and 4; line 1: from 3 to 2")
    assert element.get("width") is element.get("height") is None
    assert element.get("viewBox")
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}
    assert {"var(--line-0)", "var(--line-1)"} <= set(re.findall(r"var\(--line-\d\)", svg))
    assert "currentColor" in svg
    assert all(name.startswith("x-") for name in re.findall(r'\bid="([^"]*)"', svg))
    assert "level" in "".join(element.itertext())


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(mpl.rcParams)
    draw(chart(curve(1.0, 2.0)), "x")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    "values",
    [
        (1.0,),
        (1.0, math.nan, 2.0),
        (1e-30, 1e30),
        (0.0, 0.0),
        (-5.0, 1e6),
        (1e300, 1e308),
        (-1e308, 1e308),
        (5e-324, 1.0),
        (5e-324, 1e-323),
    ],
)
def test_any_curve_can_be_drawn(values):
    ET.fromstring(draw(chart(curve(*values)), "x"))


def test_positive_values_over_decades_are_drawn_on_a_logarithmic_scale():
    ticks = lambda *values, **options: "".join(ET.fromstring(draw(chart(curve(*values), **options), "x")).itertext())  # noqa: E731
    assert "0.001" in ticks(1e-4, 1.0)
    assert "0.001" not in ticks(1e-4, 1.0, can_be_log=False)
    assert "0.001" not in ticks(0.5, 1.0)


def test_names_of_hyperparameters_are_not_taken_for_formulas():
    svg = draw(Chart("t", (Line("$a_b & <c>", curve(1.0)), Line("b", curve(2.0)))), "x")
    assert "$a_b & <c>" in "".join(ET.fromstring(svg).itertext())


def test_a_name_in_any_script_is_drawn_without_a_warning():
    assert "漢字" in draw(Chart("t", (Line("漢字", curve(1.0)), Line("b", curve(2.0)))), "x")


def test_without_data_there_is_no_section_and_nothing_unusual():
    assert sections_of(Facts(batches=0), Extras()) == []
    text = page.render(HEADING, [], [], {})
    assert "Nothing unusual was seen by these rules." in text
    assert "<nav" not in text


@pytest.mark.parametrize(("is_over", "ending"), [(True, "."), (False, " yet.")])
def test_without_a_batch_nothing_is_said_to_be_fine(is_over, ending):
    text = page.render(page.Heading("Module", "", 0, is_over), [], [], {})
    assert f"No training batch was seen{ending}" in text
    assert "Nothing unusual" not in text


def test_curves_without_a_finite_value_are_left_out():
    records = Records()
    records.open("gradient_norm").add(0, math.nan)
    assert sections_of(Facts(batches=1, records=records), Extras()) == []


def test_few_parts_are_drawn_one_by_one_and_many_as_a_band():
    records = Records()
    for name, count in (("few", 3), ("many", 9), ("single", 0)):
        for part in ("mean", "min", "max", *range(count)):
            records.open(f"hyperparameter/{name}/{part}").add(
                0, {"min": 0.1, "max": 0.9}.get(part, 0.5) if count else 0.5
            )
    (section,) = sections_of(Facts(batches=1, records=records), Extras())
    few, many, single = section.charts
    assert [line.label for line in few.lines] == ["0", "1", "2"]
    assert [line.label for line in many.lines] == ["mean, with a band from lowest to highest"]
    assert many.lines[0].low.last == 0.1
    assert [line.label for line in single.lines] == ["single"]


def test_findings_are_listed_in_their_order():
    findings = [Finding("first <thing>", "Seen.", "Do.", 1.0), Finding("second", "Seen too.", "Do that.", 0.5)]
    text = page.render(HEADING, findings, [], {})
    assert text.index("First &lt;thing&gt;") < text.index("Second")
    assert "Nothing unusual" not in text


@pytest.mark.parametrize("curvature", OPERATORS)
def test_each_curvature_is_named_beside_the_solves(curvature):
    records = Records()
    records.open("hypergrad/residual").add(0, 0.99)
    tuning = Tuning(hyper_steps=1, curvature=curvature)
    (section,) = sections_of(Facts(batches=1, records=records, tuning=tuning), Extras())
    words = {"hessian": "Hessian", "gauss_newton": "mark_outputs", "kfac": "KFAC"}
    words["gradient_outer_product"] = "outer product"
    assert words.get(curvature, curvature) in section.sentences[0]


@pytest.mark.parametrize("is_amortized", [True, False])
def test_a_residual_is_explained_where_it_says_little(is_amortized):
    records = Records()
    records.open("hypergrad/residual").add(0, 0.99)
    tuning = Tuning(hyper_steps=1, is_amortized=is_amortized)
    (section,) = sections_of(Facts(batches=1, records=records, tuning=tuning), Extras())
    assert ("In minibatch training the residual says little" in section.sentences[-1]) == is_amortized
