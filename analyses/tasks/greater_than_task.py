"""Greater-than (Hanna et al. 2023, arXiv 2305.00586): "The war lasted from the year 1732 to the year 17" -> "33" or later."""

from __future__ import annotations

import random

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks.fitting import require_tokenizer, single_token_words, tokenize_rows
from analyses.tasks.later_years import LaterYears
from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError

EVENTS = ("war", "voyage", "project", "trial", "strike", "siege", "study", "campaign", "journey", "marriage", "dispute", "treaty", "reign")
CENTURIES = tuple(range(11, 18))
TEMPLATE = "The {event} lasted from the year {century}{year:02d} to the year {century}"
CORRUPT_YEAR = 1  # every possible end year is later


def greater_than(model: TransformerBridge, n: int = 32, seed: int = 0) -> PromptPairs:
    """Pairs of prompts that end in a century and ask for a year after the one named; the corrupt prompt names the year 01.

    Source: Hanna et al. 2023, arXiv 2305.00586.

    Raises:
        RelevanceError: the tokenizer does not split a year into its century and its last two digits (as GPT-2's does).
    """
    require_tokenizer(model, "greater_than")
    years, possible = _two_digit_years(model)
    if not possible:
        raise RelevanceError(
            "greater_than does not fit this tokenizer: it needs a token for the century and one for the last two digits of a year, "
            f"and 'the year 1732' becomes {model.to_str_tokens('the year 1732', prepend_bos=False)}"
        )
    events, dropped = single_token_words(model, EVENTS)
    if not events:
        raise RelevanceError(f"greater_than does not fit this tokenizer: no event is a single token (not: {', '.join(dropped)})")

    rng = random.Random(seed)
    clean, corrupt, later = [], [], []
    for _ in range(n):
        event, (century, start) = rng.choice(list(events)), rng.choice(possible)
        clean.append(TEMPLATE.format(event=event, century=century, year=start))
        corrupt.append(TEMPLATE.format(event=event, century=century, year=CORRUPT_YEAR))
        later.append([year > start for year in years])
    return PromptPairs(
        tokenize_rows(model, clean),
        tokenize_rows(model, corrupt),
        LaterYears(torch.tensor(list(years.values())), torch.tensor(later)),
        dropped=tuple(dropped),
    )


def _two_digit_years(model: TransformerBridge) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """Token ids of the years 0 to 99, and the (century, year) from 02 to 98 that are split into exactly these two tokens."""

    def ids(text: str) -> list[int]:
        return model.to_tokens(text, prepend_bos=False)[0].tolist()

    before = ids("the year")
    years: dict[int, int] = {}
    split: set[tuple[int, int]] = set()
    for century in CENTURIES:
        with_century = ids(f"the year {century}")
        if with_century[:-1] != before:
            continue
        for year in range(100):
            both = ids(f"the year {century}{year:02d}")
            if both[:-1] == with_century and both[-1] == years.setdefault(year, both[-1]):
                split.add((century, year))
    distinct = len(set(years.values())) == len(years)
    usable = sorted((century, year) for century, year in split if 2 <= year <= 98 and (century, CORRUPT_YEAR) in split)
    return dict(sorted(years.items())), usable if distinct else []
