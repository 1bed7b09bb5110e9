"""Sentences beside relevance of tokens that is easily misread: it is a small part of the target, or the first token has most of it."""

from __future__ import annotations

from collections.abc import Sequence

_SMALL, _MOST = 0.5, 0.5  # of the target; of the sizes of all tokens' relevance
_REMEDY = "Or compare with the mean embedding, which is the default (leave out --rules and --method)"


def token_notes(tokens: Sequence[str], relevance: Sequence[float], target: float | None, *, rules: str) -> list[str]:
    """What a reader must know of these numbers; empty where there is nothing.

    Args:
        tokens: As text.
        relevance: Of each token.
        target: What relevance should add up to; None for scores that have no unit.
        rules: The ruleset or method, by name.
    """
    found, size = [], sum(map(abs, relevance))
    if target is not None and abs(sum(relevance)) < _SMALL * abs(target):
        found.append(
            f"The tokens carry {sum(relevance):.2f} of {target:.2f}, less than half: under {rules} the rest stays inside the model, where "
            f"the account says. {_REMEDY}, where relevance adds up to the difference of the two."
        )
    if len(relevance) > 1 and abs(relevance[0]) > _MOST * size:
        found.append(
            f"The first token, “{tokens[0].strip() or '␣'}”, has {abs(relevance[0]) / size:.0%} of all relevance: attention rests on the "
            f"first token where it has nothing to do. Compare the other tokens among themselves. {_REMEDY}, which begin with the same "
            "token where the model has a token that begins a text."
        )
    return found
