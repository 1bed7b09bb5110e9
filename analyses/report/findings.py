"""Everything that a report or a terminal shows, computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Node
from analyses.contexts import Atlas
from analyses.datasets.progress import watched
from analyses.evaluation.ranking import rank_heads
from analyses.graph import FlowGraph, flow_graph
from analyses.models.structure import n_heads, n_layers
from analyses.patching import activation_patching
from analyses.report.circuit import CircuitCheck, check_circuits
from analyses.report.question import Question, answer_text, token_text
from analyses.report.token_notes import token_notes
from analyses.report.unit_labels import unit_labels
from analyses.tasks import PromptPairs
from analyses.tasks.prompts import texts
from analyses.views.plots import correlations
from lens_relevance import RelevanceCache, RelevanceError, propagate
from lens_relevance.attention_methods import head_flow
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.ruleset_tables import needs_reference, ruleset

_EDGES_SHOWN = 150
_Part = TypeVar("_Part")
TOP_HEADS = 10
"""How many heads tables show."""


@dataclass(frozen=True)
class Findings:
    """What was found about a question.

    Attributes:
        rules: the ruleset.
        target: what is explained, in words. asked: the example's answer, and what it is weighed against, where the target is such a
            question. info: model, ruleset, dtype and versions.
        prompt, counterpart: the example as text, and what it is compared with. tokens: the example's tokens.
        predictions: its most likely next tokens and how likely they are.
        words: relevance of each token, [pos], by how it was looked at; in the units of the target.
        residual: relevance of the residual stream, [pos, layer + 1].
        graph: the strongest edges over which relevance flows in the example. circuit: how many of the edges are enough. Both are None
            where they were not asked for, or where `missing` says why there is none.
        flow: relevance that heads carry, [layer, head, query, key]; None where the model has no live pattern.
        heads: one row per head: head, layer, index, relevance, standard_error, top_share (share of pairs in which it is among the
            `top_k` strongest), patching (mean of denoising and noising), denoising, noising; largest relevance first.
        labels: what the first of them write, and their best contexts (see `unit_labels`); labels_note: how to read it.
        expected: where the effect of patching each head is to be expected: name, score (of `combined`), low, high, reliable and patching;
            None where `missing` says why.
        pearson, spearman: relevance against patching. stability: of the ranking over the pairs, in words.
        account: the conservation account of the example. value, reference_value: the target there, and on its counterpart.
        clean, corrupt: the target on both sides, one value per pair.
        seconds: time taken by each part. missing: what could not be computed for this model, and why.
    """

    question: Question
    rules: str
    target: str
    asked: list[str]
    info: dict[str, str]
    prompt: str
    counterpart: str
    tokens: list[str]
    predictions: list[tuple[str, float]]
    words: dict[str, Float[Tensor, " pos"]]
    residual: Float[Tensor, "pos cut"]
    flow: Float[Tensor, "layer head query key"] | None
    graph: FlowGraph | None
    circuit: CircuitCheck | None
    heads: pd.DataFrame
    labels: pd.DataFrame
    labels_note: str
    expected: pd.DataFrame | None
    top_k: int
    pearson: float
    spearman: float
    stability: str
    account: pd.DataFrame
    value: float
    reference_value: float | None
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]
    seconds: dict[str, float]
    missing: dict[str, str]

    @property
    def n_pairs(self) -> int:
        """How many pairs the question has."""
        return len(self.question.pairs)

    @property
    def has_many_pairs(self) -> bool:
        """Whether the example is one of many, and not a single prompt."""
        return self.n_pairs > 1 and not self.question.baseline

    def strongest_move(self, layer: int, index: int) -> str:
        """From which token to which a head carries most relevance; nothing where its pattern cannot be read."""
        if self.flow is None:
            return ""
        carried = self.flow[layer, index]
        query, key = divmod(int(carried.abs().argmax()), carried.shape[1])
        return f"{self.tokens[key].strip() or '␣'} ({key}) → {self.tokens[query].strip() or '␣'} ({query})"

    def notes(self, name: str) -> list[str]:
        """What a reader must know of `words[name]`."""
        if self.reference_value is not None:
            return []  # nothing stays inside the model, and a token that begins a text is in both runs
        return token_notes(self.tokens, self.words[name].double().tolist(), self.explained, rules=self.rules)

    @property
    def explained(self) -> float:
        """What relevance adds up to: the target, or its difference from the counterpart."""
        return self.value - (self.reference_value or 0.0)


@left_as_found
def find(
    model: TransformerBridge, question: Question, rules: str = "deeplift", *, with_graph: bool = False, atlas: Atlas | None = None
) -> Findings:
    """Explain the example token by token, rank the heads over all pairs, and patch the heads to check the ranking.

    Args:
        rules: a ruleset by name. A prompt that has no counterpart is explained as by `propagate`, against the mean embedding, but for the
            heads' ranking and the circuits: patching needs tokens, so these are means over pairs with random words.
        with_graph: also the flow graph and the circuits of its strongest edges, which take longest.
        atlas: one of this model: also the best contexts of the first heads.

    Raises:
        RelevanceError: an atlas of another model.
    """
    pair_rules = needs_reference(ruleset(rules))
    example = question.example
    seconds: dict[str, float] = {}
    missing: dict[str, str] = {}
    with _timed(seconds, "words, layers and account"):
        cache = _propagate(model, question, rules, pair_rules)
        words = _words(model, question, rules, pair_rules, cache)
    flow = _or_reason(missing, "flow", lambda: _flow(model, question, rules, pair_rules))
    graph, circuit = None, None
    if with_graph:
        with _timed(seconds, "flow graph"):
            graph = _or_reason(missing, "graph", lambda: _graph(model, question, rules, pair_rules))
        with _timed(seconds, "circuits"):
            circuit = _or_reason(missing, "circuit", lambda: check_circuits(model, question.pairs, rules))
    top_k = max(3, n_layers(model) * n_heads(model) // 10)
    with _timed(seconds, "ranking by relevance"):
        ranking = rank_heads(model, question.pairs, rules, top_k=top_k)
    with _timed(seconds, "activation patching"):
        patched = activation_patching(model, question.pairs, "heads", direction="mean", progress=watched())
    heads = _beside(ranking, patched.to_dataframe())
    with _timed(seconds, "intervals"):
        expected = _or_reason(missing, "intervals", lambda: _expected(rank_heads(model, question.pairs, top_k=top_k), heads))
    labels, labels_note = unit_labels(model, question.pairs, heads["head"].head(TOP_HEADS).tolist(), atlas=atlas)
    pearson, spearman = correlations(heads["relevance"], heads["patching"])
    return Findings(
        question=question,
        rules=rules,
        target=question.target_in_words(model),
        asked=question.asked(model),
        info=cache.info | {"device": str(cache.value.device), "pairs": str(len(question.pairs))},
        prompt=texts(model, example.clean[:1], example.clean_mask[:1])[0],
        counterpart=texts(model, example.corrupt[:1], example.corrupt_mask[:1])[0],
        tokens=_texts(model, example.clean[0]),
        predictions=_predictions(model, cache.logits[0]),
        words=words,
        residual=cache.residual()[0],
        flow=None if flow is None else flow[0],
        graph=graph,
        circuit=circuit,
        heads=heads,
        labels=labels,
        labels_note=labels_note,
        expected=expected,
        top_k=top_k,
        pearson=pearson,
        spearman=spearman,
        stability=ranking.attrs["stability"],
        account=cache.conservation().drop(columns="example"),
        value=float(cache.value),
        reference_value=None if cache.reference_value is None else float(cache.reference_value),
        clean=patched.clean,
        corrupt=patched.corrupt if patched.corrupt is not None else torch.zeros(0),
        seconds=seconds,
        missing=missing,
    )


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def _or_reason(missing: dict[str, str], part: str, compute: Callable[[], _Part]) -> _Part | None:
    """What a model may not allow: the report is made without it, and says why."""
    try:
        return compute()
    except RelevanceError as error:
        missing[part] = str(error)
        return None


def _propagate(model: TransformerBridge, question: Question, rules: str, pair_rules: bool) -> RelevanceCache:
    """The example under the rules, against its counterpart where the rules compare two runs and there is one."""
    row, reference = _example(question, pair_rules)
    return propagate(model, row.clean, row.target, rules=rules, reference=reference, attention_mask=row.clean_mask, audit=True)


def _example(question: Question, pair_rules: bool) -> tuple[PromptPairs, Tensor | None]:
    row = question.example
    return row, row.corrupt if pair_rules and not question.baseline else None


def _flow(model: TransformerBridge, question: Question, rules: str, pair_rules: bool) -> Tensor:
    """The heads' flow in the example."""
    row, reference = _example(question, pair_rules)
    return head_flow(model, row.clean, row.target, rules=rules, reference=reference, attention_mask=row.clean_mask)


