"""Types and shapes checked at run time.

pytest's option `--jaxtyping-packages` decorates every function of the packages with `jaxtyping.jaxtyped`, which binds the arguments,
opens a scope for the sizes of axes and checks the arguments twice: 40 % of the time of these tests, mostly for functions that name no
shape. `install` leaves the scope to the functions that do; beartype checks the types of all of them, as before, once.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from functools import partial
from inspect import isfunction, isgeneratorfunction
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_LIBRARYS_OWN = jaxtyping.jaxtyped
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
    decorated.__annotations__ = {name: resolved(said, decorated.__globals__) for name, said in decorated.__annotations__.items()}
    checked = _CHECKED(decorated)
    names_a_shape = any("jaxtyping." in repr(said) for said in decorated.__annotations__.values())
    return _LIBRARYS_OWN(checked, typechecker=None) if names_a_shape else checked


def install() -> None:
    """To be called before the packages are imported."""
    jaxtyping.jaxtyped = jaxtyped
