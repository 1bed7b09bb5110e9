"""Types and shapes checked at run time.

pytest's option `--jaxtyping-packages` decorates every function of the packages with `jaxtyping.jaxtyped`, which binds the arguments,
opens a scope for the sizes of axes and checks the arguments twice: 40 % of the time of these tests, mostly for functions that name no
shape. `install` leaves the scope to the functions that do, without binding the arguments, which is only for messages; beartype checks the
types of all of them, as before, once.

Shapes are a matter of the code, not of how often it runs: of each function the first calls in each test are checked. A function inside
another one is made anew whenever the outer one is called, and to decorate it takes longer than most of its calls: the first one that is
made is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial, wraps
from inspect import isfunction, isgeneratorfunction
from types import CodeType
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_LIBRARYS_OWN = jaxtyping.jaxtyped
_CHECKED_INSIDE: set[CodeType] = set()
CHECKED_CALLS = 3  # of each function in each test
_checked_calls: dict[int, int] = {}  # of this test, by function
_checked_enough: set[int] = set()
_SCOPE = jaxtyping.jaxtyped("context")
_CHECKED = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation says; Any where it names what only type checkers import or what is defined later, as jaxtyping has it."""

    def function() -> None: ...

    function.__annotations__ = {"annotation": annotation}
    try:
        return get_type_hints(function, names, include_extras=True)["annotation"]
    except Exception:
        return Any


def jaxtyped(decorated: Any = None, *, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped` as the import hook calls it."""
    if decorated is None:
        return partial(jaxtyped, typechecker=typechecker)
    if isinstance(decorated, type):
        if is_dataclass(decorated) and "__init__" in vars(decorated):
            decorated.__init__ = jaxtyped(decorated.__init__, typechecker=typechecker)  # type: ignore[misc]
        return decorated
    if not isfunction(decorated) or isgeneratorfunction(decorated):  # what a generator is given is checked when it begins, elsewhere
        return _LIBRARYS_OWN(decorated, typechecker=typechecker)
    if "<locals>" in decorated.__qualname__:
        if decorated.__code__ in _CHECKED_INSIDE:
            return decorated
        _CHECKED_INSIDE.add(decorated.__code__)
    decorated.__annotations__ = {name: resolved(said, decorated.__globals__) for name, said in decorated.__annotations__.items()}
    checked = _CHECKED(decorated)
    names_a_shape = any("jaxtyping." in repr(said) for said in decorated.__annotations__.values())
    return first_calls(in_scope(checked) if names_a_shape else checked, decorated)


def in_scope(checked: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a scope of its own for the sizes of axes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _SCOPE:
            return checked(*args, **kwargs)

    return call


def first_calls(checked: Callable[..., Any], unchecked: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is checked in its first calls of each test, and is then called as it is."""
    number = id(unchecked)

    @wraps(unchecked)
    def call(*args: Any, **kwargs: Any) -> Any:
        if number in _checked_enough:
            return unchecked(*args, **kwargs)
        _checked_calls[number] = n_calls = _checked_calls.get(number, 0) + 1
        if n_calls == CHECKED_CALLS:
            _checked_enough.add(number)
        return checked(*args, **kwargs)

    return call


def begin_test() -> None:
    """The first calls are those from here on."""
    _checked_calls.clear()
    _checked_enough.clear()


def install() -> None:
    """To be called before the packages are imported."""
    jaxtyping.jaxtyped = jaxtyped
