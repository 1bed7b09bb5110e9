"""Docstring (Heimersheim and Janiak 2023): a function's arguments are documented in their order, so " :param" asks for the next one."""

from __future__ import annotations

import random

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks.fitting import knows, require_tokenizer, single_token_words, tokenize_rows
from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import logit_diff

# fmt: off
ARGUMENTS = (
    "size", "name", "file", "path", "key", "value", "index", "data", "text", "line", "user", "list", "time", "date", "state", "order",
    "color", "width", "group", "level", "image", "page", "mode", "type", "count", "limit", "point", "number", "node", "result",
    "water", "day", "tree", "ball", "house", "dog", "park", "friend", "box",
)
WORDS = (
    "house", "river", "stone", "paper", "garden", "music", "winter", "letter", "bridge", "doctor", "summer", "window", "market", "forest",
    "animal", "table", "school", "ground", "little", "happy", "big", "toy", "bird", "play", "girl", "boy", "mom", "car",
)
# fmt: on
ARGUMENTS_PER_FUNCTION, WORDS_PER_FUNCTION = 4, 6
TEMPLATES = (
    'def {f}(self, {args}):\n    """{w[0]} {w[1]}\n\n    :param {a}: {w[2]} {w[3]}\n    :param {b}: {w[4]} {w[5]}\n    :param',
    "def {f}(self, {args}): {w[0]} {w[1]}. :param {a}: {w[2]} {w[3]}. :param {b}: {w[4]} {w[5]}. :param",
)
"""Python as it is written; all in one line, for tokenizers without line breaks."""


def docstring(model: TransformerBridge, n: int = 32, seed: int = 0) -> PromptPairs:
    """Functions of four arguments of which a docstring has documented two, with the target logit(third) - logit(fourth).

    In the corrupt prompt the definition has the third and the fourth argument the other way round, so that the answer is the other one;
    the docstring is the same. (Heimersheim and Janiak replace names at random; the exchange keeps both answers in both prompts.)

    Words that are not a single token for this tokenizer are left out and listed in `PromptPairs.dropped`.

    Source: Heimersheim and Janiak 2023; the corrupt prompt is ours.

    Raises:
        RelevanceError: fewer than four arguments or six other words are single tokens, or the tokenizer lacks what Python is written in.
    """
    require_tokenizer(model, "docstring")
    tokens, dropped_arguments = single_token_words(model, ARGUMENTS)
    known, dropped_words = single_token_words(model, WORDS)
    for kind, templates, needed, dropped in (
        ("argument names", tokens, ARGUMENTS_PER_FUNCTION, dropped_arguments),
        ("other words", known, ARGUMENTS_PER_FUNCTION + WORDS_PER_FUNCTION + 1, dropped_words),
    ):
        if len(templates) < needed:
            raise RelevanceError(f"docstring does not fit this tokenizer: too few {kind} are single tokens (not: {', '.join(dropped)})")

    rng = random.Random(seed)
    rows = [_fields(rng, list(tokens), list(known)) for _ in range(n)]
    template = next((template for template in TEMPLATES if knows(model, _text(template, rows[0]))), None)
    if template is None:
        raise RelevanceError(f"docstring does not fit this tokenizer: it reads {model.to_str_tokens(_text(TEMPLATES[0], rows[0]))}")
    return PromptPairs(
        tokenize_rows(model, [_text(template, row) for row in rows]),
        tokenize_rows(model, [_text(template, (arguments[:2] + arguments[:1:-1], others)) for arguments, others in rows]),
        logit_diff(torch.tensor([tokens[row[0][2]] for row in rows]), torch.tensor([tokens[row[0][3]] for row in rows])),
        dropped=(*dropped_arguments, *dropped_words),
    )


def _fields(rng: random.Random, arguments: list[str], words: list[str]) -> tuple[list[str], list[str]]:
    """Four arguments, and the function's name with six words, all different."""
    chosen = rng.sample(arguments, ARGUMENTS_PER_FUNCTION)
    return chosen, rng.sample([word for word in words if word not in chosen], WORDS_PER_FUNCTION + 1)


def _text(template: str, fields: tuple[list[str], list[str]]) -> str:
    arguments, (function, *words) = fields
    return template.format(f=function, args=", ".join(arguments), a=arguments[0], b=arguments[1], w=words)
