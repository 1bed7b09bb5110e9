"""One prompt by a method of `token_relevance`, for the terminal: words and heads, of an encoder-decoder by token set."""

from __future__ import annotations

import pandas as pd
import torch
from rich.console import Group
from rich.text import Text
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.batches import strings_of
from analyses.report.terminal import frame_table
from analyses.report.token_notes import token_notes
from lens_relevance import RelevanceError, Target, logit, logit_diff, token_relevance
from lens_relevance.attention_methods import TokenRelevance, TokenSetsRelevance
from lens_relevance.attention_methods.run import token_sets
from lens_relevance.inputs.prompt import read_inputs
from lens_relevance.shown_text import visible
from lens_relevance.sites import anatomy

TOP_HEADS = 8


def reads_two_sets(model: TransformerBridge) -> bool:
    """Whether a model has an encoder and a decoder, so that a prompt goes to the one and is answered by the other."""
    return len(token_sets(anatomy(model))) == 2


def target_of(answer: str | None, wrong: str | None) -> Target | None:
    """The logit of an answer, against another where one is given; None is the model's own prediction against its runner-up."""
    if answer is None:
        if wrong is not None:
            raise RelevanceError("--wrong goes with --answer here: the model's own prediction is held against its own runner-up")
        return None
    return logit(answer) if wrong is None else logit_diff(answer, wrong)


def explain_tokens(model: TransformerBridge, prompt: str | Tensor, target: Target | None, *, method: str, rules: str | None) -> Group:
    """Relevance of each word for the answer, and of each head, as rich renderables.

    Args:
        prompt: text, or token ids [1, pos]; an encoder-decoder reads it in its encoder, and its decoder holds the start token.
        target, method, rules: as for `token_relevance`.
    """
    result = token_relevance(model, prompt, target, method=method, rules=rules)
    read = read_inputs(model, prompt)
    head = Text(f"{result.method} ({result.rules}), target {result.value[0].item():.3f}; compare scores within a column", style="bold")
    if isinstance(result, TokenRelevance):
        tables = [_table(model, "Words", read.tokens[0], result.scores[0], result.explained[0])]
    else:
        ids = {"encoder": read.arguments["input_ids"], "decoder": read.tokens}
        tables = [_table(model, name, ids[name][0], result.scores[name][0], result.explained[name][0]) for name in result.scores]
    return Group(head, *tables, *([] if method == "attention_flow" else [_heads(result)]))


def _table(model: TransformerBridge, title: str, tokens: Tensor, scores: Tensor, explained: Tensor) -> Group:
    words = strings_of(model, tokens.tolist())
    notes = ["explained" if weight else "" for weight in explained.tolist()]
    columns = {"position": range(len(words)), "word": words, "score": scores.double().tolist(), "": notes}
    read_with = [Text(visible(note)) for note in token_notes(words, scores.double().tolist(), None, rules=title)]
    return Group(*frame_table(pd.DataFrame(columns), title).renderables, *read_with)


def _heads(result: TokenRelevance | TokenSetsRelevance) -> Group:
    scores = result.heads[0]
    names = list(result.attentions) if isinstance(result, TokenSetsRelevance) else [f"blocks.{layer}.attn" for layer in range(len(scores))]
    best = scores.flatten().topk(min(TOP_HEADS, scores.numel())).indices
    layer, head = best // scores.shape[1], best % scores.shape[1]
    listed = [names[i].removesuffix(".hook_pattern") for i in layer.tolist()]
    frame = pd.DataFrame({"attention": listed, "head": head.tolist(), "score": torch.flatten(scores)[best].double().tolist()})
    return frame_table(frame, "Heads")
