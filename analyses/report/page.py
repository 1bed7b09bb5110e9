"""The report as one HTML page: a story from the question to how the answer was checked."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pandas as pd

from analyses.report.findings import Findings
from analyses.views import (
    Page,
    conservation_view,
    head_comparison_view,
    head_flow_view,
    layer_view,
    scatter_view,
    token_view,
)

TOP_HEADS = 10
_SINKS_SEEN = 1e-4  # share of the target from which a sink is worth a column


def report_page(found: Findings, command: str) -> Page:
    """The page; `command` is what to type to get it again."""
    page = Page(f"What {_model(found)} looks at", f"{found.question.title}: {found.question.words}")
    _question(page, found)
    _in_short(page, found)
    _words(page, found)
    _layers(page, found)
    _heads(page, found)
    _flows(page, found)
    _graph(page, found)
    _account(page, found)
    _how(page, found, command)
    return page


def _model(found: Findings) -> str:
    """The model without the folders it lies in."""
    name = found.info["model"].rstrip("/").rsplit("/", 1)[-1]
    return "the embedded model" if name == "embedded" else name or "the model"


def number(value: float) -> str:
    """A number for running text: two decimals, a real minus sign."""
    return f"{value:+.2f}".replace("-", "−")


def _question(page: Page, found: Findings) -> None:
    page.heading("What is explained")
    page.quote(found.prompt, "One of the prompts" if found.has_many_pairs else "The prompt")
    if not found.question.baseline:
        page.quote(found.counterpart, "Its counterpart: the same, but for the words that decide the answer")
    best = predictions_in_words(found)
    facts = {
        "The number that is explained": found.target,
        "Its value on this prompt": number(found.value),
        "What the model says next": best,
    }
    if found.has_many_pairs:
        facts["Mean over all pairs"] = f"{number(float(found.clean.mean()))}; on the counterparts {number(float(found.corrupt.mean()))}"
        facts["Pairs the model gets right"] = f"{float((found.clean > 0).double().mean()):.0%}"
    page.facts(facts)


def predictions_in_words(found: Findings) -> str:
    """The likeliest next tokens; those below half a percent only if there is nothing else."""
    shown = [(token, share) for i, (token, share) in enumerate(found.predictions[:3]) if share >= 0.005 or i == 0]
    return ", ".join(f"“{token.strip() or token!r}” {share:.0%}" for token, share in shown)


def _in_short(page: Page, found: Findings) -> None:
    relevance = next(iter(found.words.values()))
    shares = sorted(word_shares(found.tokens, relevance.tolist()), key=lambda share: -abs(share[1]))[:3]
    shares = [(word, share) for word, share in shares if abs(share) >= 0.05 * abs(shares[0][1])]
    heads = [f"{head} ({number(relevance)})" for head, relevance in found.heads[["head", "relevance"]].head(3).itertuples(index=False)]
    page.heading("In short")
    page.facts(
        {
            "Words that count most": ", ".join(f"“{word}” ({number(share)})" for word, share in shares),
            "Heads that count most": ", ".join(heads),
            "Do the heads stand the test?": f"Pearson {found.pearson:.3f} with activation patching, {found.n_pairs} pairs",
            "Does it add up?": f"to {unexplained(found):.0e} of the number"
            if unexplained(found) < 0.01
            else f"{unexplained(found):.0%} is unexplained",
        }
    )


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


def unexplained(found: Findings) -> float:
    """What the account cannot explain, at the worst layer, as a share of what is explained."""
    return float(found.account["unexplained"].abs().max()) / max(abs(found.explained), 1e-30)


def _words(page: Page, found: Findings) -> None:
    page.heading("Which words matter")
    page.prose(
        "Each word is coloured by its share of that number: **blue** words speak for the answer, **red** ones against it, pale ones hardly "
        "count. Hover over a word to see its share."
    )
    for name, relevance in found.words.items():
        how, total = name.split(": ", 1)[1], number(float(relevance.sum()))
        captions = {
            "against random words": f"Every word is compared with random words in its place. The shares add up to {total}: by so much the "
            "number is larger here than among random words.",
            "against the counterpart": "Only the words that differ from the counterpart can count. The shares add up to "
            f"{total}: by so much the number is larger here than there.",
            "the prompt on its own": f"On its own, compared with nothing. The shares add up to {total} of {number(found.value)}; the "
            "account below says where the rest stayed.",
        }
        page.view(token_view(found.tokens, relevance, title=f"The words, {how}"), captions[how])


def _layers(page: Page, found: Findings) -> None:
    page.heading("How it travels through the layers")
    page.prose(
        "Read from the bottom up. At the bottom relevance sits on the words; at the top it has reached the last position, where the model "
        "speaks. A jump from one column to another is attention at work."
    )
    page.view(layer_view(found.tokens, found.residual, title="Relevance at each position, layer by layer"))


def _heads(page: Page, found: Findings) -> None:
    page.heading("Which attention heads did the work")
    page.prose(
        f"Relevance gives every head a number after one backward pass. **Activation patching** measures the same thing the hard way: swap "
        f"the head's output between the two prompts, run the model again, and see how far the number moves "
        f"({len(found.heads)} heads, both directions, {found.n_pairs} pairs). "
        f"The two agree with a Pearson correlation of **{found.pearson:.3f}** (Spearman {found.spearman:.3f})."
    )
    page.table(head_table(found), "The heads that count most. ± is the standard error over pairs.", bars=["relevance", "patching"])
    page.view(head_comparison_view(_grid(found, "relevance"), _grid(found, "patching"), title="All heads, layer by layer"))
    page.view(
        scatter_view(
            found.heads[["head", "patching", "relevance"]], "patching", "relevance", "head", "Each head: relevance against patching"
        ),
        "On the dashed line both say the same.",
    )


def head_table(found: Findings, top: int = TOP_HEADS) -> pd.DataFrame:
    """The heads with the largest relevance, patching beside them, and what they do most."""
    shown = found.heads.head(top)
    table = pd.DataFrame({"head": shown["head"], "relevance": shown["relevance"]})
    if shown["standard_error"].notna().all():
        table["±"] = shown["standard_error"]
    table["patching"] = shown["patching"]
    table["in the top of"] = [f"{share:.0%} of pairs" for share in shown["top_share"]]
    if found.flow is not None:
        table["carries most from → to"] = [
            found.strongest_move(layer, index) for layer, index in zip(shown["layer"], shown["index"], strict=True)
        ]
    return table.reset_index(drop=True)


def _flows(page: Page, found: Findings) -> None:
    if found.flow is None:
        return
    page.heading("What those heads do")
    text = (
        "A head moves information from one word (key, across) to another (query, down). Blue is relevance moved towards the answer. Point "
        "at a head to enlarge it."
    )
    page.prose(text + (" This is the one prompt above; the ranking is over all pairs." if found.has_many_pairs else ""))
    ranked = found.heads.head(8)
    flow = np.stack(
        [found.flow[layer, index].double().cpu().numpy() for layer, index in zip(ranked["layer"], ranked["index"], strict=True)]
    )
    page.view(head_flow_view(found.tokens, flow, names=list(ranked["head"]), top=8, title="Relevance flow of the heads that count most"))


def _graph(page: Page, found: Findings) -> None:
    if found.graph is None:
        return
    page.heading("The whole way, from the words to the answer")
    page.prose(
        f"Every component reads from others before it. These are the {len(found.graph.edges)} strongest edges, words below, answer on top: "
        "width is how much relevance an edge carries, blue for the answer and red against it. Point at a node to see its share, click to "
        "open it, move the slider to see more or less."
    )
    page.view(found.graph.show())


def _account(page: Page, found: Findings) -> None:
    page.heading("Does it add up?")
    sinks = account_sinks(found)
    what = "the number" if found.reference_value is None else "the difference between the two runs"
    text = (
        f"Relevance is an account: what leaves the answer must arrive at the words or be booked somewhere on the way. Here {what} is "
        f"{number(found.explained)}, and what the account cannot explain is at most {unexplained(found):.1e} of it at any layer."
    )
    if not sinks:
        text += " Nothing stays behind on the way: every layer holds the whole of it."
    page.prose(text)
    if sinks:
        page.view(conservation_view(found.account), "Bars: what stays behind at each layer. Line: what goes on to the layers below.")
    page.table(found.account[["layer", "value", "relevance", *sinks, "unexplained"]], "The account, from the embeddings to the output.")


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
            "Model": f"{_model(found)} ({found.info['architecture']}, {found.info['dtype']}, {found.info['device']})",
            "Ruleset": found.rules,
            "Pairs": found.n_pairs,
            **{f"Seconds for {part}": f"{taken:.2f}" for part, taken in found.seconds.items()},
            "Versions": versions,
            "Again": command,
        }
    )
    if found.question.pairs.dropped:
        page.prose(f"Left out because they do not fit the tokenizer: {', '.join(found.question.pairs.dropped)}.")
    page.details("All heads", found.heads.drop(columns="index"))


def _grid(found: Findings, column: str) -> np.ndarray:
    return found.heads.pivot(index="layer", columns="index", values=column).to_numpy(float)


__all__ = ["account_sinks", "head_table", "number", "predictions_in_words", "report_page", "unexplained", "word_shares"]
