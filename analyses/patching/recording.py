"""One run of the model, kept so that patched runs can go on from the middle of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from analyses.components import COMPONENTS
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.metrics import by_position
from lens_relevance.logit_reading import logits_at

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Recording:
    """A run of the model without patches.

    Attributes:
        tokens, mask: what it ran on, [n, pos]; the mask is None where every token is real.
        logits: [n, pos, d_vocab], at `columns` where these are given; of a classifier [n, 1, class].
        values: activation of each (component, layer) asked for, as its HookPoint shows it.
        calls: (args, kwargs) with which each block was called; empty if not asked for. The first argument is the residual stream.
        cache: keys and values of every layer, where the model keeps them as Hugging Face models do.
    """

    tokens: Int[Tensor, "n pos"]
    mask: Int[Tensor, "n pos"] | None
    logits: Float[Tensor, "n column d_vocab"]
    values: dict[tuple[str, int], Tensor]
    calls: list[Call]
    cache: DynamicCache | None
    columns: Int[Tensor, " column"] | None = None

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

    @property
    def n_pos(self) -> int:
        """Number of positions."""
        return self.tokens.shape[1]

    def resid_pre(self, layer: int) -> Float[Tensor, "n pos d_model"]:
        """The residual stream with which block `layer` was called."""
        args, kwargs = self.calls[layer]
        return args[0] if args else kwargs["hidden_states"]

    def call(self, layer: int, rows: Int[Tensor, " rows"], positions: slice, *, cache: DynamicCache | None) -> Call:
        """The rest of the arguments of block `layer` for a batch of these `rows` at these `positions`, with this cache of earlier ones.

        Returns:
            (args after the residual stream, kwargs without it).
        """
        args, kwargs = self.calls[layer]
        rest = tuple(self._fit(value, rows, positions, cache) for value in args[1:])
        return rest, {name: self._fit(value, rows, positions, cache) for name, value in kwargs.items() if name != "hidden_states"}

    def prefix(self, layer: int, rows: Int[Tensor, " rows"], start: int, *, into: DynamicCache) -> DynamicCache:
        """`into`, an empty cache, with the keys and values before `start`: a block adds to the cache it is given."""
        assert self.cache is not None, "a run can only go on from a position if its keys and values were kept"
        kept = self.cache.layers[layer]
        assert isinstance(kept, DynamicLayer) and kept.keys is not None and kept.values is not None
        DynamicCache.update(into, take_rows(kept.keys, rows)[:, :, :start], take_rows(kept.values, rows)[:, :, :start], layer)
        return into

    def _fit(self, value: Any, rows: Tensor, positions: slice, cache: DynamicCache | None) -> Any:
        """An argument of a block for other rows and positions: masks, position ids, rotary tables, the cache."""
        if isinstance(value, tuple):
            return tuple(self._fit(item, rows, positions, cache) for item in value)
        if value is not None and value is self.cache:
            return cache
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 4 and value.shape[2] == self.n_pos:  # attention mask [n or 1, head or 1, query, key]: all keys stay
            value = value[:, :, positions]
        elif value.ndim in (2, 3) and value.shape[1] == self.n_pos:  # position ids, rotary tables
            value = value[:, positions]
        elif value.ndim == 1 and value.shape[0] == self.n_pos:
            value = value[positions]
        if value.ndim >= 2 and value.shape[0] == self.n:
            return take_rows(value, rows)
        if value.ndim == 3 and value.shape[0] % self.n == 0:  # ALiBi slopes [n * head, 1, key]
            return take_rows(value.unflatten(0, (self.n, -1)), rows).flatten(0, 1)
        return value


def take_rows(value: Tensor, rows: Int[Tensor, " rows"]) -> Tensor:
    """Rows of a tensor on whatever device its layer is on."""
    return value[rows.to(value.device)]


def forward(
    model: TransformerBridge,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
    columns: Int[Tensor, " column"] | None = None,
    **kwargs: Any,
) -> Float[Tensor, "batch column d_vocab"]:
    """Logits of the whole model at some positions (None: at all); those of a classifier, [batch, class], at one."""
    if mask is not None:
        kwargs["attention_mask"] = mask
    kwargs.setdefault("use_cache", False)
    with logits_at(model, None if columns is None else columns.expand(len(tokens), -1), tokens.shape[1]):
        logits = model(tokens, **kwargs)
    return by_position(logits)


def record(
    model: TransformerBridge,
    tokens: Int[Tensor, "n pos"],
    mask: Int[Tensor, "n pos"] | None,
    *,
    wanted: Sequence[tuple[str, int]],
    with_calls: bool = False,
    columns: Int[Tensor, " column"] | None = None,
) -> Recording:
    """Run the model once and keep the activations of each (component, layer) in `wanted`.

    Args:
        columns: the positions at which logits are computed; None: all.
        with_calls: also keep what is needed to go on from any block: how each block was called, and its keys and values.

    Raises:
        RelevanceError: a HookPoint that was asked for does not fire.
    """
    values: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]) -> Any:
        def hook_fn(value: Tensor, hook: Any) -> None:
            values[key] = value.detach()

        return COMPONENTS[key[0]].read_at(key[1]), hook_fn

    with model.hooks(fwd_hooks=[keep(key) for key in wanted]):
        if with_calls:
            logits, calls, cache = _forward_with_calls(model, tokens, mask, columns)
        else:
            logits, calls, cache = forward(model, tokens, mask, columns), [], None
    for component, layer in wanted:
        if (component, layer) not in values:
            point = COMPONENTS[component].read_at(layer)
            raise RelevanceError(
                f"{component!r} of block {layer} never fires in this model ({point} is not part of its forward pass), so it can be neither "
                "read nor patched"
            )
    return Recording(tokens, mask, logits, values, calls, cache, columns)


def _forward_with_calls(
    model: TransformerBridge, tokens: Tensor, mask: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, list[Call], DynamicCache | None]:
    """Logits, how each block was called, and keys and values where the model can keep them."""
    calls: list[Call] = []

    def keep(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in model.blocks]
    try:
        cache = DynamicCache()
        try:
            logits = forward(model, tokens, mask, columns, past_key_values=cache, use_cache=True)
        except (TypeError, ValueError, AttributeError, NotImplementedError):
            pass  # this family does not take such a cache
        else:
            kept = [layer.keys for layer in cache.layers if isinstance(layer, DynamicLayer)]
            if len(kept) == len(model.blocks) and all(keys is not None and keys.shape[2] == tokens.shape[1] for keys in kept):
                return logits, calls, cache
        calls.clear()
        return forward(model, tokens, mask, columns), calls, None
    finally:
        for handle in handles:
            handle.remove()
