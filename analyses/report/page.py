"""The report as one HTML page: a story from the question to how the answer was checked."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pandas as pd

from analyses.evaluation.agreement import correlation_in_words
from analyses.report.circuit_section import circuit_section
from analyses.report.findings import TOP_HEADS, Findings
from analyses.report.intervals import interval_section
from analyses.report.summary import (
    headline,
    in_short,
    model_name,
    moves_in_words,
    number,
    odds,
    pairs_in_words,
    path_in_words,
    predictions_in_words,
    unexplained_in_words,
    unit,
)
from analyses.views import Page, conservation_view, head_comparison_view, head_flow_view, layer_view, scatter_view, token_view

_PATHS_SHOWN = 5
_HEADS_TOLD = 5
_SINKS_SEEN = 1e-4  # share of the target from which a sink is worth a column


def report_page(findings: Findings, command: str) -> Page:
    """The page; `command` is what to type to get it again."""
    page = Page(headline(findings), f"{_sentence(model_name(findings))} on {findings.question.title}: {findings.question.words}.")
    in_short(page, findings)
    _question(page, findings)
    _words(page, findings)
    _layers(page, findings)
    _heads(page, findings)
    interval_section(page, findings)
    _flows(page, findings)
    _graph(page, findings)
    circuit_section(page, findings)
    _account(page, findings)
    _how(page, findings, command)
    return page


def _sentence(text: str) -> str:
    """A beginning of a sentence; names of models stay as they are written."""
    return text.replace("the ", "The ", 1) if text.startswith("the ") else text


def _question(page: Page, findings: Findings) -> None:
    page.heading("What is explained")
    label = "One of the prompts" if findings.has_many_pairs else "The prompt"
    if findings.question.baseline:
        page.quote(findings.prompt, label)
    else:
        page.quote(findings.prompt, label, against=findings.counterpart)
        page.quote(findings.counterpart, "Its counterpart: the same, but for what decides the answer", against=findings.prompt)
    words = [f"“{text.strip() or '␣'}”" for text in findings.asked]
    facts = {"The number explained": f"the logit of {' less that of '.join(words)}" if unit(findings) == "logits" else findings.target}
    facts["On this prompt"] = number(findings.value) + (f": {odds(findings)}" if odds(findings) else "")
    if findings.reference_value is not None:
        facts["On the mean embedding" if findings.question.baseline else "On its counterpart"] = number(findings.reference_value)
    facts["What the model says next"] = predictions_in_words(findings)
    if findings.has_many_pairs:
        means = number(float(findings.clean.mean())), number(float(findings.corrupt.mean()))
        facts[f"Mean over {findings.n_pairs} pairs"] = f"{means[0]} on the prompts, {means[1]} on the counterparts"
    page.facts(facts)


def _words(page: Page, findings: Findings) -> None:
    page.heading("Which words matter")
    page.prose(
        "Each word is coloured by its share of that number: **blue** words speak for the answer, **red** ones against it, pale ones hardly "
        "count. Point at a word to see its share."
    )
    for name, relevance in findings.words.items():
        how, total = name.split(": ", 1)[1], number(float(relevance.sum()))
        captions = {
            "against the mean embedding": "Each word is compared with the mean of all words' embeddings in its place. The shares add up to "
            f"{total}: by so much is the number larger here than there.",
            "against the counterpart": "Only words that differ from the counterpart can count. The shares add up to "
            f"{total}: by so much is the number larger here than there.",
            "the prompt on its own": f"Compared with nothing. The shares add up to {total} of {number(findings.value)}; the "
            "account below says where the rest stayed.",
        }
        page.view(token_view(findings.tokens, relevance, title=f"The words, {how}"), captions[how])
        for note in findings.notes(name):
            page.prose(note)


def _layers(page: Page, findings: Findings) -> None:
    page.heading("How it travels through the layers")
    page.prose(
        "Read from the bottom up. At the bottom relevance sits on the words; at the top it has reached the last position, where the model "
        "speaks. Where it leaves one column for another, an attention head has carried it there."
    )
    page.view(layer_view(findings.tokens, findings.residual, title="Relevance at each position, layer by layer"))


def _heads(page: Page, findings: Findings) -> None:
    page.heading("Which attention heads did the work")
    swapped = "the run on the prompt and one on random words" if findings.question.baseline else "prompt and counterpart"
    page.prose(
        f"Relevance gives all {len(findings.heads)} heads a number after one backward pass. **Activation patching** measures them the slow "
        f"way: swap one head's output between {swapped}, run the model again, and see how far the number moves, in both directions. "
        + (
            f"Over {pairs_in_words(findings, findings.n_pairs)} the two agree with a Pearson correlation of "
            f"**{correlation_in_words(findings.pearson)}** (Spearman {correlation_in_words(findings.spearman)}; 1 would be perfect)."
            if len(findings.heads) > 1
            else "This model has one head, so there is nothing to correlate."
        )
    )
    page.table(head_table(findings), _heads_caption(findings), bars=["relevance", "patching"])
    if len(findings.labels.columns) > 1:
        page.table(findings.labels, f"What they write; {findings.labels_note}.")
    else:
        page.quote(findings.labels_note)
    page.view(
        head_comparison_view(_grid(findings, "relevance"), _grid(findings, "patching"), title="All heads, layer by layer"),
        "Where the third map is pale, the two agree.",
    )
    if len(findings.heads) < 2:
        return
    page.view(
        scatter_view(
            findings.heads[["head", "patching", "relevance"]],
            "patching",
            "relevance",
            label="head",
            title="Each head: relevance against patching",
        ),
        "One point per head; on the dashed line both say the same. Above it relevance gives a head more than patching does, which changes "
        "one head at a time and so misses what others can take over.",
    )


def _heads_caption(findings: Findings) -> str:
    several = f" ± is the standard error over {pairs_in_words(findings, findings.n_pairs)}." if "±" in head_table(findings) else ""
    stable = f" Over resampled pairs: {findings.stability}." if findings.has_many_pairs else ""
    return f"The heads that count most, in {unit(findings)}.{several}{stable}"


def head_table(findings: Findings, top: int = TOP_HEADS) -> pd.DataFrame:
    """The heads with the largest relevance, patching beside them, and what they do most."""
    shown = findings.heads.head(top)
    table = pd.DataFrame({"head": shown["head"], "relevance": shown["relevance"]})
    if shown["standard_error"].notna().all():
        table["±"] = shown["standard_error"]
    table["patching"] = shown["patching"]
    if findings.n_pairs > 1:
        table[f"in the top {findings.top_k}"] = [f"{share:.0%} of pairs" for share in shown["top_share"]]
    if findings.flow is not None:
        moves = [findings.strongest_move(layer, index) for layer, index in zip(shown["layer"], shown["index"], strict=True)]
        table["carries most from → to"] = moves
    return table.reset_index(drop=True)


def _flows(page: Page, findings: Findings) -> None:
    page.heading("What those heads do")
    if findings.flow is None:
        page.prose("What they carry from word to word cannot be told on this model:")
        page.quote(findings.missing.get("flow", ""))
        return
    text = (
        "A head takes information from one word (source, across) to another (destination, down). A blue cell is relevance moved towards "
        "the answer, a red one against it. Point at a head to enlarge it, click to keep it."
    )
    page.prose(text + (" This is the one prompt above; the ranking is over all pairs." if findings.has_many_pairs else ""))
    ranked = findings.heads.head(8)
    told = ranked.head(_HEADS_TOLD)
    page.facts(
        {
            head: moves_in_words(findings, layer, index)
            for head, layer, index in zip(told["head"], told["layer"], told["index"], strict=True)
        }
    )
    flow = np.stack(
        [findings.flow[layer, index].double().cpu().numpy() for layer, index in zip(ranked["layer"], ranked["index"], strict=True)]
    )
    causal = not bool(findings.flow.triu(1).any())  # heads of encoders look ahead
    page.view(
        head_flow_view(
            findings.tokens, flow, names=list(ranked["head"]), top=8, causal=causal, title="Relevance flow of the heads that count most"
        )
    )


def _graph(page: Page, findings: Findings) -> None:
    if findings.graph is None and "graph" not in findings.missing:
        return
    page.heading("The whole way, from the words to the answer")
    if findings.graph is None:
        page.prose("The connections between the parts of this model cannot be told apart:")
        page.quote(findings.missing["graph"])
        return
    page.prose(
        f"Every part reads from parts before it. These are the {len(findings.graph.edges)} strongest edges, words below, answer on top: "
        "the wider, the more relevance an edge carries, blue for the answer and red against it. Point at a part to see its share, click to "
        "open it, move the slider to see fewer edges."
    )
    page.view(findings.graph.show())
    paths = findings.graph.paths(_PATHS_SHOWN)
    shown = pd.DataFrame(
        {
            "share": [f"{share:.1%}".replace("-", "−") for share in paths["share"]],
            "path": [path_in_words(path, findings.tokens) for path in paths["path"]],
        }
    )
    page.table(
        shown,
        "The strongest ways from a word to the answer, and the share of the number that takes each. A head entered by its **value** moves "
        "what stands there; by its **key** or **query**, it attends because of it.",
    )


def _account(page: Page, findings: Findings) -> None:
    page.heading("Does it add up?")
    sinks = account_sinks(findings)
    what = "the number" if findings.reference_value is None else "the difference between the two runs"
    text = (
        f"Relevance is an account: what leaves the answer must arrive at the words or be booked somewhere on the way. Here {what} is "
        f"{number(findings.explained)}, and the account leaves at most {unexplained_in_words(findings)} of it open at any layer."
    )
    if not sinks:
        text += " Nothing stays behind on the way: every layer holds the whole of it."
    page.prose(text)
    if sinks:
        page.view(conservation_view(findings.account), "Bars: what stays behind at each layer. Line: what goes on to the layers below.")
    account = findings.account[["layer", "value", "relevance", *sinks, "unexplained"]]
    page.table(account.rename(columns=lambda name: name.replace("_", " ")), "The account, from the embeddings to the output.")


def account_sinks(findings: Findings) -> list[str]:
    """Columns of the account in which something stayed behind."""
    fixed = ("layer", "value", "relevance", "unexplained")
    scale = max(abs(findings.explained), 1e-30)
    return [name for name in findings.account.columns if name not in fixed and findings.account[name].abs().max() > _SINKS_SEEN * scale]


def _how(page: Page, findings: Findings, command: str) -> None:
    page.heading("How this was computed")
    versions = ", ".join(f"{name} {version(name)}" for name in ("lens-relevance", "transformer-lens", "transformers", "torch"))
    page.facts(
        {
            "Model": f"{model_name(findings)} ({findings.info['architecture']}, {findings.info['dtype']}, {findings.info['device']})",
            "Ruleset": findings.rules,
            "Pairs of prompts": findings.n_pairs,
            "Seconds": ", ".join(f"{part} {taken:.1f}" for part, taken in findings.seconds.items()),
            "Versions": versions,
            "To do it again": command,
        }
    )
    if findings.question.pairs.dropped:
        page.prose(f"Left out because they do not fit the tokenizer: {', '.join(findings.question.pairs.dropped)}.")
    page.details("All heads", findings.heads.drop(columns="index"))


def _grid(findings: Findings, column: str) -> np.ndarray:
    return findings.heads.pivot(index="layer", columns="index", values=column).to_numpy(float)


__all__ = ["account_sinks", "head_table", "report_page"]
