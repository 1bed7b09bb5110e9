"""The page on known roles, in Markdown: what was asked, the tables, and how far to trust them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.circuits.recovery import area_under_roc
from analyses.known_roles import reactions, speech
from analyses.known_roles.ranking import RESAMPLES

FOLLOWS = 0.9  # from this correlation on, a head's attention is said to follow the sound
WANTED_AUROC, WANTED_RANK = 0.9, 3
Measured = tuple[pd.DataFrame, np.ndarray]


def page(heard: Measured, mapped: Measured, *, n_words: int, when: str) -> str:
    """The page.

    Args:
        heard: the table of Whisper and the roles of its heads [layer, head].
        mapped: the same of rxnmapper's ALBERT.
        n_words: tokens that Whisper wrote.
        when: date and versions.
    """
    role, looks = heard[1], mapped[1]
    listed = np.zeros(role.shape, dtype=bool)
    listed[tuple(np.array(speech.KNOWN).T)] = True
    follows = role >= FOLLOWS
    n_runs = len(reactions.REACTIONS) * len(reactions.SUBSTITUENTS)
    first = ", ".join(f"{layer}.{head} {looks[layer, head]:.2f}" for layer, head in _best(looks, 5))
    return f"""# Heads of a known role: does relevance rank them first?

    python -m analyses.known_roles --whisper FOLDER --rxnmapper FOLDER --out docs/measurements/known_roles.md

Measured on {when}. Two trained models, both MIT, for which TransformerLens has no adapter, so that they also show what
[HookedModule](../guides/my_own_model.md) is for. Every method that was tried is in the tables, nothing was selected on these examples,
and intervals (95 %) are from {RESAMPLES} bootstrap resamples of the examples. *signed*: mean score over examples; *absolute*: mean
magnitude. *patching*: Spearman's correlation of the magnitudes with single-head activation patching (mean of denoising and noising). A
name with *pair* compares with the counterpart's run. *depth* ranks later layers first, and looks at nothing.

## Whisper tiny.en: heads that follow the sound

{len(speech.SENTENCES)} sentences spoken by espeak-ng; the model writes them down ({n_words} tokens), and the log-probability of what it
wrote is explained. The counterpart hears another sentence. *AUROC*: of the {len(speech.KNOWN)} heads that the model's makers list as
alignment heads among the {role.size} that read the encoder. *follows*: Spearman's correlation, over these {role.size} heads, with how well
a head's attention follows the sound (the frame looked at most, against the word's place).

An AUROC of {WANTED_AUROC} or more: {_reached(heard[0]["auroc"] >= WANTED_AUROC, heard[0])}.

{_table(heard[0], "auroc")}

How well each head's attention follows the sound (listed heads in bold):

{_heads(role, listed)}

By this measure {follows.sum()} heads follow the sound ({FOLLOWS} or more), {(follows & ~listed).sum()} of them unlisted, and of the listed
ones {(listed & ~follows).sum()} do not: the measure itself gives the list an AUROC of {area_under_roc(role.ravel(), listed.ravel()):.2f}.
Single-head patching gives it {_best_area(heard[0], "noising", "denoising"):.2f} at best, the order of the layers alone
{_best_area(heard[0], "depth"):.2f}. The list says which heads a timestamp is best read from, not which heads follow the sound.

## rxnmapper's ALBERT: the head that maps atoms

{len(reactions.REACTIONS)} reactions x {len(reactions.SUBSTITUENTS)} substituents ({n_runs} runs): an atom of the product is masked, and
the logit of the right atom less that of the counterpart's is explained; the counterpart has another atom in the reactant. *rank*: of head
10.5 among {looks.size}, with the 95th percentile over resamples. *looks*: Spearman's correlation, over these {looks.size} heads, with the
attention from the masked atom to the same atom of the reactant.

Head 10.5 among the first {WANTED_RANK}: {_reached(mapped[0]["rank"] <= WANTED_RANK, mapped[0])}.

{_table(mapped[0], "rank")}

Attention from the masked atom to its counterpart, the first five heads: {first}.
"""


def _best_area(table: pd.DataFrame, *methods: str) -> float:
    return float(table.loc[table["method"].isin(methods), "auroc"].max())


def _reached(where: pd.Series[bool], table: pd.DataFrame) -> str:
    """The methods and readings that reach what was wanted, of all that were tried."""
    named = [f"`{row.method}` ({row.reading})" for row in table[where].itertuples()]
    return f"{len(named)} of {len(table)} methods and readings" + (f", {', '.join(named)}" if named else "")


def _table(table: pd.DataFrame, by: str) -> str:
    """AUROC or rank, each with its interval, in the order of the methods' best reading."""
    best = table.groupby("method")[by].transform("max" if by == "auroc" else "min")
    ordered = table.assign(best=best).sort_values(["best", "method", "reading"], ascending=[by == "rank", True, False], kind="stable")
    first, role = ("AUROC (95 %)", "follows (95 %)") if by == "auroc" else ("rank of 10.5", "looks (95 %)")
    lines = [f"| method | reading | {first} | {role} | patching |", "|---|---|---|---|---|"]
    for row in ordered.itertuples():
        found = f"{row.auroc:.3f} ({row.low:.3f} to {row.high:.3f})" if by == "auroc" else f"{row.rank:.0f} ({row.rank_high:.0f})"
        does = f"{row.role:.2f} ({row.role_low:.2f} to {row.role_high:.2f})"
        lines.append(f"| `{row.method}` | {row.reading} | {found} | {does} | {row.patching:.2f} |")
    return "\n".join(lines)


def _heads(values: np.ndarray, bold: np.ndarray) -> str:
    lines = [f"| layer | {' | '.join(f'head {i}' for i in range(values.shape[1]))} |", "|" + "---|" * (values.shape[1] + 1)]
    for layer, row in enumerate(values):
        cells = [f"**{value:.2f}**" if known else f"{value:.2f}" for value, known in zip(row, bold[layer], strict=True)]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _best(values: np.ndarray, n: int) -> list[tuple[int, int]]:
    order = np.argsort(-values, axis=None)[:n]
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, values.shape), strict=True)]
