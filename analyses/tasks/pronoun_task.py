"""A character's pronoun, for models of children's stories: "... a little girl named Lily. Lily was happy because" -> " she"."""

from __future__ import annotations

import random

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks.fitting import most_common, require_tokenizer, single_token_words, token_lengths, tokenize_rows
from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import logit_diff

# fmt: off
GIRLS = (
    "Lily", "Mia", "Sue", "Amy", "Anna", "Lucy", "Jane", "Emma", "Sara", "Mary", "Bella", "Ella", "Sally", "Molly", "Daisy", "Rose", "Nina",
    "Zoe", "Kim", "Ann",
)
BOYS = (
    "Tim", "Tom", "Ben", "Max", "Jack", "Sam", "John", "Bob", "Joe", "Leo", "Billy", "Timmy", "Tommy", "Jim", "Peter", "Mike", "Dan",
    "Nick", "Jake", "Roy",
)
# fmt: on
TEMPLATES = (
    "Once upon a time, there was a little {kind} named {name}. {name} was very happy because",
    "Once upon a time, there was a little {kind} named {name}. {name} was sad because",
    "One day, a little {kind} named {name} went to the park. {name} was very happy because",
    "There was a {kind} named {name}. One day, {name} was very excited because",
)


def pronoun(model: TransformerBridge, n: int = 32, seed: int = 0) -> PromptPairs:
    """A story of a girl and the same story of a boy, with the target logit(own pronoun) - logit(the other's).

    Names may have several tokens: of all stories, those are taken whose girl's and boy's version have the same number of tokens, and among
    them those of the most common length. Half of the clean stories are of a girl. Rows do not repeat.

    Source: ours.

    Raises:
        RelevanceError: " she" or " he" is not a single token, or fewer than `n` pairs of stories have equal length.
    """
    require_tokenizer(model, "pronoun")
    pronouns, dropped = single_token_words(model, ("she", "he"))
    if dropped:
        raise RelevanceError(f"pronoun does not fit this tokenizer: not a single token of its own: {', '.join(dropped)}")
    by_length: dict[int, list[tuple[str, str]]] = {}
    for template in TEMPLATES:
        girls = [template.format(kind="girl", name=name) for name in GIRLS]
        boys = [template.format(kind="boy", name=name) for name in BOYS]
        boy_lengths = token_lengths(model, boys)
        for girl, girl_length in zip(girls, token_lengths(model, girls), strict=True):
            equal = [(girl, boy) for boy, boy_length in zip(boys, boy_lengths, strict=True) if boy_length == girl_length]
            by_length.setdefault(girl_length, []).extend(equal)
    stories = by_length[most_common(length for length, pairs in by_length.items() for _ in pairs)] if any(by_length.values()) else []
    if len(stories) < n:
        raise RelevanceError(f"pronoun has {len(stories)} pairs of stories of one length for this tokenizer, not {n}; ask for fewer")

    chosen = random.Random(seed).sample(stories, n)
    girl_first = [row % 2 == 0 for row in range(n)]
    she, he = pronouns["she"], pronouns["he"]
    return PromptPairs(
        tokenize_rows(model, [girl if first else boy for (girl, boy), first in zip(chosen, girl_first, strict=True)]),
        tokenize_rows(model, [boy if first else girl for (girl, boy), first in zip(chosen, girl_first, strict=True)]),
        logit_diff(
            torch.tensor([she if first else he for first in girl_first]),
            torch.tensor([he if first else she for first in girl_first]),
        ),
    )
