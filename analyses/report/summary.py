"""The report in short, and the words and numbers that it is written in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from analyses.evaluation.agreement import correlation_in_words
from analyses.report.circuit import CircuitCheck
from analyses.report.findings import Findings
from analyses.views import Page

_READERS = {"q": "query", "k": "key", "v": "value"}
GLOSSARY = {
    "logit": "The model's score for one possible next token. A difference of 1 between two of them makes the one e = 2.7 times as likely "
    "as the other; what is explained here is counted in logits.",
    "relevance": "The share of the explained number that goes through one part of the model: positive if it speaks for the answer, "
    "negative if against it. Shares add up.",
    "counterpart": "A second prompt of equal length that leads to another answer. Relevance explains the difference between the two runs.",
    "attention head": "A part of a layer that moves information from one position of the text to another. L1H3 is head 3 of layer 1, both "
    "counted from 0.",
    "MLP": "The other part of a layer, which works on each position by itself.",
    "edge": "A connection from one part to another that reads from it; a head reads by its query (q), key (k) and value (v).",
    "activation patching": "The slow test: put the output that a part has on the counterpart into the run on the prompt (and the other way "
    "round), and see how far the number moves.",
    "circuit": "A few edges that are claimed to be enough for the answer.",
}


def number(value: float) -> str:
    """A number for running text: two decimals, a real minus sign."""
    return f"{value:+.2f}".replace("-", "−")


def unit(findings: Findings) -> str:
    """What relevance is counted in."""
    return "logits" if findings.asked and findings.target.startswith("logit") else "units of the target"


def pairs_in_words(findings: Findings, n: int) -> str:
    """How many pairs, and of what."""
    if findings.question.baseline:
        return f"{n} rows of random words"
    return f"{n} pairs" if n > 1 else "this pair"


def heads_in_words(findings: Findings) -> str:
    """How many heads there are."""
    return f"{len(findings.heads)} heads" if len(findings.heads) > 1 else "one head, which has nothing to correlate with"


def model_name(findings: Findings) -> str:
    """The model without the folders it lies in."""
    name = findings.info["model"].rstrip("/").rsplit("/", 1)[-1]
    return "the embedded model" if name == "embedded" else name or "the model"


def headline(findings: Findings) -> str:
    """The question that the page answers."""
    words = [f"“{text.strip() or '␣'}”" for text in findings.asked]
    return f"Why {' and not '.join(words)}?" if words else "What decides the answer?"


def odds(findings: Findings) -> str:
    """What a difference of logits means, in words; nothing for other targets."""
    if len(findings.asked) != 2:
        return ""
    likelier = findings.asked[0 if findings.value >= 0 else 1].strip()
    times = math.exp(min(abs(findings.value), 100.0))
    much = "more than a billion" if times > 1e9 else f"{float(f'{times:.2g}'):,.0f}" if times >= 10 else f"{times:.1f}"
    return f"“{likelier}” is {much} times as likely"


def predictions_in_words(findings: Findings) -> str:
    """The likeliest next tokens; those below half a percent only if there is nothing else."""
    shown = [(token, share) for i, (token, share) in enumerate(findings.predictions[:3]) if share >= 0.005 or i == 0]
    return ", ".join(f"“{token.strip() or '␣'}” {share:.0%}" for token, share in shown)


def word_shares(tokens: list[str], relevance: list[float]) -> list[tuple[str, float]]:
    """Pieces of a word as one, where the tokenizer marks beginnings by a space."""
    words: list[tuple[str, float]] = []
    marked = any(token.startswith(" ") for token in tokens)
    for token, share in zip(tokens, relevance, strict=True):
        if marked and words and token[:1].isalpha() and words[-1][0][-1:].isalpha():
            words[-1] = (words[-1][0] + token, words[-1][1] + share)
        else:
            words.append((token.strip() or "␣", share))
    return words


def unexplained(findings: Findings) -> float:
    """What the account cannot explain, at the worst layer, as a share of what is explained."""
    return float(findings.account["unexplained"].abs().max()) / max(abs(findings.explained), 1e-30)


def unexplained_in_words(findings: Findings) -> str:
    """That share, as people say it."""
    share = unexplained(findings)
    if share >= 0.01:
        return f"{share:.0%}"
    return f"one part in {float(f'{1 / share:.0e}'):,.0f}" if share else "nothing"


def moves_in_words(findings: Findings, layer: int, index: int) -> str:
    """What a head does in the example: its strongest move from word to word, the next if it is no trifle, and all it carries."""
    assert findings.flow is not None
    flow = findings.flow[layer, index].double().cpu()
    moves = []
    for place in flow.abs().flatten().topk(min(2, flow.numel())).indices.tolist():
        query, key = divmod(place, flow.shape[1])
        if abs(float(flow[query, key])) >= 0.1 * float(flow.abs().max()) > 0:
            names = [f"“{findings.tokens[i].strip() or '␣'}” ({i})" for i in (key, query)]
            moves.append(f"{number(float(flow[query, key]))} from {names[0]} to {names[1]}")
    return f"moves {' and '.join(moves)}; {number(float(flow.sum()))} in all" if moves else "moves nothing here"


def path_in_words(path: str, tokens: Sequence[str]) -> str:
    """A path of a flow graph, `embed@10 -> L0.mlp.in@10 -> L0.mlp@10 -> L1H3.k@10 -> L1H3@14 -> logits@14`, to be read.

    A reader and its component become one step, and a place is named where the path gets there.
    """
    steps: list[str] = []
    here = None
    for node in path.split(" -> "):
        name, _, place = node.rpartition("@")
        component, _, reader = name.rpartition(".")
        if component and reader in _READERS:
            steps.append(f"{component} by its {_READERS[reader]}")
            continue
        if reader == "in":
            continue
        if not (steps and steps[-1].startswith(f"{name} by")):
            steps.append("the answer" if name == "logits" else name)
        if place != here and name != "logits":
            token = tokens[int(place)].strip() or "␣"
            steps[-1] = f"“{token}” ({place})" if here is None else f"{steps[-1]}, to “{token}” ({place})"
        here = place
    return " → ".join(steps)


def in_short(page: Page, findings: Findings) -> None:
    """The results at a glance, and what the words on the page mean."""
    tiles = {
        "What the model says next": _says(findings),
        "The word that counts most": _word(findings),
        "The heads that count most": _heads(findings),
    }
    tiles["Does the slow test agree?"] = (
        f"r = {correlation_in_words(findings.pearson)}".replace("-", "−"),
        f"correlation with activation patching over {heads_in_words(findings)}; 1 would be perfect",
    )
    if findings.circuit is not None:
        tiles["How many edges are enough?"] = _edges(findings.circuit, findings.rules)
    share = unexplained(findings)
    tiles["Does it add up?"] = (
        ("Yes", f"the account leaves at most {unexplained_in_words(findings)} open at any layer")
        if share < 0.01
        else (f"{1 - share:.0%}", f"{share:.0%} of the number is unexplained")
    )
    page.tiles(tiles)
    page.details("Words used on this page", pd.DataFrame({"word": list(GLOSSARY), "meaning": list(GLOSSARY.values())}))


def _says(findings: Findings) -> tuple[str, str]:
    if not findings.has_many_pairs:
        return predictions_in_words(findings), odds(findings)
    right = f"right on {float((findings.clean > 0).double().mean()):.0%} of {findings.n_pairs} prompts" if len(findings.asked) == 2 else ""
    return predictions_in_words(findings), right


def _word(findings: Findings) -> tuple[str, str]:
    """The strongest word, in each way of looking at the words."""
    lines, first = [], ""
    for name, relevance in findings.words.items():
        shares = word_shares(findings.tokens, relevance.tolist())
        word, share = max(shares, key=lambda one: abs(one[1]))
        first = first or f"“{word}”"
        which = "" if f"“{word}”" == first else f"“{word}” "
        lines.append(f"{which}{number(share)} of {number(float(relevance.sum()))}, {name.split(': ', 1)[1]}")
    return first, "; ".join(lines)


def _edges(check: CircuitCheck, method: str) -> tuple[str, str]:
    if check.enough(method) < check.n_edges:
        shown = f"{check.enough(method)} of {check.n_edges}"
        return shown, f"keep nine tenths of the effect; taken at random it takes {check.enough('random')}"
    (k, share), (_, by_chance) = check.largest_part(method), check.largest_part("random")
    part = f"{k} of {check.n_edges} bring back {share:.0%} of the effect, taken at random {by_chance:.0%}"
    return "Only all of them", part.replace("-", "−")


def _heads(findings: Findings) -> tuple[str, str]:
    best = findings.heads.head(3)
    shares = ", ".join(number(share) for share in best["relevance"])
    return ", ".join(best["head"]), f"{shares} {unit(findings)}" + (
        f", mean over {findings.n_pairs} pairs" if findings.has_many_pairs else ""
    )
