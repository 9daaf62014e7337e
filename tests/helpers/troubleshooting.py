"""Prints docs/troubleshooting.md: every status, cause, warning and error of the package, and what to do about it.

python -m tests.helpers.troubleshooting > docs/troubleshooting.md

The messages are read from the source. What a message does not say stands in tests/helpers/troubleshooting_words.py.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args

import lightning_ifthpo
from lightning_ifthpo.callbacks.summary import Verdict
from lightning_ifthpo.core.graph import SecondDerivativeError
from lightning_ifthpo.solvers import Status
from lightning_ifthpo.solvers.causes import Cause
from tests.helpers import troubleshooting_words as words
from tests.helpers.troubleshooting_words import Explanation

PACKAGE = Path(lightning_ifthpo.__file__).parent

# Functions that tell people something, and which of their arguments is the message. The last two are our own.
TELLERS = {
    "rank_zero_warn": 0,
    "rank_zero_info": 0,
    "info": 0,
    "rank_zero_deprecation": 0,
    "warn": 0,
    "warning": 0,
    "_warn_once": 0,
    "_skip": 1,
}
# Functions that return what others put into a warning or into the summary. Each text of them is a message.
PHRASES = {
    "runtime.verification": ("warning", ("_doubts",)),
    "callbacks.outer_level": ("warning", ("doubt",)),
    "callbacks.summary": ("summary", ("judge", "_risen", "_learned_by_heart", "remarks", "_of_examples")),
}
_FIELD = re.compile("‹[^›]*›")
_SECOND = "SecondDerivativeError", "AsymmetricCurvatureError"


@dataclass(frozen=True)
class Message:
    """What the package can say.

    Attributes:
        module: The module that says it, below the package, such as "runtime.advice".
        kind: "warning", "notice", "summary", or the name of an exception.
        text: The words, with fields as ‹name›.
    """

    module: str
    kind: str
    text: str


def messages() -> list[Message]:
    """Returns every message of the package, in the order of modules and lines, each once."""
    found: dict[Message, None] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for message in messages_of(path.read_text(encoding="utf-8"), module):
            found[message] = None
    return list(found)


def messages_of(source: str, module: str) -> Iterator[Message]:
    """Yields the messages of a module's source.

    Raises:
        LookupError: If a message has no words of its own, and SAID_ELSEWHERE does not say where its words are.
    """
    tree = ast.parse(source)
    for scope, node in _nodes(tree, None):
        for kind, expression, ending in _told(node, scope, module):
            names = _Names(tree, scope if expression is not node else None)  # the texts of a phrase come one by one
            for text in _texts(expression, names):
                whole = " ".join((text + ending).split())
                if _FIELD.sub("", text).strip(" :;.,()"):
                    yield Message(module, kind, whole)
                elif (module, whole) not in words.SAID_ELSEWHERE:
                    raise LookupError(
                        f"{module}, line {node.lineno}: {whole!r} has no words to be found by. If they stand "
                        "elsewhere, name it in SAID_ELSEWHERE of tests/helpers/troubleshooting_words.py; if the "
                        "function around it tells what it is given, name that in TELLERS of "
                        "tests/helpers/troubleshooting.py"
                    )


_Function = ast.FunctionDef | None


def _nodes(node: ast.AST, scope: _Function) -> Iterator[tuple[_Function, ast.AST]]:
    """Yields all nodes below one, in the order of the source, each with the function around it."""
    for child in ast.iter_child_nodes(node):
        yield scope, child
        if not isinstance(child, ast.JoinedStr):  # its parts are no texts of their own
            yield from _nodes(child, child if isinstance(child, ast.FunctionDef) else scope)


def _told(node: ast.AST, scope: _Function, module: str) -> Iterator[tuple[str, ast.expr, str]]:
    """Yields kind, message and ending of what a node says: a raised error, a warning, or a phrase of one."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        kind = ast.unparse(node.exc.func)
        yield kind, node.exc.args[0], f"; {_advice(node.exc)}" if kind in _SECOND else ""
    elif isinstance(node, ast.Call) and _called(node) in TELLERS and len(node.args) > TELLERS[_called(node)]:
        expression = node.args[TELLERS[_called(node)]]
        parameters = [] if scope is None else [argument.arg for argument in scope.args.args]
        passes_on = isinstance(expression, ast.Name) and expression.id in parameters
        if not (passes_on and scope is not None and scope.name in TELLERS):
            yield "notice" if _called(node).endswith("info") else "warning", expression, ""
    elif isinstance(node, (ast.JoinedStr, ast.Constant)) and scope is not None:
        kind, functions = PHRASES.get(module, ("", ()))
        if scope.name in functions and _is_phrase(node, scope):
            yield kind, node, ""


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _is_phrase(node: ast.expr, scope: ast.FunctionDef) -> bool:
    """Returns whether a node is a text of several words that is no docstring."""
    parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return "".join(parts).count(" ") >= 4 and getattr(node, "value", None) != ast.get_docstring(scope, clean=False)


