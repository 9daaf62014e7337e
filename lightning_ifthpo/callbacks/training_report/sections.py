"""The sections of a report: which curves and sentences are shown; those without data are left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_ifthpo.callbacks.training_report.chart import Chart, Line
from lightning_ifthpo.callbacks.training_report.facts import Facts
from lightning_ifthpo.callbacks.training_report.records import Records

_CHARTS = 8  # of hyperparameters
_PARTS = 6  # curves in a chart of hyperparameters
_LAYERS = 60  # rows of the table of layers
_CURVATURES = {
    "hessian": "Their matrix is the Hessian, because no outputs are marked, or because it was asked for.",
    "gauss_newton": "Their matrix is that of Gauss and Newton, of the outputs that mark_outputs names.",
    "finite_difference": "Their products are differences of gradients (curvature='finite_difference').",
    "kfac": "Their matrix is that of KFAC.",
    "gradient_outer_product": "Their matrix is the outer product of gradients.",
}
_RESIDUAL = (
    "In minibatch training the residual says little, because each solve sees another batch: values up to about 1.5 are "
    "usual in runs that tuning helps. What hyper steps are worth is told by what later hypergradients confirm."
)


@dataclass(frozen=True)
class Table:
    """A table with a header."""

    caption: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """A heading with sentences, charts and a table below it."""

    name: str
    heading: str
    sentences: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    table: Table | None = None


@dataclass(frozen=True)
class Extras:
    """What a report shows beside the facts of the diagnosis.

    Attributes:
        marks: Training batches of hyper steps.
        shares: Share of the training time of each callback.
        told: Warnings of the package.
        noise: The gradient noise scale, or why there is none, in a sentence.
    """

    marks: tuple[int, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    noise: str = ""


def sections_of(facts: Facts, extras: Extras) -> list[Section]:
    """Returns the sections for which there are data."""
    made = (
        _losses(facts, extras),
        _hyperparameters(facts.records),
        _hyper_steps(facts),
        _solves(facts),
        _curvature(facts.records),
        _rates(facts.records),
        _gradients(facts, extras),
        _time(extras),
    )
    told = [Section("told", "Warnings on the console", list(extras.told))] if extras.told else []
    return told + [section for section in made if section.table or any(chart.has_data for chart in section.charts)]


def _losses(facts: Facts, extras: Extras) -> Section:
    records = facts.records
    outer = [Line("outer loss", records["hypergrad/outer_loss"])]
    outer += [Line(f"validation: {name.split('/', 1)[1]}", records[name]) for name in records.names("validation/")[:5]]
    marked = "Ticks on the horizontal axis mark hyper steps." if extras.marks else ""
    inner = Chart("Training loss", (Line("training loss", facts.loss.curve),), marks=extras.marks)
    sentences = [marked, "The outer loss is that of one outer batch." if outer[0].series.count else ""]
    charts = [inner, _chart("Outer and validation loss", outer, marks=extras.marks)]
    return Section("losses", "Losses", sentences, charts)


def _hyperparameters(records: Records) -> Section:
    names = list(dict.fromkeys(name.split("/")[1] for name in records.names("hyperparameter/")))
    charts = [_hyperparameter(records, name) for name in names[:_CHARTS]]
    more = f"{len(names) - _CHARTS} more are in the logs." if len(names) > _CHARTS else ""
    return Section("hyperparameters", "Hyperparameters, in natural units", [more], charts)


def _hyperparameter(records: Records, name: str) -> Chart:
    prefix = f"hyperparameter/{name}/"
    mean, low, high = (records[f"{prefix}{key}"] for key in ("mean", "min", "max"))
    parts = [key.removeprefix(prefix) for key in records.names(prefix)]
    parts = [part for part in parts if part not in ("mean", "min", "max")]
    if 1 < len(parts) <= _PARTS:
        return _chart(name, [Line(part, records[f"{prefix}{part}"]) for part in parts])
    if low.last == high.last and low.first == high.first:
        return _chart(name, [Line(name, mean)])
    return _chart(name, [Line("mean, with a band from lowest to highest", mean, low, high)])


def _hyper_steps(facts: Facts) -> Section:
    tuning, records = facts.tuning, facts.records
    sentences = []
    if tuning is not None:
        sentences = [
            tuning.verdict
            or f"{tuning.hyper_steps} hyper steps predicted to lower the outer loss by {tuning.predicted:.2g} in all. "
            f"By the hypergradients that followed, they lowered it by {tuning.confirmed:.2g} ± {tuning.error:.1g}.",
            f"{tuning.replaced} steps were far too long, and replaced by default ones." if tuning.replaced else "",
        ]
    lines = [Line("predicted", records["tuning/predicted"]), Line("confirmed", records["tuning/confirmed"])]
    decrease = _chart("Decrease of the outer loss by hyper steps, summed", lines, can_be_log=False)
    norms = ("norm", "direct_norm", "indirect_norm") if records["hypergrad/direct_norm"].most > 0.0 else ("norm",)
    parts = [Line(key.replace("_", " "), records[f"hypergrad/{key}"]) for key in norms]
    return Section("hyper-steps", "Hyper steps", sentences, [decrease, _chart("Norm of the hypergradient", parts)])


def _solves(facts: Facts) -> Section:
    records, tuning = facts.records, facts.tuning
    rows = [(cause.replace("_", " "), f"{count:,}") for cause, count in (tuning.skipped if tuning else {}).items()]
    if tuning is not None and rows:
        rows.append(("hyper steps in all", f"{tuning.hyper_steps:,}"))
    table = Table("Skipped hyper steps by cause", ("cause", "hyper steps"), rows) if rows else None
    sentences = [
        _CURVATURES.get(tuning.curvature, "") if tuning else "",
        "" if rows or not tuning or not tuning.hyper_steps else "No hyper step was skipped.",
        _RESIDUAL if records["hypergrad/residual"].count and tuning and tuning.is_amortized else "",
    ]
    level = (1.0, "no solution")
    charts = [_chart("Relative residual of the solves", [Line("residual", records["hypergrad/residual"])], level=level)]
    return Section("solves", "Linear solves", sentences, charts, table)


def _curvature(records: Records) -> Section:
    charts = []
    for name in (name.removesuffix("/lambda_max") for name in records.names() if name.endswith("/lambda_max")):
        lines = [Line("λ_max", records[f"{name}/lambda_max"]), Line("edge of stability", records[f"{name}/edge"])]
        charts.append(_chart(f"λ_max of the training loss ({name})", lines))
        charts.append(_chart(f"λ_min of the training loss ({name})", [Line("λ_min", records[f"{name}/lambda_min"])]))
        ratio = [Line("λ_max over the edge", records[f"{name}/edge_ratio"])]
        charts.append(_chart(f"λ_max over the edge of stability ({name})", ratio, level=(1.0, "edge")))
    for name in (name.removesuffix("/critical") for name in records.names() if name.endswith("/critical")):
        lines = [Line("critical sharpness", records[f"{name}/critical"]), Line("edge", records[f"{name}/edge"])]
        charts.append(_chart(f"Critical sharpness along the steps ({name})", lines))
        ratio = [Line("step over the critical step", records[f"{name}/edge_ratio"])]
        charts.append(_chart(f"Steps over the longest that do not raise the loss ({name})", ratio, level=(1.0, "edge")))
    return Section("curvature", "Curvature", [], charts)


def _rates(records: Records) -> Section:
    names = records.names("lr/")
    labels = ["learning rate"] if len(names) == 1 else [name.removeprefix("lr/") for name in names]
    lines = [Line(label, records[name]) for label, name in zip(labels, names, strict=True)]
    chosen = [Line("optimal step along the update", records[name]) for name in records.names("gen/alpha")[:_PARTS]]
    sharpness = [
        Line("along the update", records[name]) for name in records.names("gen/directional_sharpness")[:_PARTS]
    ]
    refused = records["gen/refused"]
    sentence = f"ExactGeN refused {refused.last:.0f} of its looks." if refused.count and refused.last else ""
    charts = [_chart("Learning rate", lines), _chart("What ExactGeN found best", [*chosen, *_gen_rate(records)])]
    return Section("rates", "Learning rate", [sentence], [*charts, _chart("Directional sharpness", sharpness)])


def _gen_rate(records: Records) -> Iterator[Line]:
    if records["gen/lr"].count:
        yield Line("rate that it chose", records["gen/lr"])


def _gradients(facts: Facts, extras: Extras) -> Section:
    records = facts.records
    ratio = Line(
        "median layer, with a band from lowest to highest",
        records["update_ratio/median"],
        records["update_ratio/low"],
        records["update_ratio/high"],
    )
    charts = [
        _chart("Norm of the gradient, before clipping", [Line("gradient norm", records["gradient_norm"])]),
        _chart("Length of an update over that of the weights", [ratio]),
    ]
    return Section("gradients", "Gradients and updates", [extras.noise], charts, _layers(facts))


def _layers(facts: Facts) -> Table | None:
    measured = {name: layer for name, layer in facts.layers.items() if layer.measurements}
    if not measured:
        return None
    rows = [
        (
            name,
            f"{layer.norm:.3g}",
            f"{layer.gradient:.1e}",
            _maybe(layer.ratio),
            "–" if math.isnan(layer.dead_units) else f"{layer.dead_units:.0%}",
        )
        for name, layer in list(measured.items())[:_LAYERS]
    ]
    more = f"; {len(measured) - _LAYERS} more are not shown" if len(measured) > _LAYERS else ""
    header = ("weights", "length", "gradient", "update / weights", "units without gradient")
    return Table(f"Each tensor of weights at the last measurement{more}", header, rows)


def _time(extras: Extras) -> Section:
    rows = [(name, f"{share:.1%}") for name, share in extras.shares.items()]
    table = Table("Share of the training time", ("callback", "share"), rows) if rows else None
    return Section("time", "Time of callbacks", [], [], table)


def _chart(
    title: str,
    lines: list[Line],
    *,
    marks: tuple[int, ...] = (),
    level: tuple[float, str] | None = None,
    can_be_log: bool = True,
) -> Chart:
    kept = tuple(line for line in lines if line.series.count)
    return Chart(title, kept, level=level, marks=marks, can_be_log=can_be_log)


def _maybe(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1e}"
