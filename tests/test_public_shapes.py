"""Public functions, classes and fields say the shapes of their tensors: a jaxtyping annotation whose axes the glossary explains."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tests.test_site import PUBLIC, documented

GLOSSARY = Path(__file__).parents[1] / "docs" / "glossary.md"
SPECIAL = ("__init__", "__call__", "__getitem__", "__iter__")


def public_objects() -> dict[str, object]:
    """Functions and classes of the public face by their names."""
    return {f"{module}.{name}": value for module in PUBLIC for name, value in documented(module)}


def annotated(name: str, value: object) -> Iterator[tuple[str, Any]]:
    """What has annotations of its own: a function; a class, and the methods and properties of it and of what it derives from here."""
    if inspect.isfunction(value):
        yield name, inspect.unwrap(value)
    elif inspect.isclass(value):
        for base in value.__mro__:
            if base.__module__.split(".")[0] not in ("lens_relevance", "analyses", "tests"):
                continue
            yield name, base
            for key, item in vars(base).items():
                item = item.__func__ if isinstance(item, classmethod | staticmethod) else item
                item = item.fget if isinstance(item, property) else item.func if isinstance(item, cached_property) else item
                if inspect.isfunction(item) and (not key.startswith("_") or key in SPECIAL):
                    yield f"{name}.{key}", inspect.unwrap(item)


def types_in(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of, those inside unions, containers and functions included."""
    if isinstance(annotation, list | tuple):
        for part in annotation:
            yield from types_in(part)
    elif typing.get_origin(annotation) is typing.Literal:
        return
    elif arguments := typing.get_args(annotation):
        yield from types_in(arguments)
    else:
        yield annotation


def tensors(objects: dict[str, object]) -> Iterator[tuple[str, Any]]:
    """Every tensor that an annotation speaks of, with the name of the parameter, field or "return"."""
    seen = set()
    for full_name, value in objects.items():
        for name, item in annotated(full_name, value):
            if id(item) in seen:
                continue
            seen.add(id(item))
            own = vars(item).get("__annotations__", {}) if inspect.isclass(item) else item.__annotations__
            known = vars(sys.modules[item.__module__])
            for parameter, annotation in own.items():
                if not (inspect.isclass(item) and parameter.startswith("_")) and "ClassVar" not in str(annotation):
                    parts = types_in(eval(annotation, known) if isinstance(annotation, str) else annotation)
                    yield from ((f"{name}: {parameter}", part) for part in parts if part is Tensor or is_shaped(part))


def is_shaped(part: Any) -> bool:
    return hasattr(part, "dim_str")


def without_shape(objects: dict[str, object]) -> list[str]:
    return [name for name, part in tensors(objects) if part is Tensor or "..." in part.dim_str.split()]


def axes(objects: dict[str, object]) -> dict[str, str]:
    """Names of axes, without the signs of jaxtyping for "any number" and "not compared", and where each is used."""
    found: dict[str, str] = {}
    for name, part in tensors(objects):
        if part is not Tensor:
            found |= {axis.lstrip("*_#"): name for axis in part.dim_str.split() if not axis.isdigit()}
    return found


def explained() -> set[str]:
    text = GLOSSARY.read_text(encoding="utf-8").split("## Axes")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {axis for row in rows for axis in re.findall(r"`(\w+)`", row)}


def test_every_public_tensor_has_a_shape() -> None:
    objects = public_objects()
    assert len([*tensors(objects)]) > 500
    assert not without_shape(objects)


def test_the_glossary_explains_every_axis_and_no_other() -> None:
    used = axes(public_objects())
    assert not {axis: where for axis, where in used.items() if axis not in explained()}
    assert not explained() - set(used)


def of_a_list(masks: Sequence[Tensor | None], scores: Float[Tensor, "batch pos"]) -> None: ...
def of_a_function(function: Callable[[Tensor], Float[Tensor, "batch pos"]]) -> None: ...
def of_any_shape(mask: Float[Tensor, " ..."]) -> None: ...
def right(mask: Float[Tensor, "batch nonsense"] | None) -> Float[Tensor, "*batch 1"]: ...  # type: ignore[empty-body]


class Holder:
    """Of tests."""

    field: dict[str, Tensor]
    _private: Tensor

    @property
    def shown(self) -> Tensor: ...  # type: ignore[empty-body]

    def __call__(self, x: Tensor) -> None: ...

    def _own(self, x: Tensor) -> None: ...


def test_tensors_without_a_shape_are_found_wherever_they_stand() -> None:
    bad: dict[str, object] = {"list": of_a_list, "function": of_a_function, "any": of_any_shape, "right": right, "Holder": Holder}
    assert without_shape(bad) == [
        "list: masks",
        "function: function",
        "any: mask",
        "Holder: field",
        "Holder.shown: return",
        "Holder.__call__: x",
    ]
    assert set(axes({"right": right})) == {"batch", "nonsense"} and "nonsense" not in explained()
