"""English prose that every CPython carries: the help topics, and the docstrings of the standard library."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path
from pydoc_data import topics

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
SHORTEST = 200
"""Characters. Shorter docstrings are labels more than prose."""


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST:
                yield text


@cache
def python_documents() -> list[str]:
    """About 1.5 MB of English; the same for the same CPython release."""
    documents = [cleandoc(topics.topics[name]) for name in sorted(topics.topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(library).parts):
            try:
                documents += _docstrings(path)
            except (SyntaxError, ValueError):
                continue  # templates and test data that are not Python
    return list(dict.fromkeys(documents))


def python_text() -> str:
    """The same as one text, documents parted by blank lines."""
    return "\n\n\n".join(python_documents())