def _advice(call: ast.Call) -> str:
    """Returns the advice of a SecondDerivativeError."""
    given = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "advice")]
    default = inspect.signature(SecondDerivativeError).parameters["advice"].default
    return _texts(given[0], _Names(ast.Module([], []), None))[0] if given else default


class _Names:
    """What the names in a function stand for, if they stand for a text."""

    def __init__(self, tree: ast.Module, scope: _Function) -> None:
        self._tree, self._scope = tree, scope

    def __getitem__(self, name: str) -> list[str]:
        places = [node for node in (self._scope, self._tree) if node is not None]
        for place in places:
            body = ast.walk(place) if isinstance(place, ast.FunctionDef) else place.body
            texts: list[str] = []
            for node in body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                if not any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    continue
                if isinstance(node, ast.Assign) and _is_text(node.value):
                    texts = _texts(node.value, self)
                elif isinstance(node, ast.AugAssign) and texts:
                    texts = [left + right for left, right in product(texts, _texts(node.value, self))]
            if any(texts):
                return texts
        return [f"‹{name}›"]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, (ast.JoinedStr, ast.Constant, ast.IfExp)) and any(
        isinstance(part, ast.JoinedStr) or (isinstance(part, ast.Constant) and isinstance(part.value, str))
        for part in ast.walk(node)
    )


def _texts(node: ast.expr, names: _Names) -> list[str]:
    """Returns the texts that an expression can stand for, with fields as ‹name›."""
    match node:
        case ast.Constant(value=str() as text):
            return [text]
        case ast.JoinedStr(values=parts):
            return list(map("".join, product(*(_texts(part, names) for part in parts))))
        case ast.FormattedValue(value=ast.Name(id=name)):
            texts = names[name]
            return texts if len(texts) == 1 and _FIELD.sub("", texts[0]).count(" ") > 4 else [f"‹{name}›"]
        case ast.FormattedValue(value=ast.IfExp(orelse=ast.JoinedStr() as text)):
            return _texts(text, names)
        case ast.FormattedValue(value=ast.Call() as call) if ast.unparse(call).startswith("Cause."):
            return _texts(call, names)
        case ast.FormattedValue(value=value):
            return [f"‹{_field(value)}›"]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return list(map("".join, product(_texts(left, names), filter(None, _texts(right, names)))))
        case ast.IfExp(body=body, orelse=other):
            return [*_texts(body, names), *_texts(other, names)]
        case ast.Call(func=ast.Attribute(value=value, attr="format")):
            return [re.sub(r"{(\w+)[^}]*}", r"‹\1›", text) for text in _texts(value, names)]
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr=name), attr="describe")):
            return [cause_text(Cause[name])]
        case ast.Name(id=name):
            return names[name]
    return [f"‹{_field(node)}›"]


