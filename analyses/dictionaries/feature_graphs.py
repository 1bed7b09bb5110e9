"""Which features, tokens, errors and heads made a feature fire, and the answer: a graph over the features that carry most.

Each feature that is kept is explained on the path "direct", on which relevance ends at features and errors. So what enters a node are the
features, errors and tokens that it reads without others in between, through attention and norms as they are, and it adds up to the node's
own relevance. Heads (their z, queries, keys and values) are listed beside, as what carried it: they lie on the way of these edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.batches import strings_of
from analyses.datasets.progress import progress_bar
from lens_relevance import Dictionary, RelevanceCache, RelevanceError, latent, propagate
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs, tokenize
from lens_relevance.inputs.targets import Target
from lens_relevance.sites import anatomy
from lens_relevance.sites.base import block_of

_CARRIERS = {"heads": "attn.hook_z", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v"}


@dataclass(frozen=True)
class FeatureGraph:
    """Scores are in units of the target.

    Attributes:
        nodes: The features that were kept: node ("L9F17@5"), point, layer, feature, position, activation, relevance.
        edges: source ("L3F4@2", "token@2", "error L3@2"), target (a node, or "logits"), score; largest magnitude first.
        carriers: target, carrier (a head "L3H2", or its "L3H2.q", ".k", ".v"), score: the relevance that passes there on the way.
        value: The target, or its difference between the two runs.
        tokens: The prompt's.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    carriers: pd.DataFrame
    value: float
    tokens: list[str]


@left_as_found
def feature_graph(
    model: TransformerBridge,
    inputs: Inputs,
    target: Target | Callable[[Tensor], Tensor] | None = None,
    *,
    dictionaries: Sequence[Dictionary],
    reference: Any,
    n_nodes: int = 20,
    n_edges: int = 200,
) -> FeatureGraph:
    """The graph over features of one prompt against another, under `deeplift`.

    Args:
        inputs, target, reference: As for `propagate`; a single prompt.
        dictionaries: One for each HookPoint of which features are wanted, in the order of the model.
        n_nodes: Features that are kept, by the magnitude of their relevance at a position. Each costs a forward and a backward pass.
        n_edges: Edges that are kept, by magnitude.

    Raises:
        RelevanceError: Several prompts, no dictionaries, or no feature that differs between the runs.
    """
    tokens, mask = tokenize(model, inputs)
    if len(tokens) != 1 or not dictionaries:
        raise RelevanceError("a feature graph is that of one prompt, and of one dictionary at least")
    names = anatomy(model)
    points = [names.canonical(one.point_out[0]) for one in dictionaries]

    def explained(what: Any, path: str, names_filter: Any = None) -> RelevanceCache:
        return propagate(
            model,
            tokens,
            what,
            rules="deeplift",
            reference=reference,
            attention_mask=mask,
            dictionaries=dictionaries,
            dictionary_path=path,  # type: ignore[arg-type]
            names_filter=names_filter,
        )

    whole = explained(target, "features")
    nodes = _strongest(whole, points, n_nodes)
    carriers = (f"blocks.{layer}.{hook}" for layer in range(names.n_layers) for hook in _CARRIERS.values())
    wanted = {names.leaves[0], *(names.aliases[name] for name in carriers if name in names.aliases)}
    edges, carried = [], []
    with progress_bar() as bar:
        task = bar.add_task("explaining features", total=len(nodes) + 1)
        for row in [None, *nodes.to_dict("records")]:
            what = target if row is None else latent(row["point"], feature=row["feature"], position=row["position"])
            cache = explained(what, "direct", lambda name: name in wanted)
            into, scale = ("logits", 1.0) if row is None else (row["node"], row["coefficient"])
            edges += _entering(cache, points, into, scale)
            carried += _carried(cache, names.n_layers, into, scale)
            bar.advance(task)
    assert whole.reference_value is not None
    frame = pd.DataFrame(edges, columns=["source", "target", "score"]).sort_values("score", key=abs, ascending=False, kind="stable")
    strings = strings_of(model, tokens[0].tolist())
    return FeatureGraph(
        nodes.drop(columns="coefficient"),
        frame.head(n_edges).reset_index(drop=True),
        pd.DataFrame(carried, columns=["target", "carrier", "score"]).sort_values("score", key=abs, ascending=False).reset_index(drop=True),
        float(whole.value[0] - whole.reference_value[0]),
        strings,
    )


def _name(point: str, feature: int, position: int) -> str:
    return f"L{block_of(point)[1]}F{feature}@{position}"


def _strongest(cache: RelevanceCache, points: Sequence[str], n: int) -> pd.DataFrame:
    """The n features, each at a position, of largest relevance; coefficient: their relevance by unit of their change."""
    frames = []
    for point in points:
        relevance, activation = cache.features(point), cache.feature_activations(point)
        _, position, feature = relevance.indices()
        frames.append(
            pd.DataFrame(
                {
                    "node": [_name(point, f, p) for f, p in zip(feature.tolist(), position.tolist(), strict=True)],
                    "point": point,
                    "layer": block_of(point)[1],
                    "feature": feature.tolist(),
                    "position": position.tolist(),
                    "activation": activation.values().tolist(),
                    "relevance": relevance.values().tolist(),
                    "coefficient": cache.dictionaries[f"{point}:features/coefficient"].tolist(),
                }
            )
        )
    ranked = pd.concat(frames, ignore_index=True).sort_values("relevance", key=abs, ascending=False, kind="stable").head(n)
    ranked = ranked[ranked["relevance"] != 0].reset_index(drop=True)
    if ranked.empty:
        raise RelevanceError("no feature has any relevance: the target does not depend on them, or the two runs are the same")
    return ranked


def _entering(cache: RelevanceCache, points: Sequence[str], into: str, scale: float) -> list[tuple[str, str, float]]:
    """What enters a node: features, errors and tokens, in units of the target."""
    found: list[tuple[str, str, float]] = []
    for point in points:
        if f"{point}:features/index" not in cache.dictionaries:
            continue  # above the node
        relevance = cache.features(point)
        _, position, feature = relevance.indices()
        entries = zip(feature.tolist(), position.tolist(), relevance.values().tolist(), strict=True)
        found += [(_name(point, f, p), into, scale * score) for f, p, score in entries if score]
        errors = enumerate(cache.error(point)[0].tolist())
        found += [(f"error L{block_of(point)[1]}@{p}", into, scale * score) for p, score in errors if score]
    found += [(f"token@{p}", into, scale * score) for p, score in enumerate(cache.tokens()[0].tolist()) if score]
    return found


def _carried(cache: RelevanceCache, n_layers: int, into: str, scale: float) -> list[tuple[str, str, float]]:
    found: list[tuple[str, str, float]] = []
    for layer in range(n_layers):
        for kind, hook in _CARRIERS.items():
            name = f"blocks.{layer}.{hook}"
            if name not in cache:
                continue
            by_head = cache[name][0].sum((0, -1)).tolist()
            found += [(into, f"L{layer}H{h}" + ("" if kind == "heads" else f".{kind}"), scale * s) for h, s in enumerate(by_head) if s]
    return found
