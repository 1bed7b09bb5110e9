"""The report as one HTML page: a story from the question to how the answer was checked."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pandas as pd

from analyses.evaluation.agreement import correlation_in_words
from analyses.report.circuit_section import circuit_section
from analyses.report.findings import Findings
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

TOP_HEADS = 10
_PATHS_SHOWN = 5
_HEADS_TOLD = 5
_SINKS_SEEN = 1e-4  # share of the target from which a sink is worth a column


def report_page(found: Findings, command: str) -> Page:
    """The page; `command` is what to type to get it again."""
    page = Page(headline(found), f"{_sentence(model_name(found))} on {found.question.title}: {found.question.words}.")
    in_short(page, found)
    _question(page, found)
    _words(page, found)
    _layers(page, found)
    _heads(page, found)
    _flows(page, found)
    _graph(page, found)
    circuit_section(page, found)
    _account(page, found)
    _how(page, found, command)
    return page


def _sentence(text: str) -> str:
    """A beginning of a sentence; names of models stay as they are written."""
    return text.replace("the ", "The ", 1) if text.startswith("the ") else text


def _question(page: Page, found: Findings) -> None:
    page.heading("What is explained")
    label = "One of the prompts" if found.has_many_pairs else "The prompt"
    if found.question.baseline:
        page.quote(found.prompt, label)
    else:
        page.quote(found.prompt, label, against=found.counterpart)
        page.quote(found.counterpart, "Its counterpart: the same, but for what decides the answer", against=found.prompt)
    words = [f"“{text.strip() or '␣'}”" for text in found.asked]
    facts = {"The number explained": f"the logit of {' less that of '.join(words)}" if unit(found) == "logits" else found.target}
    facts["On this prompt"] = number(found.value) + (f": {odds(found)}" if odds(found) else "")
    if found.reference_value is not None:
        facts["On random words" if found.question.baseline else "On its counterpart"] = number(found.reference_value)
    facts["What the model says next"] = predictions_in_words(found)
    if found.has_many_pairs:
        means = number(float(found.clean.mean())), number(float(found.corrupt.mean()))
        facts[f"Mean over {found.n_pairs} pairs"] = f"{means[0]} on the prompts, {means[1]} on the counterparts"
    page.facts(facts)


def _words(page: Page, found: Findings) -> None:
    page.heading("Which words matter")
    page.prose(
        "Each word is coloured by its share of that number: **blue** words speak for the answer, **red** ones against it, pale ones hardly "
        "count. Point at a word to see its share."
    )
    for name, relevance in found.words.items():
        how, total = name.split(": ", 1)[1], number(float(relevance.sum()))
        captions = {
            "against random words": f"Each word is compared with random words in its place. The shares add up to {total}: by so much is "
            "the number larger here than among random words.",
            "against the counterpart": "Only words that differ from the counterpart can count. The shares add up to "
            f"{total}: by so much is the number larger here than there.",
            "the prompt on its own": f"Compared with nothing. The shares add up to {total} of {number(found.value)}; the "
            "account below says where the rest stayed.",
        }
        page.view(token_view(found.tokens, relevance, title=f"The words, {how}"), captions[how])


def _layers(page: Page, found: Findings) -> None:
    page.heading("How it travels through the layers")
    page.prose(
        "Read from the bottom up. At the bottom relevance sits on the words; at the top it has reached the last position, where the model "
        "speaks. Where it leaves one column for another, an attention head has carried it there."
    )
    page.view(layer_view(found.tokens, found.residual, title="Relevance at each position, layer by layer"))


def _heads(page: Page, found: Findings) -> None:
    page.heading("Which attention heads did the work")
    swapped = "the run on the prompt and one on random words" if found.question.baseline else "prompt and counterpart"
    page.prose(
        f"Relevance gives all {len(found.heads)} heads a number after one backward pass. **Activation patching** measures them the slow "
        f"way: swap one head's output between {swapped}, run the model again, and see how far the number moves, in both directions. "
        + (
            f"Over {pairs_in_words(found, found.n_pairs)} the two agree with a Pearson correlation of "
            f"**{correlation_in_words(found.pearson)}** (Spearman {correlation_in_words(found.spearman)}; 1 would be perfect)."
            if len(found.heads) > 1
            else "This model has one head, so there is nothing to correlate."
        )
    )
    page.table(head_table(found), _heads_caption(found), bars=["relevance", "patching"])
    page.view(
        head_comparison_view(_grid(found, "relevance"), _grid(found, "patching"), title="All heads, layer by layer"),
        "Where the third map is pale, the two agree.",
    )
    if len(found.heads) < 2:
        return
    page.view(
        scatter_view(
            found.heads[["head", "patching", "relevance"]],
            "patching",
            "relevance",
            label="head",
            title="Each head: relevance against patching",
        ),
        "One point per head; on the dashed line both say the same. Above it relevance gives a head more than patching does, which changes "
        "one head at a time and so misses what others can take over.",
    )


def _heads_caption(found: Findings) -> str:
    several = f" ± is the standard error over {pairs_in_words(found, found.n_pairs)}." if "±" in head_table(found) else ""
    return f"The heads that count most, in {unit(found)}.{several}"


def head_table(found: Findings, top: int = TOP_HEADS) -> pd.DataFrame:
    """The heads with the largest relevance, patching beside them, and what they do most."""
    shown = found.heads.head(top)
    table = pd.DataFrame({"head": shown["head"], "relevance": shown["relevance"]})
    if shown["standard_error"].notna().all():
        table["±"] = shown["standard_error"]
    table["patching"] = shown["patching"]
    if found.n_pairs > 1:
        table[f"in the top {found.top_k}"] = [f"{share:.0%} of pairs" for share in shown["top_share"]]
    if found.flow is not None:
        moves = [found.strongest_move(layer, index) for layer, index in zip(shown["layer"], shown["index"], strict=True)]
        table["carries most from → to"] = moves
    return table.reset_index(drop=True)


def _flows(page: Page, found: Findings) -> None:
    page.heading("What those heads do")
    if found.flow is None:
        page.prose("What they carry from word to word cannot be told on this model:")
        page.quote(found.missing.get("flow", ""))
        return
    text = (
        "A head takes information from one word (source, across) to another (destination, down). A blue cell is relevance moved towards "
        "the answer, a red one against it. Point at a head to enlarge it, click to keep it."
    )
    page.prose(text + (" This is the one prompt above; the ranking is over all pairs." if found.has_many_pairs else ""))
    ranked = found.heads.head(8)
    told = ranked.head(_HEADS_TOLD)
    page.facts(
        {head: moves_in_words(found, layer, index) for head, layer, index in zip(told["head"], told["layer"], told["index"], strict=True)}
    )
    flow = np.stack(
        [found.flow[layer, index].double().cpu().numpy() for layer, index in zip(ranked["layer"], ranked["index"], strict=True)]
    )
    causal = not bool(found.flow.triu(1).any())  # heads of encoders look ahead
    page.view(
        head_flow_view(
            found.tokens, flow, names=list(ranked["head"]), top=8, causal=causal, title="Relevance flow of the heads that count most"
        )
    )


def _graph(page: Page, found: Findings) -> None:
    if found.graph is None and "graph" not in found.missing:
        return
    page.heading("The whole way, from the words to the answer")
    if found.graph is None:
        page.prose("The connections between the parts of this model cannot be told apart:")
        page.quote(found.missing["graph"])
        return
    page.prose(
        f"Every part reads from parts before it. These are the {len(found.graph.edges)} strongest edges, words below, answer on top: "
        "the wider, the more relevance an edge carries, blue for the answer and red against it. Point at a part to see its share, click to "
        "open it, move the slider to see fewer edges."
    )
    page.view(found.graph.show())
    paths = found.graph.paths(_PATHS_SHOWN)
    shown = pd.DataFrame(
        {
            "share": [f"{share:.1%}".replace("-", "−") for share in paths["share"]],
            "path": [path_in_words(path, found.tokens) for path in paths["path"]],
        }
    )
    page.table(
        shown,
        "The strongest ways from a word to the answer, and the share of the number that takes each. A head entered by its **value** moves "
        "what stands there; by its **key** or **query**, it attends because of it.",
    )


def _account(page: Page, found: Findings) -> None:
    page.heading("Does it add up?")
    sinks = account_sinks(found)
    what = "the number" if found.reference_value is None else "the difference between the two runs"
    text = (
        f"Relevance is an account: what leaves the answer must arrive at the words or be booked somewhere on the way. Here {what} is "
        f"{number(found.explained)}, and the account leaves at most {unexplained_in_words(found)} of it open at any layer."
    )
    if not sinks:
        text += " Nothing stays behind on the way: every layer holds the whole of it."
    page.prose(text)
    if sinks:
        page.view(conservation_view(found.account), "Bars: what stays behind at each layer. Line: what goes on to the layers below.")
    account = found.account[["layer", "value", "relevance", *sinks, "unexplained"]]
    page.table(account.rename(columns=lambda name: name.replace("_", " ")), "The account, from the embeddings to the output.")


def account_sinks(found: Findings) -> list[str]:
    """Columns of the account in which something stayed behind."""
    fixed = ("layer", "value", "relevance", "unexplained")
    scale = max(abs(found.explained), 1e-30)
    return [name for name in found.account.columns if name not in fixed and found.account[name].abs().max() > _SINKS_SEEN * scale]


def _how(page: Page, found: Findings, command: str) -> None:
    page.heading("How this was computed")
    versions = ", ".join(f"{name} {version(name)}" for name in ("lens-relevance", "transformer-lens", "transformers", "torch"))
    page.facts(
        {
            "Model": f"{model_name(found)} ({found.info['architecture']}, {found.info['dtype']}, {found.info['device']})",
            "Ruleset": found.rules,
            "Pairs of prompts": found.n_pairs,
            "Seconds": ", ".join(f"{part} {taken:.1f}" for part, taken in found.seconds.items()),
            "Versions": versions,
            "To do it again": command,
        }
    )
    if found.question.pairs.dropped:
        page.prose(f"Left out because they do not fit the tokenizer: {', '.join(found.question.pairs.dropped)}.")
    page.details("All heads", found.heads.drop(columns="index"))


def _grid(found: Findings, column: str) -> np.ndarray:
    return found.heads.pivot(index="layer", columns="index", values=column).to_numpy(float)


__all__ = ["account_sinks", "head_table", "report_page"]
