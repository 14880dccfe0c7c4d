"""Checks `_target_` nodes against the constructors they name, without importing anything heavy.

A node's keys are its constructor's arguments, so the constructor's signature is the node's schema. Our own modules are
read as source, so that a typo is found before torch is imported; classes of other packages are looked at when the run
imports them anyway.
"""

import ast
import importlib
import inspect
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from edge_glass.config import ConfigError

PACKAGE = __name__.split(".")[0]
HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


@dataclass
class Argument:
    """One argument of a constructor: its annotation (None: unknown) and whether it must be given."""

    annotation: ast.expr | None
    required: bool


@dataclass
class Signature:
    """A constructor's arguments; `open` ones take any further keyword."""

    arguments: dict[str, Argument]
    open: bool


def check_targets(node: Any, key: str = "", foreign: bool = False) -> None:
    """Check every `_target_` node below `node`.

    Args:
        node: plain containers, as `OmegaConf.to_container` gives them.
        key: where `node` stands in the config, for messages.
        foreign: also import and check targets outside this package.

    Raises:
        ConfigError: a target that does not exist, an argument it does not take, one that is missing, or a value of
            another type than the constructor names.
    """
    if isinstance(node, list):
        for place, child in enumerate(node):
            check_targets(child, f"{key}[{place}]", foreign)
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        _check_node(node, key, foreign)
    for name, child in node.items():
        check_targets(child, f"{key}.{name}" if key else str(name), foreign)


def _check_node(node: dict[str, Any], key: str, foreign: bool) -> None:
    target = node["_target_"]
    if not isinstance(target, str):
        raise ConfigError(f"{key}._target_={target!r}: give the full name of a class or function")
    own = target.split(".")[0] == PACKAGE
    if not own and not foreign:
        return
    signature = _own_signature(target, key) if own else _foreign_signature(target, key)
    given = {name: value for name, value in node.items() if name not in HYDRA_KEYS}
    unknown = [name for name in given if name not in signature.arguments]
    if unknown and not signature.open:
        known = sorted(signature.arguments)
        close = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{key}.{unknown[0]}: {target} takes no such argument; it takes {known}.{hint}")
    missing = [name for name, argument in signature.arguments.items() if argument.required and name not in given]
    if missing and not node.get("_partial_"):
        raise ConfigError(f"{key}: {target} also needs {missing}")
    for name, value in given.items():
        argument = signature.arguments.get(name)
        if argument and argument.annotation is not None and not _fits(value, argument.annotation):
            wanted = ast.unparse(argument.annotation)
            raise ConfigError(f"{key}.{name}={value!r}: {target} wants {wanted}, not {type(value).__name__}")


def _own_signature(target: str, key: str) -> Signature:
    """The signature of `module.Class`, `module.function` or `module.Class.classmethod`, from the source."""
    parts = target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        tree = _source(".".join(parts[:split]))
        if tree is None:
            continue
        body: list[ast.stmt] = tree.body
        found: ast.stmt | None = None
        for name in parts[split:]:
            found = next((s for s in body if isinstance(s, ast.ClassDef | ast.FunctionDef) and s.name == name), None)
            if found is None:
                names = [s.name for s in body if isinstance(s, ast.ClassDef | ast.FunctionDef) and s.name[0] != "_"]
                if not names:  # a package: its __init__ is a docstring
                    raise ConfigError(f"{key}._target_={target!r}: there is no module {name!r} in that package")
                raise ConfigError(f"{key}._target_={target!r}: no {name!r} there; there are {names}")
            body = getattr(found, "body", [])
        if isinstance(found, ast.ClassDef):
            return _class_signature(found)
        assert isinstance(found, ast.FunctionDef)
        return _from_arguments(found.args, skip=1 if len(parts) - split > 1 else 0)
    raise ConfigError(f"{key}._target_={target!r}: there is no such module")


def _class_signature(found: ast.ClassDef) -> Signature:
    for statement in found.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return _from_arguments(statement.args, skip=1)
    attributes = [s for s in found.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
    return Signature(
        {s.target.id: Argument(s.annotation, s.value is None) for s in attributes if isinstance(s.target, ast.Name)},
        open=False,
    )


def _from_arguments(arguments: ast.arguments, skip: int) -> Signature:
    named = [*arguments.posonlyargs, *arguments.args]
    required = len(named) - len(arguments.defaults)
    found = {a.arg: Argument(a.annotation, place < required) for place, a in enumerate(named) if place >= skip}
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[argument.arg] = Argument(argument.annotation, default is None)
    return Signature(found, open=arguments.kwarg is not None)


def _foreign_signature(target: str, key: str) -> Signature:
    module, _, name = target.rpartition(".")
    try:
        called = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_={target!r} cannot be imported: {error}") from error
    parameters = inspect.signature(called).parameters.values()
    kinds = inspect.Parameter
    return Signature(
        {
            p.name: Argument(None, p.default is kinds.empty)
            for p in parameters
            if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        },
        open=any(p.kind is kinds.VAR_KEYWORD for p in parameters),
    )


@cache
def _source(module: str) -> ast.Module | None:
    # By its place among the files: importlib would import what comes before the last dot.
    place = Path(__file__).parents[1].joinpath(*module.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Whether a plain config value can be what the annotation says; what it cannot judge fits."""
    if isinstance(value, dict) and "_target_" in value:
        return True  # becomes an object that only the constructor can judge
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.Name(id="str"):
            return isinstance(value, str)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return value in ast.literal_eval(choices if isinstance(choices, ast.Tuple) else ast.Tuple([choices]))
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return isinstance(value, list) and all(_fits(element, item) for element in value)
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, item])):
            return isinstance(value, dict) and all(_fits(element, item) for element in value.values())
        case ast.Attribute() | ast.Name():
            # a built object is wanted: null and plain values cannot be one
            return (not isinstance(value, int | float | bool | str | list) and value is not None) or _is_any(annotation)
    return True


def _is_any(annotation: ast.expr) -> bool:
    return ast.unparse(annotation) in ("Any", "object")
