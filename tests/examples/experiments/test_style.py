"""The pictures can be read at the width of a page, without colours too."""

import importlib
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from examples.experiments import style
from examples.experiments.common import read
from examples.experiments.pictures import DRAWN

ROLES = {name: role for name, role in vars(style).items() if isinstance(role, style.Role)}
# Machado, Oliveira and Fernandes (2009), table 1, full severity; for linear RGB.
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of sRGB


def lab(linear):
    """The coordinates of a colour in CIELAB, where a distance of 2.3 is just noticeable."""
    x, y, z = np.cbrt(TO_XYZ @ linear / TO_XYZ.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", [np.eye(3), DEUTERANOPIA], ids=["all colours", "deuteranopia"])
def test_colours_of_roles_stay_apart(seen):
    linear = {name: ((np.array(to_rgb(role.color)) + 0.055) / 1.055) ** 2.4 for name, role in ROLES.items()}
    colors = {name: lab((seen @ color).clip(0, 1)) for name, color in linear.items()}
    distances = {pair: np.linalg.norm(colors[pair[0]] - colors[pair[1]]) for pair in combinations(colors, 2)}
    assert min(distances.values()) > 10, min(distances, key=distances.get)


@pytest.mark.parametrize("name", [name for name, key in DRAWN.items() if key in read(name)])
def test_no_text_is_too_small_on_a_page(name):
    with style.styled():
        figure = importlib.import_module(f"examples.experiments.{name}").draw(read(name))
        pixels = 800 / figure.get_figwidth() / 72  # for each point of a picture that is 800 pixels wide
        sizes = {text.get_text(): text.get_fontsize() * pixels for text in figure.findobj(Text) if text.get_text()}
    assert min(sizes.values()) >= 9, min(sizes, key=sizes.get)


def test_matplotlib_stays_as_it_was():
    before = dict(mpl.rcParams)
    with style.styled():
        assert mpl.rcParams["font.size"] == style.STYLE["font.size"]
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("seeds", [1, 3])
def test_spreads_are_drawn_where_there_are_several_seeds(seeds):
    panel = Figure().subplots()
    by_seed = torch.arange(2.0 * seeds).view(seeds, 2)
    style.curve(panel, [0, 1], by_seed, style.OURS)
    assert panel.lines[0].get_ydata().tolist() == by_seed.mean(0).tolist()
    assert [
        (band.get_datalim(panel.transData).y0, band.get_datalim(panel.transData).y1) for band in panel.collections
    ] == ([(0.0, 5.0)] if seeds == 3 else [])
    row = Figure().subplots()
    style.dots(row, 2.0, by_seed[:, 0].tolist(), style.PLAIN)
    assert [line.get_xdata().tolist() for line in row.lines] == ([[0.0, 2.0, 4.0], [2.0]] if seeds == 3 else [[0.0]])


def test_a_page_has_the_common_width_and_says_what_it_shows():
    figure = style.page(3.0, "one finding")
    assert figure.get_size_inches().tolist() == [style.WIDTH, 3.0]
    assert figure.get_suptitle() == "one finding"


def test_rows_are_named_from_top_to_bottom():
    panel = Figure().subplots()
    style.name_rows(panel, ["first", "second"])
    heights = {
        label.get_text(): height for label, height in zip(panel.get_yticklabels(), panel.get_yticks(), strict=True)
    }
    assert heights == {"first": 0, "second": 1}
    assert panel.yaxis_inverted()
