"""Tensors by HookPoint name, under any of its names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lens_relevance.errors import NotKeptError


class NamedTensors(dict[str, Tensor]):
    """A dict by canonical name that is also read by the other names of a HookPoint (`blocks.1.attn.hook_z`).

    Args:
        tensors: By canonical name.
        aliases: From any name to the canonical one.
    """

    def __init__(self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self._aliases = aliases

    def __missing__(self, name: str) -> Tensor:
        canonical = self._aliases.get(name, name)
        if canonical == name or canonical not in self:
            raise NotKeptError(f"{name} was not kept; add names_filter={name!r} to propagate")
        return self[canonical]
