"""RelevanceCache: activations, coefficients and relevance by HookPoint name, read like an ActivationCache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformer_lens.utilities import get_act_name

from lens_relevance.cache_files import load_cache, save_cache
from lens_relevance.errors import NotKeptError, RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.named_tensors import NamedTensors
from lens_relevance.notebook_form import cache_html, token_strings
from lens_relevance.rules.base import difference, share


@dataclass
class RelevanceCache(Mapping[str, Float[Tensor, "*_hook"]]):
    """What one backward pass delivered at the HookPoints that were asked for.

    `cache[name]` is relevance: activation x coefficient, or (activation - reference activation) x coefficient where there is a reference;
    in the layout of an ActivationCache ([batch, pos, head, d_head] at hook_z). Names may be aliases (`blocks.0.attn.hook_z`), canonical
    names (`blocks.0.attn.o.hook_in`) or short forms as in ActivationCache (`cache["z", 0]`). Units are those of the target.

    value: the target [batch]; reference_value: the same on the reference run, or None. logits: those that the target reads, at
    logit_positions [batch, read]; at all positions where `unembed.hook_out` was asked for (a classifier's have none).
    input_tokens: the ids whose logits are explained, mask: 1 where real; masks: the same by stack; arguments: what the model was called
    with by keyword, if it was.
    stacks: names by stack and role (embeddings, residual, z, neurons). A decoder has one stack, `tokens`; an encoder-decoder has `encoder`,
    `decoder` and `cross`, and the methods below then ask for one: `cache.heads(stack="cross")`.
    grid: rows and columns of an image's patches.
    info: model name, dtype, ruleset, target, reference and versions.
    tokenizer: the model's, for words in pictures; None where it has none, and after `load`.
    dictionaries: relevance of features, errors and skip connections, which `features`, `error` and `skip` read.
    """

    activations: dict[str, Shaped[Tensor, "*_hook"]]
    coefficients: dict[str, Float[Tensor, "*_hook"]]
    value: Float[Tensor, " batch"]
    logits: Float[Tensor, "batch *read d_vocab"]
    input_tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    stacks: dict[str, dict[str, list[str]]]
    aliases: dict[str, str]
    info: dict[str, str]
    masks: dict[str, Int[Tensor, "batch _pos"]] = field(default_factory=dict)
    arguments: dict[str, Shaped[Tensor, "*_input"]] = field(default_factory=dict)
    reference_activations: dict[str, Shaped[Tensor, "*_hook"]] = field(default_factory=dict)
    reference_value: Float[Tensor, " batch"] | None = None
    # relevance averaged over several references, where a product would be wrong
    averaged: dict[str, Float[Tensor, "*_hook"]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # why a HookPoint that was asked for by a predicate is not here
    account: pd.DataFrame | None = None
    logit_positions: Int[Tensor, "batch read"] | None = None
    grid: tuple[int, int] | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)
    dictionaries: dict[str, Float[Tensor, "*_written"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("activations", "coefficients", "reference_activations"):
            setattr(self, name, NamedTensors(getattr(self, name), self.aliases))

    def __repr__(self) -> str:
        """One line: what was explained, and how much of it is here."""
        values = ", ".join(f"{value:.4g}" for value in self.value[:3].tolist()) + (", ..." if len(self.value) > 3 else "")
        against = "" if self.reference_value is None else f", against {self.info.get('reference', 'a reference')!r}"
        return (
            f"RelevanceCache({self.info.get('ruleset', '')}: {self.info.get('target', 'target')} = {values}{against}; "
            f"{len(self.coefficients)} HookPoints, {len(self.value)} example(s) of {self.input_tokens.shape[1]} positions)"
        )

    def _repr_html_(self) -> str:
        return cache_html(self)

    def token_strings(self, example: int = 0) -> list[str]:
        """The tokens of an example as text, one string per position, padding included.

        Raises:
            NotKeptError: the model has no tokenizer, or the cache was read from a file.
        """
        if self.tokenizer is None:
            raise NotKeptError("this cache knows no tokenizer (the model has none, or the cache was loaded): use model.to_str_tokens")
        return token_strings(self.tokenizer, self.input_tokens[example])

    def canonical(self, name: str | tuple[Any, ...]) -> str:
        """The canonical name of something that was kept; raises NotKeptError and says what to ask for."""
        full = get_act_name(*name) if isinstance(name, tuple) else name
        canonical = self.aliases.get(full, full)
        if canonical in self.coefficients:
            return canonical
        if canonical in self.absent:
            raise NotKeptError(f"{full}: {self.absent[canonical]}")
        if canonical not in self.aliases.values():
            raise NotKeptError(f"there is no HookPoint {full!r} on this model")
        raise NotKeptError(
            f"{full} was not kept; add names_filter={full!r} (or a list, or a predicate that holds for {canonical!r}) to propagate"
        )

    def __getitem__(self, name: str | tuple[Any, ...]) -> Float[Tensor, "*_hook"]:
        canonical = self.canonical(name)
        if canonical in self.averaged:
            return self.averaged[canonical]
        return share(difference(self.activations[canonical], self.reference_activations.get(canonical)), self.coefficients[canonical])

    def __contains__(self, name: object) -> bool:
        try:
            self.canonical(name)  # type: ignore[arg-type]
        except NotKeptError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.coefficients)

    def __len__(self) -> int:
        return len(self.coefficients)

    def _roles(self, stack: str | None) -> dict[str, list[str]]:
        """HookPoint names by role of a stack; the only one, where none is named."""
        if stack is None and len(self.stacks) > 1:
            raise RelevanceError(
                f"this model has the stacks {', '.join(self.stacks)}: say which, as in .heads(stack={next(iter(self.stacks))!r})"
            )
        if stack is not None and stack not in self.stacks:
            raise RelevanceError(f"this model has no stack {stack!r}; it has {', '.join(self.stacks)}")
        return self.stacks[next(iter(self.stacks)) if stack is None else stack]

    def _named(self, role: str, stack: str | None) -> list[str]:
        """HookPoints that play a role in a stack."""
        names = self._roles(stack)[role]
        if not names:
            where = "this model's" if stack is None else f"the {stack}'s"
            raise NotKeptError(f"no HookPoints are known as {where} {role}; name them in declare_sites({role}=...), or read by name")
        return names

    @property
    def n_layers(self) -> int:
        """Layers of a model with one stack."""
        return max(len(self._roles(None)["residual"]) - 1, 0)

    def tokens(self, stack: str | None = None) -> Float[Tensor, "batch pos"]:
        """Relevance of each token (of an image: each patch, the class token first), at its embedding."""
        return self[self._named("embeddings", stack)[0]].sum(-1)

    def patches(self) -> Float[Tensor, "batch rows columns"]:
        """Relevance of each patch of an image, in its place; class and distillation tokens are left out (see `tokens`)."""
        if self.grid is None:
            raise NotKeptError("patches are those of an image classifier (ViT); this model reads tokens: use .tokens()")
        rows, columns = self.grid
        return self.tokens()[:, -rows * columns :].unflatten(1, (rows, columns))

    def positions(self, stack: str | None = None) -> Float[Tensor, "batch pos"]:
        """Relevance of each learned position embedding (token types, where there are any, included)."""
        names = self._named("embeddings", stack)
        if len(names) < 2:
            raise NotKeptError("this model has no learned position embeddings of their own; those of an image are part of `tokens`")
        return torch.stack([self[name].sum(-1) for name in names[1:]]).sum(0)

    def residual(self, stack: str | None = None) -> Float[Tensor, "batch pos cut"]:
        """Relevance at each block's resid_pre and at the final residual; its sum over positions accounts for the target layer by layer.

        In an encoder-decoder a stack's residual is a part of a cut: see lens_relevance.sites.stacks.
        """
        return _stacked([self[name].sum(-1) for name in self._named("residual", stack)], -1)

    def heads(self, stack: str | None = None) -> Float[Tensor, "batch pos layer head"]:
        """Relevance of each head's output z."""
        return _stacked([self[name].sum(-1) for name in self._named("z", stack)], 2)

    def neurons(self, layer: int, stack: str | None = None) -> Float[Tensor, "batch pos d_mlp"]:
        """Relevance of the MLP neurons (after the activation) of a layer.

        Raises:
            RelevanceError: the layer is out of range.
        """
        names = self._named("neurons", stack)
        if not -len(names) <= layer < len(names):
            raise RelevanceError(f"layer {layer} is out of range: the model has {len(names)} layers")
        return self[names[layer]]

    def features(self, point: str) -> Float[Tensor, "batch pos feature"]:
        """Relevance of each feature of the dictionary that writes to a HookPoint, as a sparse tensor (of those that are on)."""
        return self._of_features(point, "relevance")

    def feature_activations(self, point: str) -> Float[Tensor, "batch pos feature"]:
        """The value of each of these features, as a sparse tensor with the same entries."""
        return self._of_features(point, "activation")

    def error(self, point: str) -> Float[Tensor, "batch pos"]:
        """Relevance of what the dictionaries that write to a HookPoint miss of what is there."""
        return self._of_dictionary(f"{self.aliases.get(point, point)}:error")

    def skip(self, point: str) -> Float[Tensor, "batch pos"]:
        """Relevance of what goes past a transcoder's features by its skip connection."""
        return self._of_dictionary(f"{self.aliases.get(point, point)}:skip")

    def _of_features(self, point: str, what: str) -> Tensor:
        name = f"{self.aliases.get(point, point)}:features"
        values = self._of_dictionary(f"{name}/{what}")
        size = self.dictionaries[f"{name}/size"].tolist()
        return torch.sparse_coo_tensor(self.dictionaries[f"{name}/index"], values, size, is_coalesced=True, check_invariants=False)

    def _of_dictionary(self, name: str) -> Tensor:
        if name not in self.dictionaries:
            point, _, what = name.split("/")[0].partition(":")
            kept = [n.split(":")[0] for n in self.dictionaries if n.split("/")[0].endswith(f":{what}")]
            there = f"; it was kept at {', '.join(dict.fromkeys(kept))}" if kept else ""
            raise NotKeptError(f"nothing was kept as {what} of {point}{there}; pass dictionaries=[...] that write there to propagate")
        return self.dictionaries[name]

    def conservation(self) -> pd.DataFrame:
        """Where the target's value went, one row per example and layer: see lens_relevance.conservation."""
        if self.account is None:
            raise NotKeptError("the account was not kept; pass audit=True to propagate")
        return self.account.copy()

    def to_frame(self) -> pd.DataFrame:
        """Long table with columns example, name, position, head (-1 where there is none), relevance (summed over features)."""
        parts = []
        for name in self:
            relevance = self[name]
            if relevance.ndim < 3 or len(relevance) != len(self.value) or name.endswith(_WITHOUT_POSITIONS):
                continue  # patterns and scores have two positions, rotated queries and keys have heads first; read them by name
            summed = relevance.sum(-1).unsqueeze(-1) if relevance.ndim == 3 else relevance.sum(-1)
            index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in summed.shape], indexing="ij")).flatten(1)
            frame = pd.DataFrame(index.T.numpy(), columns=["example", "position", "head"])
            frame.insert(1, "name", name)
            frame["head"] = -1 if relevance.ndim == 3 else frame["head"]
            frame["relevance"] = summed.flatten().double().cpu().numpy()
            parts.append(frame)
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["example", "name", "position", "head", "relevance"])

    def to_activation_cache(self, model: HookedModel | None = None) -> Any:
        """The relevance as a TransformerLens ActivationCache, for its own tools; most of these read the model's settings: give it."""
        from transformer_lens import ActivationCache

        kept = {name: self[name] for name in self}
        return ActivationCache(kept | {alias: kept[name] for alias, name in self.aliases.items() if name in kept}, model or _NoModel())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (no pickle)."""
        save_cache(self, path)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> RelevanceCache:
        """Read what `save` wrote.

        Raises:
            RelevanceError: the file cannot be read, is damaged, or was written by something else.
        """
        return load_cache(cls, path, device)


class _NoModel:
    """Where an ActivationCache looks for its model."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RelevanceError(
            f"this needs {name!r} of the model, which the ActivationCache was made without: cache.to_activation_cache(model)"
        )


def _stacked(parts: list[Tensor], dim: int) -> Tensor:
    """Layers side by side, where the first one is: they may be on several devices."""
    return torch.stack([part.to(parts[0].device) for part in parts], dim)


_WITHOUT_POSITIONS = ("hook_pattern", "hook_attn_scores", "hook_rot_q", "hook_rot_k")