def _graph(model: TransformerBridge, question: Question, rules: str, pair_rules: bool) -> FlowGraph:
    """The example's flow graph, cut down to what an eye can take in."""
    row, reference = _example(question, pair_rules)
    return flow_graph(model, row.clean, row.target, rules=rules, reference=reference).prune(top=_EDGES_SHOWN)


def _words(model: TransformerBridge, question: Question, rules: str, pair_rules: bool, cache: RelevanceCache) -> dict[str, Tensor]:
    """The example's tokens against the counterpart if there is one, and against the mean embedding or nothing."""
    if not pair_rules:
        return {f"{rules}: the prompt on its own": cache.tokens()[0]}
    if question.baseline:
        return {f"{rules}: against the mean embedding": cache.tokens()[0]}
    row = question.example
    own = propagate(model, row.clean, row.target, rules=rules, names_filter="embed.hook_out", attention_mask=row.clean_mask)
    return {f"{rules}: against the counterpart": cache.tokens()[0], f"{rules}: against the mean embedding": own.tokens()[0]}


def _beside(ranking: pd.DataFrame, patched: pd.DataFrame) -> pd.DataFrame:
    """Ranking and patching of the same heads as one table."""
    effects = patched[["layer", "head", "effect", "effect_denoising", "effect_noising"]].astype({"layer": int, "head": int})
    both = ranking.rename(columns={"score": "relevance"}).merge(effects, on=["layer", "head"], validate="one_to_one")
    both = both.rename(columns={"effect": "patching", "effect_denoising": "denoising", "effect_noising": "noising", "head": "index"})
    both.insert(0, "head", [str(Node("heads", layer, head=index)) for layer, index in zip(both["layer"], both["index"], strict=True)])
    return both


def _expected(ranking: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """Intervals of the heads, and what patching found."""
    both = ranking.merge(
        heads[["layer", "index", "head", "patching"]].rename(columns={"head": "name", "index": "head"}), on=["layer", "head"]
    )
    return both[["name", "score", "low", "high", "reliable", "patching"]]


def _predictions(model: TransformerBridge, logits: Float[Tensor, "*pos d_vocab"], k: int = 5) -> list[tuple[str, float]]:
    last = logits if logits.ndim == 1 else logits[-1]
    top = last.float().softmax(-1).topk(min(k, len(last)))
    return [(answer_text(model, int(token)), float(p)) for p, token in zip(top.values, top.indices, strict=True)]


def _texts(model: TransformerBridge, tokens: Tensor) -> list[str]:
    return [token_text(model, int(token)) for token in tokens]
