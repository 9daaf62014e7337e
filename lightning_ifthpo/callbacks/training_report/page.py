"""A report as one HTML page; needs Jinja2 and matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from lightning_ifthpo.callbacks.training_report.chart import Chart
from lightning_ifthpo.callbacks.training_report.drawing import draw
from lightning_ifthpo.callbacks.training_report.facts import Finding
from lightning_ifthpo.callbacks.training_report.sections import Section

_LATER = "<p>This chart is drawn later.</p>"


@dataclass(frozen=True)
class Heading:
    """What stands on top of a page.

    Attributes:
        module: Name of the module's class.
        state: How far the run is, in a sentence.
        batches: Number of training batches that were seen.
        is_over: Whether the run is over.
    """

    module: str
    state: str
    batches: int
    is_over: bool


def drawn(sections: Sequence[Section]) -> dict[str, str]:
    """Returns the charts of all sections as SVG, by section and title. Cost: some 30 ms for each."""
    return {
        _key(section, chart): draw(chart, f"{section.name}-{number}")
        for section in sections
        for number, chart in enumerate(section.charts)
        if chart.has_data
    }


def render(
    heading: Heading, findings: Sequence[Finding], sections: Sequence[Section], charts: Mapping[str, str]
) -> str:
    """Returns the page, without a link to anything outside it.

    Args:
        heading: What stands on top.
        findings: The diagnosis.
        sections: What follows.
        charts: A result of `drawn`; what is not there is said to be drawn later.
    """
    return _template().render(
        heading=heading,
        findings=findings,
        sections=sections,
        charts_of=lambda section: [
            (chart, Markup(charts.get(_key(section, chart), _LATER))) for chart in section.charts if chart.has_data
        ],
        summary_of=_summary,
    )


def _key(section: Section, chart: Chart) -> str:
    return f"{section.name}/{chart.title}"


def _summary(chart: Chart) -> list[str]:
    """Returns the caption of a chart, a line for each curve."""
    return [line.words for line in chart.lines if line.series.count > line.series.nonfinite]


@cache
def _template() -> Template:
    source = files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)
