"""Multiple choice, as MIB's copied colours (Mueller et al. 2025, arXiv 2504.13151; the wording is ours): which letter names the colour?"""

from __future__ import annotations

import random

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks.fitting import ends_differently, require_tokenizer, single_token_words
from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import logit_diff

LETTERS = "ABCD"
# fmt: off
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "gray", "orange", "purple", "pink", "gold", "silver")
OBJECTS = (
    "box", "cup", "hat", "car", "door", "chair", "table", "ball", "book", "bag", "coat", "bed", "boat", "bird", "flower", "house", "key",
    "lamp", "phone", "shirt",
)
# fmt: on
QUESTION = "Question: The {object} is {color}. What color is the {object}?"


def mcqa(model: TransformerBridge, n: int = 32, seed: int = 0) -> PromptPairs:
    """Questions with four answers of which one repeats the colour named; in the corrupt prompt it has changed places with another answer.

    The target is logit(letter of the right answer) - logit(letter it has in the corrupt prompt).

    Source: MIB (Mueller et al. 2025, arXiv 2504.13151); the wording is ours.

    Raises:
        RelevanceError: fewer than four colours, or no object, are single tokens.
    """
    require_tokenizer(model, "mcqa")
    colors, dropped_colors = single_token_words(model, COLORS)
    objects, dropped_objects = single_token_words(model, OBJECTS)
    dropped = [*dropped_colors, *dropped_objects]
    if len(colors) < len(LETTERS) or not objects:
        raise RelevanceError(f"mcqa does not fit this tokenizer: too few colours or objects are single tokens (not: {', '.join(dropped)})")
    rng = random.Random(seed)
    rows: list[tuple[list[int], list[int], int, int]] = []
    for _ in range(n):
        thing, shown = rng.choice(list(objects)), rng.sample(list(colors), len(LETTERS))
        right, other = rng.sample(range(len(LETTERS)), 2)
        swapped = list(shown)
        swapped[right], swapped[other] = shown[other], shown[right]
        question = QUESTION.format(object=thing, color=shown[right])
        answers = f" {LETTERS[right]}", f" {LETTERS[other]}"
        clean, corrupt = (ends_differently(model, _prompt(question, choices), *answers) for choices in (shown, swapped))
        if clean is None or corrupt is None or len(clean[0]) != len(corrupt[0]) or (rows and len(rows[0][0]) != len(clean[0])):
            raise RelevanceError(f"mcqa does not fit this tokenizer: it reads {model.to_str_tokens(_prompt(question, shown))}")
        rows.append((clean[0], corrupt[0], clean[1], clean[2]))
    prompts, corrupts, rights, wrongs = zip(*rows, strict=True)
    target = logit_diff(torch.tensor(rights), torch.tensor(wrongs))
    return PromptPairs(torch.tensor(prompts), torch.tensor(corrupts), target, dropped=tuple(dropped))


def _prompt(question: str, choices: list[str]) -> str:
    return "\n".join([question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)), "Answer:"])
