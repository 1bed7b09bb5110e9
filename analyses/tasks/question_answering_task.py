"""Questions about a text with known evidence: "Anna is in the garden. Peter is in the car. Where is Anna? Anna is in the" -> "garden"."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks.fitting import ends_differently, require_tokenizer
from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import logit_diff

# fmt: off
PEOPLE = ("Anna", "Peter", "Lucy", "Tom", "Mary", "John", "Sara", "Max", "Lily", "Ben", "Tim", "Sue", "Jack", "Emma", "Sam", "Kate")
PLACES = (
    "garden", "kitchen", "school", "park", "house", "shop", "car", "church", "library", "bank", "hotel", "forest", "office", "city",
    "room", "box", "yard", "boat", "water", "sun",
)
# fmt: on
SENTENCE = "{person} is in the {place}."
QUESTION = "Where is {person}? {person} is in the"
SENTENCES = 3
_TRIES = 50  # for each row


def question_answering(model: TransformerBridge, n: int = 32, seed: int = 0) -> PromptPairs:
    """Three sentences of where people are, and a question that one of them answers; its place is another in the corrupt prompt.

    The evidence is what differs between the two prompts: the place in that one sentence, alone of all tokens, decides the answer. The
    target is logit(place) - logit(place of the corrupt prompt), at the first token in which the two differ. Words may have several tokens:
    the first `n` questions of one length are taken.

    Source: ours.

    Raises:
        RelevanceError: too few questions have one length, or the tokenizer splits a text otherwise when it goes on.
    """
    require_tokenizer(model, "question_answering")
    rng = random.Random(seed)
    by_length: dict[int, list[tuple[list[int], list[int], int, int]]] = {}
    for _ in range(_TRIES * n):
        people, places = rng.sample(PEOPLE, SENTENCES), rng.sample(PLACES, SENTENCES + 1)
        asked, other = rng.randrange(SENTENCES), places.pop()
        changed = [*places]
        changed[asked] = other
        answers = f" {places[asked]}", f" {other}"
        clean, corrupt = (ends_differently(model, prompt_text(people, where, asked), *answers) for where in (places, changed))
        if clean is None or corrupt is None or len(clean[0]) != len(corrupt[0]):
            continue
        rows = by_length.setdefault(len(clean[0]), [])
        rows.append((clean[0], corrupt[0], clean[1], clean[2]))
        if len(rows) == n:
            prompts, corrupts, rights, wrongs = zip(*rows, strict=True)
            return PromptPairs(torch.tensor(prompts), torch.tensor(corrupts), logit_diff(torch.tensor(rights), torch.tensor(wrongs)))
    most = max(map(len, by_length.values()), default=0)
    raise RelevanceError(
        f"question_answering does not fit this tokenizer: of {_TRIES * n} questions {most} have one length, not {n}; it reads "
        f"{model.to_str_tokens(prompt_text(PEOPLE, PLACES, 0))}"
    )


def prompt_text(people: Sequence[str], places: Sequence[str], asked: int) -> str:
    """The text of a question: where each of the first few people is, and where one of them is."""
    sentences = [SENTENCE.format(person=people[i], place=places[i]) for i in range(SENTENCES)]
    return " ".join([*sentences, QUESTION.format(person=people[asked])])
