"""Subject-verb agreement across an attractor (Linzen et al. 2016, arXiv 1611.01368): "The keys near the cabinet" -> " are", not " is"."""

from __future__ import annotations

import random
from itertools import product

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks.fitting import require_tokenizer, single_token_words, tokenize_rows
from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import logit_diff

# fmt: off
NOUNS = (
    ("key", "keys"), ("book", "books"), ("boy", "boys"), ("girl", "girls"), ("dog", "dogs"), ("cat", "cats"), ("car", "cars"),
    ("friend", "friends"), ("teacher", "teachers"), ("doctor", "doctors"), ("picture", "pictures"), ("tree", "trees"), ("bird", "birds"),
    ("house", "houses"), ("table", "tables"), ("toy", "toys"), ("flower", "flowers"), ("door", "doors"), ("king", "kings"),
    ("box", "boxes"),
)
# fmt: on
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
TEMPLATE = "The {subject} near the {attractor}"


def agreement(model: TransformerBridge, n: int = 32, seed: int = 0) -> PromptPairs:
    """Prompts whose subject is singular in one of clean and corrupt and plural in the other; the attractor, of either number, is the same.

    The target is logit(verb that agrees with the clean subject) - logit(the verb's other form). Half of the clean subjects are plural.

    Source: Linzen et al. 2016, arXiv 1611.01368; words and templates are ours.

    Raises:
        RelevanceError: fewer than two nouns, or no verb, are single tokens in both numbers.
    """
    require_tokenizer(model, "agreement")
    tokens, dropped = single_token_words(model, [word for pair in (*NOUNS, *VERBS) for word in pair])
    nouns = [pair for pair in NOUNS if pair[0] in tokens and pair[1] in tokens]
    verbs = [pair for pair in VERBS if pair[0] in tokens and pair[1] in tokens]
    if len(nouns) < 2 or not verbs:
        raise RelevanceError(f"agreement does not fit this tokenizer: too few nouns or verbs are single tokens (not: {', '.join(dropped)})")

    rng = random.Random(seed)
    clean, corrupt, answers, wrongs = [], [], [], []
    numbers = list(product((0, 1), (0, 1)))
    for row in range(n):
        (subject, attractor), verb = rng.sample(nouns, 2), rng.choice(verbs)
        number, attractor_number = numbers[row % len(numbers)]
        clean.append(TEMPLATE.format(subject=subject[number], attractor=attractor[attractor_number]))
        corrupt.append(TEMPLATE.format(subject=subject[1 - number], attractor=attractor[attractor_number]))
        answers.append(tokens[verb[number]])
        wrongs.append(tokens[verb[1 - number]])
    return PromptPairs(
        tokenize_rows(model, clean),
        tokenize_rows(model, corrupt),
        logit_diff(torch.tensor(answers), torch.tensor(wrongs)),
        dropped=tuple(dropped),
    )
