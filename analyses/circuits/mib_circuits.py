"""Our scores and circuits as MIB's, MIB's as ours, and their areas by MIB's own formula.

Both speak of the same edges: ours lead to `L4H1.k`, MIB's to `a4.h1<k>`, one per query head under grouped-query attention too. Biases and
position embeddings, which are the same in both runs of a pair, are no items in either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits.ablation import Ablation
from analyses.circuits.choose import Circuit, top
from analyses.circuits.faithfulness import FaithfulnessCurve, faithfulness_frame
from analyses.circuits.items import Items, Level
from analyses.circuits.mib import MibGraph, MibModel, write_mib
from analyses.circuits.scores import ItemScores, Order, score_items
from analyses.components import LOGITS, MLP_INPUT, parse_node
from analyses.edges.wiring import wiring
from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all items that a circuit keeps, in MIB's evaluation. A submission of circuits holds the first nine."""


def mib_areas(faithfulness: Sequence[float] | Float[np.ndarray, " share"]) -> tuple[float, float]:
    """CPR and CMD from the faithfulness at each of `MIB_SHARES`: the trapezoid rule over the shares (Mueller et al. 2025).

    CPR is the area under f, CMD that under |1 - f|. MIB takes the nominal shares; `circuits.areas` those that the rounded sizes have.

    Raises:
        RelevanceError: not one value per share.
    """
    f = np.asarray(faithfulness, dtype=float)
    if f.shape != (len(MIB_SHARES),):
        raise RelevanceError(f"MIB's areas take {len(MIB_SHARES)} values of faithfulness, one per share, not an array of shape {f.shape}")
    return float(np.trapezoid(f, MIB_SHARES)), float(np.trapezoid(np.abs(1 - f), MIB_SHARES))


def mib_curve(ablation: Ablation, scores: ItemScores, order: Order = "signed") -> FaithfulnessCurve:
    """Faithfulness at MIB's ten sizes, and its areas by MIB's formula; MIB orders by the signed score unless told otherwise.

    MIB also takes edges that lead nowhere out of a circuit before it evaluates it. That changes no metric: nothing that is kept reads what
    such an edge carries.
    """
    counts = np.array([int(share * len(ablation.items)) for share in MIB_SHARES])
    frame = faithfulness_frame(ablation, scores, order, counts=counts)
    cpr, cmd = mib_areas(frame["faithfulness"].to_numpy())
    return FaithfulnessCurve(frame, scores.method, order, cpr, cmd)


def to_mib(model: TransformerBridge, scores: ItemScores, circuit: Circuit | None = None) -> MibGraph:
    """Scores of nodes or edges as a MIB graph, with the items of a circuit in it (none, if there is none).

    A score is positive where the item speaks for the full model's answer, as MIB wants it; where the metric falls towards the full model
    (`ItemScores.downwards`) signs are turned.

    Raises:
        RelevanceError: items by position, which MIB does not know, or a model whose blocks are not all of attention and MLP.
    """
    shape, names = mib_model(model, scores.items), _names(scores.items)
    kept = np.zeros(len(names), dtype=bool) if circuit is None else circuit.kept
    return _graph(shape, scores.items, names=names, values=scores.values("signed"), kept=kept)


def from_mib(graph: MibGraph, model: TransformerBridge, items: Items, *, method: str = "mib") -> ItemScores:
    """The scores of a MIB graph as those of our items (`Ablation.items`), to be evaluated by `mib_curve` or `faithfulness_curve`.

    Raises:
        RelevanceError: the graph is one of another model, or lacks the scores of an item.
    """
    shape = mib_model(model, items)
    if graph.model != shape:
        raise RelevanceError(f"this graph is one of another model: it has {graph.model}, the model {shape}")
    listed, scores = (shape.edges(), graph.edge_scores) if items.level == "edge" else (shape.nodes(), graph.node_scores)
    known = dict(zip(listed, scores.tolist(), strict=True))
    values = np.array([known[name] for name in _names(items)])
    if np.isnan(values).any():
        raise RelevanceError(
            f"this graph has no score for {_names(items)[int(np.isnan(values).argmax())]}; scores of {items.level}s are needed"
        )
    return ItemScores(items, method, values, np.abs(values))


