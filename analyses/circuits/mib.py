"""Circuits in the format of the Mechanistic Interpretability Benchmark (MIB, Mueller et al. 2025; that of EAP-IG): JSON and safetensors.

Nodes are `input`, `a3.h5`, `m3` and `logits`, edges `a3.h5->m4` and `input->a0.h0<q>`: queries, keys and values of each query head are
told apart. MIB's own second form is a pickle (`.pt`), which can run code when it is read; we write the same arrays as safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from safetensors.numpy import save_file
from torch import Tensor

from analyses.output_files import MARK
from lens_relevance.errors import RelevanceError
from lens_relevance.json_files import only, read_json
from lens_relevance.tensor_files import read_tensors
from lens_relevance.whole_files import write_whole

INPUT, LOGITS = "input", "logits"
_ARRAYS = ("edges_scores", "edges_in_graph", "nodes_scores", "nodes_in_graph")


@dataclass(frozen=True)
class MibModel:
    """The `cfg` of a file: what the names of nodes and edges follow from. parallel_attn_mlp: whether attention and MLP read one stream."""

    n_layers: int
    n_heads: int
    parallel_attn_mlp: bool
    d_model: int

    def nodes(self) -> list[str]:
        """Names of nodes in the order of computation, `logits` last."""
        layers = ([*(f"a{i}.h{h}" for h in range(self.n_heads)), f"m{i}"] for i in range(self.n_layers))
        return [INPUT, *(name for layer in layers for name in layer), LOGITS]

    def edges(self) -> list[str]:
        """Names of edges, those into one reader together."""
        return [f"{writer}->{reader}" for reader, writers in self._readers() for writer in writers]

    def _readers(self) -> Iterator[tuple[str, list[str]]]:
        """Each reader with the writers before it."""
        written = [INPUT]
        for i in range(self.n_layers):
            heads = [f"a{i}.h{h}" for h in range(self.n_heads)]
            for head in heads:
                yield from ((f"{head}<{letter}>", written) for letter in "qkv")
            yield f"m{i}", written if self.parallel_attn_mlp else written + heads
            written = [*written, *heads, f"m{i}"]
        yield LOGITS, written


@dataclass(frozen=True, eq=False)
class MibGraph:
    """Scores and membership of every node and edge, in the order of `MibModel.nodes` and `.edges`.

    Attributes:
        edge_scores, node_scores: NaN where there is no score. MIB reads a positive score as "towards the full model's answer".
        edges_kept, nodes_kept: `in_graph`, what belongs to the circuit.
    """

    model: MibModel
    edge_scores: Float[np.ndarray, " edge"]
    edges_kept: Bool[np.ndarray, " edge"]
    node_scores: Float[np.ndarray, " node"]
    nodes_kept: Bool[np.ndarray, " node"]

    def __post_init__(self) -> None:
        counts = {"edge": len(self.model.edges()), "node": len(self.model.nodes())}
        for kind, count in counts.items():
            for array in (getattr(self, f"{kind}_scores"), getattr(self, f"{kind}s_kept")):
                if array.shape != (count,):
                    raise RelevanceError(f"a model like this has {count} {kind}s, but there are {len(array)} values for them")


def write_mib(graph: MibGraph, path: str | Path) -> None:
    """Write a circuit as `.json` (what MIB's evaluation reads) or `.safetensors`.

    A JSON file holds scores of nodes or of edges only where there are any, so that a circuit without scores is MIB's membership file.

    Raises:
        RelevanceError: another ending, or the file cannot be written.
    """
    ending = Path(path).suffix.lower()
    if ending == ".safetensors":
        arrays = (graph.edge_scores, graph.edges_kept, graph.node_scores, graph.nodes_kept)
        metadata = {"format": "MIB circuit", "generator": MARK, "cfg": json.dumps(asdict(graph.model))}
        write_whole(path, lambda beside: save_file(dict(zip(_ARRAYS, arrays, strict=True)), str(beside), metadata=metadata))
        return
    if ending != ".json":
        raise RelevanceError(f"a MIB circuit is written as .json or .safetensors, not {ending or 'a file without an ending'!r}")
    content = {
        "cfg": asdict(graph.model),
        "nodes": _items(graph.model.nodes(), graph.node_scores, graph.nodes_kept),
        "edges": _items(graph.model.edges(), graph.edge_scores, graph.edges_kept),
    }
    write_whole(path, lambda beside: beside.write_text(json.dumps(content), encoding="utf-8"))


def read_mib(path: str | Path) -> MibGraph:
    """Read a circuit that MIB's or EAP-IG's code wrote as JSON, or what `write_mib` wrote.

    Raises:
        RelevanceError: not such a file: damaged, a pickle, unknown fields, nodes or edges that do not belong to the model it names, or one
            that tells neurons apart, which graphs of heads and MLPs do not.
    """
    if Path(path).suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    if Path(path).suffix.lower() in (".pt", ".pth", ".pkl"):
        raise RelevanceError(f"{path} is a pickle, which can run code when it is read; have it written as JSON (Graph.to_json)")
    content = only(read_json(path, "a MIB circuit"), str(path), needed=("cfg", "nodes", "edges"))
    model = _model(content["cfg"], str(path))
    nodes, edges = (
        _values(content[part], names, f"{path}: {part}") for part, names in (("nodes", model.nodes()), ("edges", model.edges()))
    )
    return MibGraph(model, edges[0], edges[1], nodes[0], nodes[1])


def _model(cfg: Any, where: str) -> MibModel:
    fields = {"n_layers": int, "n_heads": int, "parallel_attn_mlp": bool, "d_model": int}
    cfg = only(cfg, f"{where}: cfg", needed=tuple(fields))
    for name, kind in fields.items():
        if type(cfg[name]) is not kind or (kind is int and not 0 < cfg[name] <= 100_000):
            raise RelevanceError(f"{where}: cfg.{name} is {str(cfg[name])[:60]!r}, not {'true or false' if kind is bool else 'a count'}")
    if (cfg["n_layers"] * (cfg["n_heads"] + 1)) ** 2 > 10**8:
        raise RelevanceError(f"{where}: a model of {cfg['n_layers']} layers with {cfg['n_heads']} heads has too many edges to be listed")
    return MibModel(**cfg)


def _items(names: list[str], scores: np.ndarray, kept: np.ndarray) -> dict[str, dict[str, Any]]:
    if np.isnan(scores).all():
        return {name: {"in_graph": bool(inside)} for name, inside in zip(names, kept, strict=True)}
    rows = zip(names, scores.tolist(), kept.tolist(), strict=True)
    return {name: {"in_graph": inside} if math.isnan(score) else {"score": score, "in_graph": inside} for name, score, inside in rows}


def _values(part: Any, names: list[str], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and membership, by name."""
    part = only(part, where, needed=tuple(names))
    scores, kept = np.full(len(names), np.nan), np.zeros(len(names), dtype=bool)
    for i, name in enumerate(names):
        item = part[name]
        if not isinstance(item, dict) or not item.keys() <= {"score", "in_graph"} or type(item.get("in_graph")) is not bool:
            if isinstance(item, dict) and any("neurons" in key for key in item):
                raise RelevanceError(f"{where}: {name} has scores of neurons, which circuits of heads and MLPs do not know")
            only(item, f"{where}: {name}", needed=("in_graph",), allowed=("score",))
            raise RelevanceError(f"{where}: {name} says in_graph: {str(item['in_graph'])[:60]!r}, not true or false")
        score = item.get("score")
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or math.isinf(score)):
            raise RelevanceError(f"{where}: {name} has the score {str(score)[:60]!r}, not a number")
        scores[i], kept[i] = math.nan if score is None else score, item["in_graph"]
    return scores, kept


def _read_safetensors(path: str | Path) -> MibGraph:
    def build(tensors: dict[str, Tensor], header: dict[str, str]) -> MibGraph:
        if header.get("format") != "MIB circuit":
            raise RelevanceError(f"{path} was not written by write_mib")
        edge_scores, edges_kept, node_scores, nodes_kept = (tensors[name].numpy() for name in _ARRAYS)
        return MibGraph(_model(json.loads(header["cfg"]), str(path)), edge_scores, edges_kept, node_scores, nodes_kept)

    return read_tensors(path, "a MIB circuit", build)
