"""What code asks or does of which a graph sees nothing: comparisons by ``is``, ``type()``, caught errors."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from types import CodeType

__all__ = [
    "asks_for_classes",
    "asks_for_types",
    "catches_at",
    "compares_arguments",
    "compares_by_is",
    "compares_results",
]

_SILENT = ("CACHE", "EXTENDED_ARG", "NOT_TAKEN")
_LOCAL = ("LOAD_FAST", "LOAD_DEREF")
_STORED = ("STORE_FAST", "STORE_DEREF")
_CLASS_NAMES = frozenset({"isinstance", "issubclass", "is_tensor", "__class__"})
_FIXED = ("LOAD_CONST", "LOAD_GLOBAL", "LOAD_SMALL_INT", "LOAD_COMMON_CONSTANT")


@functools.cache
def compares_by_is(code: CodeType, of_none: bool) -> bool:
    """Whether the code compares something by ``is``; with None, only where ``of_none``.

    >>> compares_by_is((lambda x: x is True).__code__, of_none=False)
    True
    """
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    if of_none and any(name.endswith("_NONE") for name, _ in steps):  # a jump
        return True
    with_none = ("LOAD_CONST", None)
    return any(two[0] == "IS_OP" and (of_none or one != with_none) for one, two in pairwise(steps))


@functools.cache
def compares_results(code: CodeType) -> bool:
    """Whether ``is`` is asked of what the code computes, not only of arguments and of attributes of ``self``.

    Also in functions and comprehensions inside of it.

    >>> compares_results((lambda f, x: f(x) is None).__code__)
    True
    >>> compares_results((lambda f, x: x[0] is None).__code__)
    False
    """
    steps = [step for step in dis.get_instructions(code) if step.opname not in _SILENT]
    kept = [
        index for index, step in enumerate(steps) if step.opname.startswith(("STORE_FAST", "STORE_DEREF"))
    ]
    stored = {name for index in kept if not _is_at_hand(steps, index) for name in _names(steps[index])}
    if any(names is None or names & stored for names in _compared(steps)):
        return True
    return any(compares_results(part) for part in code.co_consts if isinstance(part, CodeType))


def _is_at_hand(steps: list[dis.Instruction], index: int) -> bool:
    """Whether a constant, an attribute of ``self`` or what a loop goes through is stored at this step."""
    names, _ = _operand(steps, index)
    if names is not None:
        return names <= {"self"}
    start = _before(steps, index, ("STORE", "UNPACK"))
    if steps[start].opname == "FOR_ITER":
        return True
    start = _before(steps, index, ("CALL", "PRECALL", "LOAD_CONST"))
    of_self = steps[start].opname.startswith(_LOCAL) and _names(steps[start]) == {"self"}
    return of_self and steps[_before(steps, start, ("PUSH_NULL",))].argval == "getattr"


def _before(steps: list[dis.Instruction], end: int, kinds: tuple[str, ...]) -> int:
    """The last step before ``end`` that is of none of these kinds."""
    start = end - 1
    while steps[start].opname.startswith(kinds):
        start -= 1
    return start


@functools.cache
def asks_for_types(code: CodeType) -> bool:
    """Whether it asks for the ``type()`` of anything but ``self`` and its attributes.

    >>> asks_for_types((lambda x: type(x) is int).__code__)
    True
    """
    steps = [step for step in dis.get_instructions(code) if step.opname not in (*_SILENT, "PUSH_NULL")]
    asked = (two for one, two in pairwise(steps) if one.opname == "LOAD_GLOBAL" and one.argval == "type")
    return any(step.opname.startswith(_LOCAL) and not _names(step) <= {"self", "cls"} for step in asked)


@functools.cache
def asks_for_classes(code: CodeType) -> bool:
    """Whether it asks for classes itself; functions of C ask, too, in the name of the code that calls them.

    >>> asks_for_classes((lambda x: isinstance(x, int)).__code__)
    True
    """
    if not _CLASS_NAMES.isdisjoint(code.co_names):
        return True
    return any(step.opname.startswith("MATCH_") for step in dis.get_instructions(code))


@functools.cache
def _caught(code: CodeType) -> list[range]:
    """The lines inside of ``try`` with an ``except``."""
    tries = [node for node in ast.walk(_tree(code)) if isinstance(node, ast.Try) and node.handlers]
    bodies = [(part.lineno - 1, part.end_lineno or 0) for node in tries for part in node.body]
    return [range(code.co_firstlineno + first, code.co_firstlineno + last) for first, last in bodies]


def catches_at(code: CodeType, line: int) -> bool:
    """Whether an error at this line of its file is caught in the same function."""
    return any(line in lines for lines in _caught(code))


@functools.cache
def _tree(code: CodeType) -> ast.AST:
    """The syntax tree of a function; an empty one where its source is not at hand."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError, TypeError):
        return ast.Module([], [])


@functools.cache
def compares_arguments(code: CodeType) -> bool:
    """Whether ``is`` asks if an argument is an attribute of ``self``, or a text.

    >>> compares_arguments((lambda self, x: x is self.proto).__code__)
    True
    >>> compares_arguments((lambda self, x, y: x is y or self.proto is None).__code__)
    False
    """
    steps = [step for step in dis.get_instructions(code) if step.opname not in _SILENT]
    given = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) - {"self"}
    for index in (index for index, step in enumerate(steps) if step.opname == "IS_OP"):
        right, start = _operand(steps, index)
        left, last = _operand(steps, start)[0], steps[index - 1]
        foreign = {"self"} in (left, right) or (last.opname == "LOAD_CONST" and isinstance(last.argval, str))
        if foreign and given & ((left or set()) | (right or set())):
            return True
    return False


def _compared(steps: list[dis.Instruction]) -> Iterator[set[str] | None]:
    """The local names from which each side is read; None where it is computed on the spot."""
    for index, step in enumerate(steps):
        if step.opname == "IS_OP":
            names, start = _operand(steps, index)
            yield names
            yield _operand(steps, start)[0]
        elif step.opname.endswith("_NONE"):  # a jump
            yield _operand(steps, index)[0]


def _operand(steps: list[dis.Instruction], end: int) -> tuple[set[str] | None, int]:
    """The names of the operand that is complete before the step ``end``, and where it begins."""
    start = end - 1
    while steps[start].opname == "LOAD_ATTR":
        start -= 1
    step = steps[start]
    if step.opname == "BINARY_SUBSCR" or (step.opname == "BINARY_OP" and step.argrepr == "[]"):
        return _operand(steps, _operand(steps, start)[1])
    if step.opname.startswith(_LOCAL):
        return _names(step), start
    return (set() if step.opname.startswith(_FIXED) else None), start


def _names(step: dis.Instruction) -> set[str]:
    return set(step.argval) if isinstance(step.argval, tuple) else {step.argval}