def write_mib_circuits(model: TransformerBridge, scores: ItemScores, folder: str | Path, *, order: Order = "signed") -> list[Path]:
    """Nine circuits with 0.1 to 50 % of the items each, MIB's second form of a submission, as `0.001.json` to `0.5.json` in a folder.

    A size that rounds to no item gives an empty circuit.
    """
    written, names = [], _names(scores.items)
    for share in MIB_SHARES[:-1]:
        n = int(share * len(scores.items))
        kept = top(scores, n, order).kept if n else np.zeros(len(scores.items), dtype=bool)
        graph = _graph(mib_model(model, scores.items), scores.items, names=names, values=np.full(len(names), np.nan), kept=kept)
        written.append(Path(folder) / f"{share:g}.json")
        write_mib(graph, written[-1])
    return written


def write_mib_submission(
    model: TransformerBridge, pairs: PromptPairs, folder: str | Path, *, methods: Sequence[str], level: Level, name: str
) -> list[Path]:
    """Importance scores of each method, laid out as by MIB's code: `METHOD_patching_LEVEL/NAME/importances.json`.

    Args:
        methods: of `score_items`.
        level: "node" or "edge".
        name: the folder's name within each method: MIB wants TASK_MODEL, with its own names for both (`ioi_gpt2`, `mcqa_gemma2`).

    Returns:
        The files.

    Raises:
        RelevanceError: a folder cannot be made, and what `score_items` raises.
    """
    ablation, files = Ablation(model, pairs, level), []
    for method in methods:
        place = Path(folder) / f"{method}_patching_{level}" / name / "importances.json"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RelevanceError(f"{place.parent} cannot be made: {error.strerror}") from error
        write_mib(to_mib(model, score_items(ablation, method)), place)
        files.append(place)
    return files


def mib_model(model: TransformerBridge, items: Items) -> MibModel:
    """The `cfg` of a model.

    Raises:
        RelevanceError: its items are not those that MIB lists for such a model.
    """
    if items.pos > 1:
        raise RelevanceError("MIB's circuits have items at all positions together; score them without by_position")
    layers = wiring(model).layers
    shape = MibModel(len(layers), layers[0].geometry.n_heads, layers[0].parallel, model.cfg.d_model)
    listed = shape.edges() if items.level == "edge" else shape.nodes()[:-1]  # the logits are no item
    if sorted(_names(items)) != sorted(listed):
        raise RelevanceError("MIB's format takes models whose every block is attention and one MLP; this one's items are others")
    return shape


def _graph(shape: MibModel, items: Items, *, names: list[str], values: np.ndarray, kept: np.ndarray) -> MibGraph:
    """Values and membership of our items, at their places among MIB's."""
    listed = {"edge": shape.edges(), "node": shape.nodes()}
    scores = {level: np.full(len(all_names), np.nan) for level, all_names in listed.items()}
    inside = {level: np.zeros(len(all_names), dtype=bool) for level, all_names in listed.items()}
    place = {name: i for i, name in enumerate(listed[items.level])}
    where = np.array([place[name] for name in names])
    scores[items.level][where], inside[items.level][where] = values, kept
    if items.level == "edge":  # a node is in the circuit where an edge of it is
        ends = [end for name, taken in zip(listed["edge"], inside["edge"], strict=True) if taken for end in name.split("->")]
        present = {end.split("<")[0] for end in ends}
        inside["node"] = np.array([name in present or name == LOGITS for name in listed["node"]])
    else:  # and every edge between two nodes that are
        held = {name for name, taken in zip(listed["node"], inside["node"], strict=True) if taken} | {LOGITS}
        inside["node"][-1] = True
        inside["edge"] = np.array([all(end.split("<")[0] in held for end in name.split("->")) for name in listed["edge"]])
    return MibGraph(shape, scores["edge"], inside["edge"], scores["node"], inside["node"])


def _names(items: Items) -> list[str]:
    """Our items by MIB's names."""
    writers = {name: _writer(name) for name in items.writers}
    if items.level == "node":
        return [writers[name] for name in items.frame["node"]]
    readers = {name: _reader(name) for name in items.readers}
    return [f"{writers[source]}->{readers[target]}" for source, target in zip(items.frame["source"], items.frame["target"], strict=True)]


def _writer(name: str) -> str:
    node = parse_node(name)
    if node.component == "embed":
        return "input"
    return f"m{node.layer}" if node.component == "mlp" else f"a{node.layer}.h{node.head}"


def _reader(name: str) -> str:
    node = parse_node(name)
    if node.component == LOGITS:
        return LOGITS
    return f"m{node.layer}" if node.component == MLP_INPUT else f"a{node.layer}.h{node.head}<{node.component}>"
