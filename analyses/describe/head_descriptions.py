"""What an attention head does, beside its rank: where its relevance comes from, how it attends, what it writes.

describe_head(model, pairs, layer=1, head=3).arcs
pd.concat(describe_head(model, pairs, l, head=h).to_dataframe() for l, h in [(1, 3), (1, 0)])
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.batches import Batch, batches, text_of
from analyses.describe.attention_patterns import KINDS, pattern_scores
from analyses.describe.direct_logits import DirectLogits, head_output_weight
from analyses.describe.strongest import Strongest, check_top, effects_in_words, extremes
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError
from lens_relevance.attention_methods import head_flow
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs
from lens_relevance.inputs.targets import AnyTarget
from lens_relevance.logit_reading import without_logits
from lens_relevance.ruleset_tables import Table


@dataclass(frozen=True, eq=False)
class HeadDescription:
    """What an attention head does on a set of prompts. Relevance is in units of the target; positive speaks for it.

    Attributes:
        relevance: of the head, mean over prompts.
        token_pairs: strongest pairs of tokens, over all their occurrences: source, destination, relevance (summed over occurrences, per
            prompt), occurrences.
        arcs: strongest single ones: example, source_position, source, destination_position, destination, attention,
            reference_attention (on the corrupt prompt; pairs alone), relevance.
        pattern_scores: previous_token, duplicate_token, induction (see `analyses.describe.attention_patterns`).
        writes: per source token of the arcs, the tokens that the head writes when it attends to it: source, effect (promotes or
            suppresses), rank, token, logit (direct logits of v W_O, v the head's value at the source, per unit of attention; norms as in
            `DirectLogits`), own_rank (rank of the source itself among what is promoted; 1: the head copies).
    """

    layer: int
    head: int
    relevance: float
    n_prompts: int
    token_pairs: pd.DataFrame
    arcs: pd.DataFrame
    pattern_scores: dict[str, float]
    writes: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """One row: layer, head, relevance, the pattern scores, the strongest pair of tokens, and what the head writes for its source."""
        pair = self.token_pairs.iloc[0]
        of_source = self.writes[self.writes["source"] == self.arcs["source"].iloc[0]]
        row = {"layer": self.layer, "head": self.head, "relevance": self.relevance, **self.pattern_scores}
        row |= {"source": pair["source"], "destination": pair["destination"], "writes_for": self.arcs["source"].iloc[0]}
        return pd.DataFrame([row | effects_in_words(of_source)])


@left_as_found
def describe_head(
    model: TransformerBridge,
    prompts: PromptPairs | Inputs,
    layer: int,
    *,
    head: int,
    target: AnyTarget | None = None,
    rules: str | Table | None = None,
    top_k: int = 10,
) -> HeadDescription:
    """Describe one head by its relevance flow (`lens_relevance.attention_methods.head_flow`) over prompts.

    Args:
        prompts: pairs (clean against corrupt, under `deeplift` by default), or prompts (under `attnlrp` by default).
        layer, head: which one, counted from 0.
        target: what is explained, for prompts without pairs; None takes each prompt's own prediction, as in `propagate`.
        top_k: rows in `token_pairs` and `arcs`.

    Raises:
        RelevanceError: a head out of range, or bad input.
        CoverageError: a model without attention patterns at a HookPoint.
    """
    n_heads = int(model.cfg.n_heads)
    if not 0 <= head < n_heads:
        raise RelevanceError(f"head {head} is out of range: the model has {n_heads} heads, 0 to {n_heads - 1}")
    check_top(top_k)
    strongest: Strongest | None = None
    direct: DirectLogits | None = None
    pairs, total, n = [], 0.0, 0
    for batch in batches(model, prompts, target):
        flow = head_flow(
            model,
            batch.tokens,
            batch.target,
            rules=rules or ("attnlrp" if batch.reference is None else "deeplift"),
            path="value",
            layers=[layer],
            reference=batch.reference,
            attention_mask=batch.mask,
        )[:, 0, head]
        direct = direct or DirectLogits(model, layer, "attn")
        pattern, v = (f"blocks.{layer}.attn.hook_{name}" for name in ("pattern", "v"))
        with torch.no_grad(), without_logits(model, batch.tokens):
            _, cache = model.run_with_cache(batch.tokens, names_filter=[pattern, v, *direct.norms], attention_mask=batch.mask)
            other = None
            if batch.reference is not None:
                _, of_reference = model.run_with_cache(batch.reference, names_filter=pattern, attention_mask=batch.mask)
                other = of_reference[pattern][:, head]
        attention, shared = cache[pattern][:, head], cache[v].shape[2]
        values = cache[v][:, :, head * shared // n_heads]  # grouped-query attention: neighbouring heads share values
        written = values @ head_output_weight(model, layer, head, n_heads=n_heads).to(values).T
        arcs = _arcs(model, batch, flow, attention, other, written, {name: cache[name] for name in direct.norms}, top_k)
        strongest = arcs.merge(strongest, "relevance", top_k)
        pairs.append(_token_pairs(batch, flow, attention))
        total, n = total + float(flow.double().sum()), n + len(flow)
    assert strongest is not None and direct is not None  # batches gives at least one
    scores = pattern_scores(model, prompts)
    own = scores[(scores["layer"] == layer) & (scores["head"] == head)].iloc[0]
    return HeadDescription(
        layer,
        head,
        total / n,
        n,
        _merged(model, pairs, n, top_k),
        strongest.rows.drop(columns="source_id"),
        {kind: float(own[kind]) for kind in KINDS},
        _writes_by_source(model, strongest, direct),
    )


def _arcs(
    model: TransformerBridge,
    batch: Batch,
    flow: Float[Tensor, "batch query key"],
    attention: Float[Tensor, "batch query key"],
    other: Float[Tensor, "batch query key"] | None,
    written: Float[Tensor, "batch key d_model"],
    norms: dict[str, Float[Tensor, "batch query d_model"]],
    top_k: int,
) -> Strongest:
    """The batch's strongest arcs, with what the head writes for each source and the norms' inputs at each destination."""
    carrying = max(1, int(flow.count_nonzero()))  # arcs without relevance say nothing; one is kept so that there is a first
    flat = flow.abs().flatten().topk(min(top_k, carrying)).indices
    example, query, key = torch.unravel_index(flat, flow.shape)
    rows = pd.DataFrame(
        {
            "example": (example + batch.start).tolist(),
            "source_position": key.tolist(),
            "source": [text_of(model, [token]) for token in batch.tokens[example, key].tolist()],
            "destination_position": query.tolist(),
            "destination": [text_of(model, [token]) for token in batch.tokens[example, query].tolist()],
            "attention": attention[example, query, key].tolist(),
            **({} if other is None else {"reference_attention": other[example, query, key].tolist()}),
            "relevance": flow[example, query, key].tolist(),
            "source_id": batch.tokens[example, key].tolist(),
        }
    )
    return Strongest(rows, {"written": written[example, key], **{name: inputs[example, query] for name, inputs in norms.items()}})


def _token_pairs(batch: Batch, flow: Float[Tensor, "batch query key"], attention: Float[Tensor, "batch query key"]) -> pd.DataFrame:
    """Relevance and number of occurrences of each pair of token ids in a batch, where the head can attend at all."""
    example, query, key = ((attention > 0) & (batch.mask[:, :, None] * batch.mask[:, None, :]).bool()).nonzero(as_tuple=True)
    ids = {"source": batch.tokens[example, key].tolist(), "destination": batch.tokens[example, query].tolist()}
    frame = pd.DataFrame({**ids, "relevance": flow[example, query, key].double().tolist(), "occurrences": 1})
    return frame.groupby(["source", "destination"], as_index=False).sum()


def _merged(model: TransformerBridge, frames: list[pd.DataFrame], n: int, top_k: int) -> pd.DataFrame:
    """The strongest pairs of tokens of all batches."""
    total = pd.concat(frames).groupby(["source", "destination"], as_index=False).sum()
    total["relevance"] /= n
    total = total.sort_values("relevance", key=abs, ascending=False, kind="stable").head(top_k).reset_index(drop=True)
    return total.assign(**{name: [text_of(model, [token]) for token in total[name]] for name in ("source", "destination")})


def _writes_by_source(model: TransformerBridge, strongest: Strongest, direct: DirectLogits) -> pd.DataFrame:
    """What the head writes for each source token of the arcs, mean over its arcs; the strongest source first."""
    logits, ids, rows = direct(strongest.vectors["written"], strongest.vectors), strongest.rows["source_id"], []
    for token in dict.fromkeys(ids.tolist()):
        mean = logits[torch.tensor((ids == token).to_numpy())].mean(0)
        own = int((mean > mean[token]).sum()) + 1
        rows += [{"source": text_of(model, [token]), **row, "own_rank": own} for row in extremes(model, mean)]
    return pd.DataFrame(rows)
