"""Atlas: for every unit of some components its best contexts in a corpus, by relevance and by activation; one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Int, Num
from safetensors.torch import save_file
from torch import Tensor

from analyses.components import Node, parse_node
from analyses.contexts.extremes import NOTHING
from analyses.output_files import MARK
from lens_relevance.errors import RelevanceError
from lens_relevance.tensor_files import read_tensors
from lens_relevance.whole_files import write_whole

By = Literal["relevance", "activation"]
RANKINGS = ("relevance_highest", "relevance_lowest", "activation_highest", "activation_lowest")
_FORMAT = "lens_relevance atlas 1"


@dataclass(frozen=True, eq=False)
class Atlas:
    """The best contexts of units in a corpus.

    Attributes:
        units: (component, layer) -> how many units it has, in the order of the rows of the tensors.
        rankings: by name (`RANKINGS`): score, other, position, window, each [unit, k]; see `extremes.Extreme`.
        numbers, tokens, lengths, predicted: the windows that are named: their numbers in the corpus [n], ids [n, pos], how many of these
            are real [n], and the token that the model predicts behind each [n].
        strings: what the tokens are in text, by id.
        info: model, rules, corpus, and how many windows and tokens were read.
    """

    units: dict[tuple[str, int], int]
    rankings: dict[str, dict[str, Num[Tensor, "unit k"]]]
    numbers: Int[Tensor, " n"]
    tokens: Int[Tensor, "n pos"]
    lengths: Int[Tensor, " n"]
    predicted: Int[Tensor, " n"]
    strings: dict[int, str]
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: how much it holds."""
        k = next(iter(self.rankings.values()))["score"].shape[1]
        read = f"{self.info.get('windows')} windows"
        return f"Atlas({sum(self.units.values())} units of {self.info.get('model')}, {k} contexts each way, {read})"

    def contexts(self, unit: str, *, by: By = "relevance", lowest: bool = False) -> pd.DataFrame:
        """The best contexts of a unit (`L9N1841`, `L11H3`).

        Args:
            by: "relevance": to the model's own prediction behind the window, summed over positions, in logits of the prediction less its
                runner-up. "activation": the largest one in the window (of a head: the norm of z).
            lowest: those with the lowest score, first the lowest.

        Returns:
            A row per context: rank, relevance, activation, position and token (where the unit scores most), context (the token between «
            and »), predicted (the token that the unit spoke for, or against), window (its number in the corpus).

        Raises:
            RelevanceError: the atlas does not hold this unit.
        """
        row, name = self.row(unit), f"{by}_{'lowest' if lowest else 'highest'}"
        if name not in self.rankings:
            raise RelevanceError(f"contexts are ordered by relevance or activation, not {by!r}")
        found = {key: values[row] for key, values in self.rankings[name].items()}
        rows = []
        for rank, number in enumerate(found["window"].tolist(), 1):
            if number == NOTHING:
                break
            at, position = self._window(number), int(found["position"][rank - 1])
            ids = self.tokens[at, : int(self.lengths[at])].tolist()
            left, here, right = (
                "".join(self.strings[i] for i in part) for part in (ids[:position], ids[position : position + 1], ids[position + 1 :])
            )
            score, other = float(found["score"][rank - 1]), float(found["other"][rank - 1])
            relevance, activation = (score, other) if by == "relevance" else (other, score)
            rows.append(
                {
                    "rank": rank,
                    "relevance": relevance,
                    "activation": activation,
                    "position": position,
                    "token": here,
                    "context": f"{left}«{here}»{right}",
                    "predicted": self.strings[int(self.predicted[at])],
                    "window": number,
                }
            )
        return pd.DataFrame(rows, columns=["rank", "relevance", "activation", "position", "token", "context", "predicted", "window"])

    def window(self, number: int) -> Int[Tensor, " pos"]:
        """The tokens of a window by its number in the corpus."""
        at = self._window(number)
        return self.tokens[at, : int(self.lengths[at])]

    def row(self, unit: str) -> int:
        """A unit's row in the tensors.

        Raises:
            RelevanceError: the atlas does not hold the unit.
        """
        node, start = parse_node(unit), 0
        index = node.neuron if node.neuron is not None else node.head
        for (component, layer), count in self.units.items():
            if (component, layer) == (node.component, node.layer) and index is not None and index < count and node.position is None:
                return start + index
            start += count
        held = ", ".join(f"{component} of layer {layer} ({count})" for (component, layer), count in self.units.items())
        raise RelevanceError(f"this atlas does not hold {unit}; it holds {held}")

    def names(self) -> list[str]:
        """All units, in the order of the rows."""
        made = {"neurons": lambda layer, i: Node("neurons", layer, neuron=i), "heads": lambda layer, i: Node("heads", layer, head=i)}
        return [str(made[component](layer, i)) for (component, layer), count in self.units.items() for i in range(count)]

    def _window(self, number: int) -> int:
        return int(torch.searchsorted(self.numbers, number))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (no pickle)."""
        tensors = {f"{name}/{key}": values for name, ranking in self.rankings.items() for key, values in ranking.items()}
        tensors |= {name: getattr(self, name) for name in ("numbers", "tokens", "lengths", "predicted")}
        described = {
            "generator": MARK,
            "format": _FORMAT,
            "units": [[*key, count] for key, count in self.units.items()],
            "strings": self.strings,
            "info": self.info,
        }
        metadata = {"atlas": json.dumps(described)}  # one entry: the library writes several in an order of its own, another each time
        whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        write_whole(path, lambda beside: save_file(whole, str(beside), metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Atlas:
        """Read what `save` wrote.

        Raises:
            RelevanceError: the file cannot be read, is damaged, or was written by something else.
        """

        def build(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Atlas:
            described = json.loads(metadata.get("atlas", "{}"))
            if described.get("format") != _FORMAT:
                raise RelevanceError(f"{path} is no atlas; build_atlas makes one")
            return _from_parts(cls, tensors, described)

        return read_tensors(path, "an atlas", build)


def _from_parts(kind: type[Atlas], tensors: Mapping[str, Tensor], described: dict[str, Any]) -> Atlas:
    rankings = {name: {key: tensors[f"{name}/{key}"] for key in ("score", "other", "position", "window")} for name in RANKINGS}
    units = {(str(component), int(layer)): int(count) for component, layer, count in described["units"]}
    if any(len(values) != sum(units.values()) for ranking in rankings.values() for values in ranking.values()):
        raise ValueError("its rankings have another number of units than it says")
    named = torch.cat([ranking["window"].flatten() for ranking in rankings.values()])
    if not torch.isin(named[named != NOTHING], tensors["numbers"]).all():
        raise ValueError("it names windows that it does not hold")
    strings = {int(number): str(text) for number, text in described["strings"].items()}
    windows = {name: tensors[name] for name in ("numbers", "tokens", "lengths", "predicted")}
    return kind(units, rankings, **windows, strings=strings, info=described["info"])
