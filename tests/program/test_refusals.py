"""Every refusal says what is allowed, or how to go on."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((*ROOT.glob("fedmoe_jax/**/*.py"), *ROOT.glob("configs/*.py")))
REFUSALS = {"UserError", "refuse", "_fault", "_end_all"}
# Where no other value would do, a refusal says what to do instead.
HAND_ON = {"_fault", "add_notes"}  # they add the place, and notes on the data
WAYS_ON = ("allowed: ", "restore", "remove", "delete")


def find_strings(node, functions):
    """Text of an expression, and of what its names stand for in these functions."""
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    values = [node]
    for function in functions:
        for each in ast.walk(function):
            targets = getattr(each, "targets", [getattr(each, "target", None)])
            found = {t.id for t in targets if isinstance(t, ast.Name)}
            if isinstance(each, ast.Assign | ast.AugAssign) and found & names:
                values.append(each.value)
    constants = (each for value in values for each in ast.walk(value))
    return " ".join(
        each.value
        for each in constants
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    )


def take_texts(tree):
    """The texts that a file names, as a module of their own."""
    named = [x for x in tree.body if isinstance(x, ast.Assign)]
    return ast.Module([x for x in named if isinstance(x.value, ast.Constant)], [])


def find_refusals(tree, names):
    """Every call of these names, with the functions that it is in."""

    def visit(node, functions):
        if isinstance(node, ast.FunctionDef):
            functions = (*functions, node)
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in names and node.args:
                yield node, functions
        for child in ast.iter_child_nodes(node):
            yield from visit(child, functions)

    return list(visit(tree, ()))


def list_silent():
    """Places of refusals without a way on."""
    for path in SOURCES:
        # The program reads a ValueError of a config's file as a refusal.
        names = REFUSALS | ({"ValueError"} if "configs" in path.parts else set())
        tree = ast.parse(path.read_text())
        for node, functions in find_refusals(tree, names):
            function = functions[-1].name if functions else ""
            within = (*functions, take_texts(tree))
            text = " ".join(find_strings(each, within) for each in node.args)
            if function in HAND_ON or not text.strip():
                continue  # what another has to say
            if not any(way in text for way in WAYS_ON):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {function}: {text}"


def test_every_refusal_says_what_is_allowed():
    assert not list(list_silent())


@pytest.mark.parametrize(
    ("source", "silent"),
    [
        ("raise UserError(f'{name} is not allowed; it is a name')", 1),
        ("raise UserError(f'{name} is not allowed; allowed: a name')", 0),
        ("fault = 'bad; allowed: good'\n    raise UserError(f'{fault}, twice')", 0),
        ("raise UserError(str(error))", 0),
    ],
)
def test_a_silent_refusal_is_found(source, silent, tmp_path, monkeypatch):
    path = tmp_path / "source.py"
    path.write_text(f"def check(name):\n    {source}\n")
    monkeypatch.setitem(globals(), "SOURCES", [path])
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(list(list_silent())) == silent