def _field(node: ast.expr) -> str:
    """Returns a short name for what an f-string fills in."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr="value" | "__name__" | "__qualname__" | "shape"):
            return _field(value)
        case ast.Attribute(attr=name):
            return name.strip("_")
        case ast.Subscript(slice=ast.Constant(value=str() as name)):
            return name
        case ast.Subscript(value=value) | ast.BoolOp(values=[value, *_]) | ast.IfExp(body=value):
            return _field(value)
        case ast.GeneratorExp(elt=value) | ast.ListComp(elt=value) | ast.UnaryOp(operand=value):
            return _field(value)
        case ast.Call(func=ast.Attribute(attr="join"), args=[value, *_]):
            return _field(value)
        case ast.Call(func=ast.Attribute(value=value, attr="splitlines" | "removeprefix")):
            return _field(value)
        case ast.Call(func=ast.Attribute(value=value), args=[]):
            return _field(value)
        case ast.Call(func=ast.Name(id="len"), args=[value]):
            return f"number of {_field(value)}"
        case ast.Call(func=ast.Name(id="type"), args=[value]):
            return f"class of {_field(value)}"
        case ast.Call(func=ast.Name(id="float" | "str" | "tuple" | "list" | "sorted" | "map" | "min"), args=values):
            return _field(values[-1])
        case ast.Call(func=ast.Name(id=name)):
            return name.strip("_")
    return ast.unparse(node)


def cause_text(cause: Cause) -> str:
    """Returns title and meaning of a cause, with fields as ‹name›."""
    return re.sub(r"{(\w+)}", r"‹\1›", f"{cause.title}: {cause.meaning}")


def explained(
    found: Iterable[Message], explanations: Iterable[Explanation], where: str
) -> list[tuple[Explanation, list[Message]]]:
    """Returns each explanation with the messages that it explains, in the order of the explanations.

    Raises:
        LookupError: If a message has no explanation or several, or an explanation has no message.
    """
    pairs = [(explanation, list[Message]()) for explanation in explanations]
    for message in found:
        own = [list_ for explanation, list_ in pairs if explanation.matches(message.text)]
        if len(own) != 1:
            number = "no explanation" if not own else f"{len(own)} explanations"
            raise LookupError(
                f"{message.module} says {message.text!r}, which has {number}. Add one Explanation, whose `words` occur "
                f"in it, to {where} of tests/helpers/troubleshooting_words.py, and run "
                "python -m tests.helpers.troubleshooting > docs/troubleshooting.md"
            )
        own[0].append(message)
    unused = [explanation.words for explanation, list_ in pairs if not list_]
    if unused:
        raise LookupError(
            f"nothing in the package says {unused[0]!r}; change or remove its Explanation in {where} of "
            "tests/helpers/troubleshooting_words.py"
        )
    return pairs


def symptoms() -> str:
    """Returns a row for each symptom."""
    return _table(("symptom", "look first at", "what it usually is"), words.SYMPTOMS)


def statuses() -> str:
    """Returns a row for each status."""
    rows = [
        (_code(status.value), "made" if status.succeeded else "skipped", *words.STATUSES[status.name])
        for status in Status
    ]
    return _table(("status", "hyper step", "what it means", "what to do"), rows)


def causes() -> str:
    """Returns a row for each cause."""
    titles = {cause: re.sub(r"{(\w+)}", r"‹\1›", re.sub(r" ?\(.*", "", cause.title)) for cause in Cause}
    rows = [(f"**{title}**", *words.CAUSES[cause.name]) for cause, title in titles.items()]
    return _table(("the diagnosis says", "where you meet it", "try first"), rows)


def summary(found: Sequence[Message]) -> str:
    """Returns a row for each verdict, and one for each sentence of the summary."""
    verdict_rows = [(f"**{verdict}**", *words.VERDICTS[verdict]) for verdict in get_args(Verdict)]
    sentences = explained(_of_kind(found, "summary"), words.SUMMARY, "SUMMARY")
    rows = [("<br>".join(_codes(some)), entry.meaning, entry.remedy) for entry, some in sentences]
    return "\n\n".join(
        [
            _table(("verdict", "what it rests on", "what to do"), verdict_rows),
            _table(("the summary says", "what it means", "what to do"), rows),
        ]
    )


def warnings(found: Sequence[Message]) -> str:
    """Returns a section for each group of warnings, and in it an entry for each."""
    all_entries = [entry for group in words.WARNINGS.values() for entry in group]
    told = dict(explained(_of_kind(found, "warning", "notice"), all_entries, "WARNINGS"))
    parts = []
    for title, group in words.WARNINGS.items():
        parts.append(f"### {title}")
        for entry in group:
            quoted = "\n>\n".join(f"> {text}" for text in _codes(told[entry]))
            parts += [quoted, f"{entry.meaning} **To do:** {entry.remedy}"]
    return "\n\n".join(parts)


def errors(found: Sequence[Message]) -> str:
    """Returns a table of errors for each folder of the package."""
    raised = [message for message in found if message.kind not in ("warning", "notice", "summary")]
    remarked = [message for message in raised if any(entry.matches(message.text) for entry in words.ERRORS)]
    remarks = {
        message: entry.meaning for entry, some in explained(remarked, words.ERRORS, "ERRORS") for message in some
    }
    folders: dict[str, list[tuple[str, ...]]] = {}
    for message in raised:
        folder, _, file = message.module.rpartition(".")
        row = (_code(message.text), _code(message.kind), _code(file), remarks.get(message, ""))
        folders.setdefault(folder or "the mixin and the rest", []).append(row)
    columns = ("message", "type", "file", "what else to know")
    return "\n\n".join(f"### {folder}\n\n{_table(columns, rows)}" for folder, rows in folders.items())


def page() -> str:
    """Returns the page of the documentation."""
    found = messages()
    parts = [
        "# When something looks wrong",
        "Find your symptom in the first table. Then come all statuses, causes, verdicts, warnings and errors of the "
        "package, each with what it means. ‹Angle marks› stand for what a message fills in, so search this page for "
        "the words between them. Made by `python -m tests.helpers.troubleshooting` from the source and from "
        "`tests/helpers/troubleshooting_words.py`.",
        symptoms(),
        "## Statuses",
        'How a solve ended: `result.status`, and in a fit the word after "ended with status". A hyper step whose '
        'solve failed is skipped, unless `on_failure` is "use" or "raise".',
        statuses(),
        "## Causes",
        "A status says how a solve ended, and a diagnosis says why, with numbers: `result.diagnosis`, and in a fit the "
        "end of the warning. [Diagnoses](diagnoses.md) has the meaning and all remedies of each, and situations in "
        "which it was tested. What follows helps to recognize your case.",
        causes(),
        "## The summary",
        "At the end of a fit the console shows `callback.summary()`. "
        "[Predicted and confirmed](theory.md#predicted-and-confirmed) are explained in the theory.",
        summary(found),
        "## Warnings",
        "Most are told once in a fit, and by the first process alone. Some are notices, which Lightning prints "
        'without the word "Warning". An entry that begins with … is a part of a longer message.',
        warnings(found),
        "## Errors",
        "`ValueError` is a wrong value and `TypeError` a wrong type. `SecondDerivativeError` (with "
        "`AsymmetricCurvatureError`) says that torch cannot differentiate the loss twice, `HypergradientMismatchError` "
        "that a check has failed, and `NoLossError` that training skips the batch. The tables have a row for each "
        "message, by folder of the package.",
        errors(found),
    ]
    return "\n\n".join(parts) + "\n"


def _of_kind(found: Iterable[Message], *kinds: str) -> list[Message]:
    return [message for message in found if message.kind in kinds]


def _codes(some: Iterable[Message]) -> list[str]:
    """Returns the texts of messages, each once, as code. A phrase may begin inside of another message."""
    texts = [re.sub("^‹told› |^(?=[a-z])", "… ", each.text) if _is_part(each) else each.text for each in some]
    return [_code(text) for text in dict.fromkeys(texts)]


def _is_part(message: Message) -> bool:
    return message.kind == PHRASES.get(message.module, ("",))[0]


def _code(text: str) -> str:
    mark = "``" if "`" in text else "`"
    return f"{mark}{text}{mark}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    print(page(), end="")


if __name__ == "__main__":
    main()
