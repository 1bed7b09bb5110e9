"""Attributions of the vision-language model's patches and words: (model, examples, target) -> scores by token set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from analyses.perturbation import EmbeddingRemoval, PatchRemoval
from analyses.perturbation.inputs import fillers
from analyses.perturbation.removal_runs import one_by_one
from analyses.vision_language.model import IMAGE, QUESTION, VisionLanguageModel
from analyses.vision_language.pictures import PATCH
from analyses.vision_language.questions import Examples, examples
from lens_relevance import Target, logit_diff, propagate, token_relevance
from lens_relevance.attention_methods import TokenSetsRelevance

Scores = dict[str, Tensor]  # by token set, [batch, patch] and [batch, word]
Method = Callable[[VisionLanguageModel, Examples, Target], Scores]
REFERENCE_SEED, N_REFERENCES = 3, 8


def inputs_of(asked: Examples) -> dict[str, Tensor]:
    """The arguments that the model is called with."""
    return {IMAGE: asked.images, QUESTION: asked.questions}


@torch.no_grad()
def answers_of(model: VisionLanguageModel, asked: Examples) -> Target:
    """The logit of each answer that the model gives, against its runner-up."""
    top = model(**inputs_of(asked))[:, -1].topk(2, -1).indices
    return logit_diff(top[:, 0], top[:, 1])


def patch_removal(model: VisionLanguageModel, asked: Examples, target: Target, *, baseline: str) -> PatchRemoval:
    """The evaluator of removed patches."""
    return PatchRemoval(model, inputs_of(asked), target, baseline=baseline, image=IMAGE, patch=PATCH)


def word_removal(model: VisionLanguageModel, asked: Examples, target: Target, *, baseline: str) -> EmbeddingRemoval:
    """The evaluator of removed words."""
    return EmbeddingRemoval(model, inputs_of(asked), target, baseline=baseline, stack=QUESTION)


def by_rules(rules: str) -> Method:
    """Relevance at the embeddings of patches and words, under a ruleset for single runs."""
    return lambda model, asked, target: _at_embeddings(model, asked, target, rules, None)


def against(kind: str, rules: str = "deeplift") -> Method:
    """Relevance under a pair ruleset: of patches against a reference picture with the same question, of words against other questions about
    the same picture.

    Args:
        kind: `mean_patch`, `blur`, or `other` pictures. Of other pictures and questions `N_REFERENCES` are drawn, and the mean is taken.
    """

    def scores(model: VisionLanguageModel, asked: Examples, target: Target) -> Scores:
        given = inputs_of(asked)
        others = {
            name: [row.expand_as(given[name]) for row in value] for name, value in inputs_of(examples(N_REFERENCES, REFERENCE_SEED)).items()
        }
        pictures = others[IMAGE] if kind == "other" else [fillers(asked.images, kind, PATCH)]
        references = {IMAGE: pictures, QUESTION: others[QUESTION]}
        result = {}
        for name, listed in references.items():
            runs = [_at_embeddings(model, asked, target, rules, given | {name: one})[name] for one in listed]
            result[name] = torch.stack(runs).mean(0)
        return result

    return scores


def by_attention(method: str, importance: str = "relevance", rules: str = "gradient") -> Method:
    """Scores of `token_relevance`."""

    def scores(model: VisionLanguageModel, asked: Examples, target: Target) -> Scores:
        result = token_relevance(model, inputs_of(asked), target, method=method, importance=importance, rules=rules)
        assert isinstance(result, TokenSetsRelevance)
        return result.scores

    return scores


def occlusion(model: VisionLanguageModel, asked: Examples, target: Target) -> Scores:
    """Fall of the target when one patch or word alone is removed: one forward for each."""
    return {
        IMAGE: one_by_one(patch_removal(model, asked, target, baseline="mean_patch"), torch.ones_like(asked.relevant)),
        QUESTION: one_by_one(word_removal(model, asked, target, baseline="mean_embedding"), torch.ones_like(asked.questions).bool()),
    }


def random_order(model: VisionLanguageModel, asked: Examples, target: Target) -> Scores:
    """Scores without meaning: what every method must beat."""
    generator = torch.Generator().manual_seed(0)
    return {
        IMAGE: torch.rand(asked.relevant.shape, generator=generator),
        QUESTION: torch.rand(asked.questions.shape, generator=generator),
    }


def _at_embeddings(model: VisionLanguageModel, asked: Examples, target: Target, rules: str, reference: dict[str, Tensor] | None) -> Scores:
    cache = propagate(model, inputs_of(asked), target, rules=rules, reference=reference)
    return {name: cache.tokens(stack=name) for name in (IMAGE, QUESTION)}
