"""RelevanceCache: activations, coefficients and relevance by HookPoint name, read like an ActivationCache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.utilities import get_act_name

from lens_relevance.errors import NotKeptError, RelevanceError
from lens_relevance.rules.base import difference, share


@dataclass
class RelevanceCache(Mapping[str, Tensor]):
    """What one backward pass delivered at the HookPoints that were asked for.

    `cache[name]` is relevance: activation x coefficient, or (activation - reference activation) x coefficient where there is a reference;
    in the layout of an ActivationCache ([batch, pos, head, d_head] at hook_z). Names may be aliases (`blocks.0.attn.hook_z`), canonical
    names (`blocks.0.attn.o.hook_in`) or short forms as in ActivationCache (`cache["z", 0]`). Units are those of the target.

    value: the target [batch]; reference_value: the same on the reference run, or None. input_tokens: token ids, mask: 1 where real.
    layout: names by role: embeddings (tokens first), residual (complete cuts), z, neurons.
    info: model name, dtype, ruleset, target, reference and versions.
    """

    activations: dict[str, Tensor]
    coefficients: dict[str, Tensor]
    value: Float[Tensor, " batch"]
    logits: Float[Tensor, "batch pos vocab"]
    input_tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    layout: dict[str, list[str]]
    aliases: dict[str, str]
    info: dict[str, str]
    reference_activations: dict[str, Tensor] = field(default_factory=dict)
    reference_value: Float[Tensor, " batch"] | None = None
    averaged: dict[str, Tensor] = field(default_factory=dict)  # relevance averaged over several references, where a product would be wrong
    absent: dict[str, str] = field(default_factory=dict)  # why a HookPoint that was asked for by a predicate is not here
    account: pd.DataFrame | None = None

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

    def __getitem__(self, name: str | tuple[Any, ...]) -> Tensor:
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

    @property
    def n_layers(self) -> int:
        return max(len(self.layout["residual"]) - 1, 0)

    def _named(self, role: str) -> list[str]:
        """HookPoints that play a role in this model's layout."""
        if not self.layout[role]:
            raise NotKeptError(f"no HookPoints are known as this model's {role}; name them in declare_sites({role}=...), or read by name")
        return self.layout[role]

    def tokens(self) -> Float[Tensor, "batch pos"]:
        """Relevance of each token, at its embedding."""
        return self[self._named("embeddings")[0]].sum(-1)

    def positions(self) -> Float[Tensor, "batch pos"]:
        """Relevance of each learned position embedding (token types, where there are any, included)."""
        if len(self.layout["embeddings"]) < 2:
            raise NotKeptError("this model has no learned position embeddings")
        return torch.stack([self[name].sum(-1) for name in self.layout["embeddings"][1:]]).sum(0)

    def residual(self) -> Float[Tensor, "batch pos layers"]:
        """Relevance at each block's resid_pre and at the final residual; its sum over positions accounts for the target layer by layer."""
        return torch.stack([self[name].sum(-1) for name in self._named("residual")], -1)

    def heads(self) -> Float[Tensor, "batch pos layer head"]:
        """Relevance of each head's output z."""
        return torch.stack([self[name].sum(-1) for name in self._named("z")], 2)

    def neurons(self, layer: int) -> Float[Tensor, "batch pos d_mlp"]:
        """Relevance of the MLP neurons (after the activation) of a layer."""
        if not -self.n_layers <= layer < self.n_layers:
            raise RelevanceError(f"layer {layer} is out of range: the model has {self.n_layers} layers")
        return self[self._named("neurons")[layer]]

    def conservation(self) -> pd.DataFrame:
        """Where the target's value went, one row per example and layer: see lens_relevance.audit."""
        if self.account is None:
            raise NotKeptError("the account was not kept; pass audit=True to propagate")
        return self.account.copy()

    def to_frame(self) -> pd.DataFrame:
        """Long table with columns example, name, position, head (-1 where there is none), relevance (summed over features)."""
        parts = []
        for name in self:
            relevance = self[name]
            if relevance.ndim < 3 or relevance.shape[:2] != self.mask.shape:
                continue  # patterns and scores have two positions; read them by name
            summed = relevance.sum(-1).unsqueeze(-1) if relevance.ndim == 3 else relevance.sum(-1)
            index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in summed.shape], indexing="ij")).flatten(1)
            frame = pd.DataFrame(index.T.numpy(), columns=["example", "position", "head"])
            frame.insert(1, "name", name)
            frame["head"] = -1 if relevance.ndim == 3 else frame["head"]
            frame["relevance"] = summed.flatten().double().cpu().numpy()
            parts.append(frame)
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["example", "name", "position", "head", "relevance"])

    def to_activation_cache(self, model: Any = None) -> Any:
        """The relevance as a TransformerLens ActivationCache, for its own tools."""
        from transformer_lens import ActivationCache

        kept = {name: self[name] for name in self}
        return ActivationCache(kept | {alias: kept[name] for alias, name in self.aliases.items() if name in kept}, model)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (no pickle)."""
        tensors = {"value": self.value, "logits": self.logits, "input_tokens": self.input_tokens, "mask": self.mask}
        if self.reference_value is not None:
            tensors["reference_value"] = self.reference_value
        for group in _GROUPS:
            tensors |= {f"{group}/{name}": tensor for name, tensor in getattr(self, group).items()}
        meta = {"layout": self.layout, "aliases": self.aliases, "info": self.info, "absent": self.absent}
        account = "" if self.account is None else self.account.to_json(orient="split", double_precision=15)
        contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, str(path), metadata={"lens_relevance": json.dumps(meta), "account": account})

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> RelevanceCache:
        """Read what `save` wrote."""
        with safe_open(str(path), framework="pt", device=device) as file:
            header = file.metadata() or {}
            if "lens_relevance" not in header:
                raise RelevanceError(f"{path} was not written by RelevanceCache.save")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
        for name in [n for n in tensors if "/" in n]:
            group, _, point = name.partition("/")
            groups[group][point] = tensors.pop(name)
        account = None
        if header.get("account"):
            split = json.loads(header["account"])
            account = pd.DataFrame(split["data"], columns=split["columns"])
        return cls(**groups, **tensors, **json.loads(header["lens_relevance"]), account=account)  # type: ignore[arg-type]


_GROUPS = ("activations", "coefficients", "reference_activations", "averaged")
