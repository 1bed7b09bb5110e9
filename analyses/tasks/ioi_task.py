"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593) with names, places, objects and templates of our own.

"When Mary and John went to the store, John gave a drink to" -> " Mary": the name that is not repeated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations
from typing import Literal

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks.fitting import knows, most_common, require_tokenizer, single_token_words, token_lengths, tokenize_rows
from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import logit_diff

# fmt: off
NAMES = (
    "Mary", "John", "Tom", "Anna", "James", "Lucy", "Paul", "Sarah", "Mark", "Emma", "David", "Laura", "Peter", "Kate", "Daniel", "Alice",
    "Simon", "Julia", "Martin", "Rachel", "Adam", "Jane", "Henry", "Grace", "Robert", "Helen", "George", "Amy", "Frank", "Ruth", "Oliver",
    "Clara", "Jack", "Rose", "Edward", "Ellen", "Charles", "Maria", "Michael", "Linda",
)
PLACES = (
    "store", "park", "school", "office", "garden", "station", "market", "library", "beach", "hospital", "restaurant", "museum", "house",
    "farm", "church", "hotel",
)
OBJECTS = (
    "drink", "book", "ring", "letter", "ball", "key", "flower", "cake", "bottle", "pen", "card", "ticket", "box", "picture", "map", "phone",
)
# fmt: on

# All of one length in words, so that a tokenizer that knows the words gives one length in tokens.
TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {object} to",
    "After {first} and {second} came to the {place}, {subject} handed a {object} to",
    "While {first} and {second} were at the {place}, {subject} gave a {object} to",
    "Once {first} and {second} got to the {place}, {subject} offered a {object} to",
    "When {first} and {second} met at the {place}, {subject} passed a {object} to",
    "As {first} and {second} sat in the {place}, {subject} sold a {object} to",
    "Before {first} and {second} left for the {place}, {subject} brought a {object} to",
    "Since {first} and {second} lived near the {place}, {subject} sent a {object} to",
    "Because {first} and {second} worked at the {place}, {subject} showed a {object} to",
    "Then {first} and {second} went to the {place} and {subject} gave a {object} to",
    "Soon {first} and {second} ran to the {place} and {subject} threw a {object} to",
    "Later {first} and {second} drove to the {place} and {subject} lent a {object} to",
)


def ioi(
    model: TransformerBridge,
    n: int = 32,
    seed: int = 0,
    *,
    corruption: Literal["swap", "abc"] = "swap",
    templates: Sequence[str] = TEMPLATES,
    name_pairs: Sequence[tuple[str, str]] | None = None,
) -> PromptPairs:
    """Pairs of IOI prompts with the target logit(indirect object) - logit(subject).

    Half of the rows have the indirect object first (ABBA: "Mary and John ..., John gave ... to"), half the subject (BABA).

    Source: Wang et al. 2022, arXiv 2211.00593; words and templates are ours.

    Args:
        corruption: "swap" repeats the other name in the second clause, which turns the right answer round; "abc" replaces the three names
            by three different ones, which leaves no right answer (p_ABC of Wang et al.).
        templates: with the fields {first}, {second}, {subject}, {place} and {object}.
        name_pairs: the pairs of names to draw from; by default every pair of `NAMES`.

    Words that are not a single token for this tokenizer, and templates of another length than most, are left out and listed in
    `PromptPairs.dropped`.

    Raises:
        RelevanceError: fewer names (5 for "abc", 2 for "swap"), places or objects than the task needs are single tokens.
    """
    require_tokenizer(model, "ioi")
    wanted = NAMES if name_pairs is None else [name for pair in name_pairs for name in pair]
    names, dropped_names = single_token_words(model, [*wanted, *NAMES])
    places, dropped_places = single_token_words(model, PLACES)
    objects, dropped_objects = single_token_words(model, OBJECTS)
    ordered_pairs = list(permutations([name for name in NAMES if name in names], 2))
    if name_pairs is not None:
        ordered_pairs = [order for a, b in name_pairs if a in names and b in names for order in ((a, b), (b, a))]
    too_few = len(names) < (5 if corruption == "abc" else 2) or not ordered_pairs
    for kind, missing, dropped in (
        ("names", too_few, dropped_names),
        ("places", not places, dropped_places),
        ("objects", not objects, dropped_objects),
    ):
        if missing:
            raise RelevanceError(f"ioi does not fit this tokenizer: too few {kind} are single tokens (not: {', '.join(dropped)})")

    fitting = _templates_of_one_length(model, templates, *(next(iter(words)) for words in (names, places, objects)))

    rng = random.Random(seed)
    clean, corrupt, answers, subjects = [], [], [], []
    for row in range(n):
        template, fields = rng.choice(fitting), dict(place=rng.choice(list(places)), object=rng.choice(list(objects)))
        indirect_object, subject = rng.choice(ordered_pairs)
        pair = [indirect_object, subject] if row % 2 == 0 else [subject, indirect_object]
        clean.append(template.format(first=pair[0], second=pair[1], subject=subject, **fields))
        others = [*pair, indirect_object] if corruption == "swap" else rng.sample([name for name in names if name not in pair], 3)
        corrupt.append(template.format(first=others[0], second=others[1], subject=others[2], **fields))
        answers.append(names[indirect_object])
        subjects.append(names[subject])

    left_out = [template for template in templates if template not in fitting]
    return PromptPairs(
        tokenize_rows(model, clean),
        tokenize_rows(model, corrupt),
        logit_diff(torch.tensor(answers), torch.tensor(subjects)),
        dropped=(*dropped_names, *dropped_places, *dropped_objects, *left_out),
    )


def _templates_of_one_length(model: TransformerBridge, templates: Sequence[str], name: str, place: str, thing: str) -> list[str]:
    """The templates whose words the tokenizer knows and that have the most common number of tokens."""
    texts = [template.format(first=name, second=name, subject=name, place=place, object=thing) for template in templates]
    known = [(template, text) for template, text in zip(templates, texts, strict=True) if knows(model, text)]
    if not known:
        raise RelevanceError(f"ioi does not fit this tokenizer: it lacks words of every template, as {model.to_str_tokens(texts[0])}")
    lengths = token_lengths(model, [text for _, text in known])
    return [template for (template, _), length in zip(known, lengths, strict=True) if length == most_common(lengths)]
