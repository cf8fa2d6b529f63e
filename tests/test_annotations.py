"""Public functions state all their types.

Ruff's ANN001 cannot check it: the rule includes private and nested functions.
"""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / "diffusion_jax"


def public_functions(body):
    """Yields the public functions of a module's body and the public methods of its public classes."""
    for node in body:
        is_public = not getattr(node, "name", "_").startswith("_")
        if isinstance(node, ast.ClassDef) and is_public:
            yield from public_functions(node.body)
        elif isinstance(node, ast.FunctionDef) and (is_public or node.name in ("__init__", "__call__")):
            yield node


def missing_annotations(source):
    """Yields "line function: argument" for each missing annotation; `__init__` needs none for its result."""
    for function in public_functions(ast.parse(source).body):
        a = function.args
        arguments = [x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x]
        missing = [x.arg for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
        missing += ["return"] if function.returns is None and function.name != "__init__" else []
        yield from (f"{function.lineno} {function.name}: {name}" for name in missing)


def test_missing_annotations_are_recognised():
    source = """
def f(a, b: int, *c, d, **e) -> int: ...
def _f(a): ...
class A:
    def __init__(self, a): ...
    @classmethod
    def g(cls) -> int:
        def nested(a): ...
    @property
    def h(self): ...
class _B:
    def g(self): ...
"""
    assert list(missing_annotations(source)) == [
        "2 f: a",
        "2 f: d",
        "2 f: c",
        "2 f: e",
        "5 __init__: a",
        "10 h: return",
    ]


def test_public_functions_are_annotated():
    files = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "running" / "hosts.py" in files
    missing = [
        f"{file.relative_to(PACKAGE)}:{line}" for file in files for line in missing_annotations(file.read_text())
    ]
    assert not missing, "\n".join(missing)
