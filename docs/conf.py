"""How the site is built: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

from __future__ import annotations

import builtins
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from sphinx_gallery.sorting import FileNameSortKey

import lightning_ifthpo

project = "lightning_ifthpo"
author = "The lightning_ifthpo developers"
release = version = lightning_ifthpo.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "benchmarks", "auto_examples/*.ipynb"]
html_theme = "furo"
html_title = "lightning_ifthpo"
html_static_path: list[str] = []
html_show_copyright = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # the gallery's sort key is a class, which cannot be pickled

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autoclass_content = "both"
napoleon_use_ivar = True
napoleon_use_rtype = False

# Links into other documentations need the network. Without it the names stand there without links.
if os.environ.get("DOCS_ONLINE"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
        "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable", None),
    }


def name_file(gallery: object, path: str) -> None:
    """Gives an example its `__file__`, which the gallery leaves out: a name that a module lacks is looked up there."""
    builtins.__file__ = str(Path(__file__).parents[1] / "examples" / Path(path).name)  # type: ignore[attr-defined]


sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["auto_examples"],
    "filename_pattern": r"\.py$",  # all are run
    "ignore_pattern": r"__init__|experiments",
    "nested_sections": False,
    "within_subsection_order": FileNameSortKey,
    "reset_modules": ("matplotlib", name_file),
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "capture_repr": (),
    "write_computation_times": False,
    "plot_gallery": os.environ.get("DOCS_EXAMPLES", "run") == "run",  # DOCS_EXAMPLES=skip builds in seconds
}

torch.set_num_threads(1)  # the examples are small, and threads would wait for each other
warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def escaped(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Makes |x| in a docstring an absolute value, and *shape the argument that it is."""
    lines[:] = [line if "``" in line else re.sub(r"(\||(?<=[ \[])\*(?=\w))", r"\\\1", line) for line in lines]


def setup(app: Any) -> None:
    """Connects what Sphinx has no option for."""
    app.connect("autodoc-process-docstring", escaped)
