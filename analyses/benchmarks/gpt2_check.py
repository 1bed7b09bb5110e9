"""GPT-2 small against what is published about it: the heads of the IOI circuit, and RelP's correlations with activation patching.

    python -m analyses.benchmarks.gpt2_check [--model gpt2] [--n 64] [--top 20] [--direction denoising]

For a place where the Hugging Face hub is reachable, or with a folder that holds the weights. They were not at hand when this was written:
the same code was run on random GPT-2s alone, so no result on the real one is claimed here.

Heads: Wang et al. 2022 (arXiv 2211.00593), found by path patching with the p_ABC corruption, so this is the corruption here too.
Correlations: RelP (arXiv 2508.21258), Pearson with activation patching on IOI, GPT-2 small. How many prompts were taken there, of which
templates, and in which direction they were patched is not known here; expect the order of the methods rather than the third digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from transformer_lens.model_bridge import TransformerBridge

from analyses.cli.options import clean_errors
from analyses.components import Direction, resolve_direction
from analyses.describe.attention_patterns import KINDS, pattern_scores
from analyses.evaluation.comparison import compare_with_patching
from analyses.evaluation.ranking import rank_heads
from analyses.models.loading import load_model
from analyses.report.terminal import frame_table
from analyses.tasks import PromptPairs, induction, ioi
from lens_relevance import RelevanceError

KNOWN_HEADS: dict[str, tuple[tuple[int, int], ...]] = {
    "name mover": ((9, 9), (10, 0), (9, 6)),
    "negative name mover": ((10, 7), (11, 10)),
    "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
    "induction": ((5, 5), (6, 9)),
    "previous token": ((4, 11),),
}
"""Role -> (layer, head), Wang et al. 2022."""

PUBLISHED: dict[str, dict[str, float]] = {
    "relp": {"resid": 0.968, "attn": 0.962, "mlp": 0.992},
    "gradient": {"resid": 0.753, "attn": 0.979, "mlp": 0.195},
}
"""Ruleset -> component -> Pearson, arXiv 2508.21258; `gradient` is attribution patching."""

OWN = "deeplift"


@dataclass(frozen=True, eq=False)
class Gpt2Check:
    """What was found beside what is published.

    Attributes:
        heads: a row per known head: role, head, rank (1 is first; 0 where the model has no such head), in_top, score, standard_error, and
            its pattern scores on random tokens that repeat.
        cells: a row per method and component: published (NaN where nothing is), pearson and its bootstrap interval (low, high), difference.
    """

    heads: pd.DataFrame
    cells: pd.DataFrame
    top_k: int

    @property
    def found(self) -> int:
        """How many of the known heads are in the top."""
        return int(self.heads["in_top"].sum())


def gpt2_check(
    model: TransformerBridge, pairs: PromptPairs, top_k: int = 20, *, direction: Direction = "denoising", seed: int = 0
) -> Gpt2Check:
    """Rank heads by relevance and hold methods against patching on pairs of the ioi task. Raises RelevanceError for a top_k under 1."""
    if top_k < 1:
        raise RelevanceError(f"top_k is a number of heads, at least 1, not {top_k}")
    ranking = rank_heads(model, pairs, OWN)
    patterns = pattern_scores(model, induction(model, n=8, seed=seed))
    ranked = ranking.assign(rank=range(1, len(ranking) + 1)).merge(patterns, on=["layer", "head"])
    table = compare_with_patching(model, pairs, [*PUBLISHED, OWN], components=["resid", "attn", "mlp"], direction=direction)
    return Gpt2Check(_known(ranked, top_k), _beside_published(table), top_k)


def _known(ranked: pd.DataFrame, top_k: int) -> pd.DataFrame:
    """The known heads with what was found for them."""
    known = pd.DataFrame([(role, *head) for role, heads in KNOWN_HEADS.items() for head in heads], columns=["role", "layer", "head"])
    known_heads = known.merge(ranked, on=["layer", "head"], how="left")
    rank = known_heads["rank"].fillna(0).astype(int)
    return pd.DataFrame(
        {
            "role": known_heads["role"],
            "head": known_heads["layer"].astype(str) + "." + known_heads["head"].astype(str),
            "rank": rank,
            "in_top": rank.between(1, top_k),
            **{name: known_heads[name] for name in ("score", "standard_error", *KINDS)},
        }
    )


def _beside_published(table: pd.DataFrame) -> pd.DataFrame:
    """Our cells with the published ones."""
    named = table[["method", "component"]].itertuples(index=False)
    published = pd.Series([PUBLISHED.get(str(method), {}).get(str(component), float("nan")) for method, component in named])
    return pd.DataFrame(
        {
            "method": table["method"],
            "component": table["component"],
            "published": published,
            "pearson": table["pearson"],
            "low": table["pearson_low"],
            "high": table["pearson_high"],
            "difference": table["pearson"] - published,
        }
    )


@clean_errors
def main(
    *,
    model: Annotated[str, typer.Option(help="A hub name, or a folder with GPT-2 small in Hugging Face format.")] = "gpt2",
    n: Annotated[int, typer.Option("--n", min=2, help="How many pairs of the ioi task.")] = 64,
    top: Annotated[int, typer.Option(min=1, help="How many heads count as the top.")] = 20,
    direction: Annotated[str, typer.Option(help="The yardstick: denoising, as in TransformerLens, noising, or their mean.")] = "denoising",
    seed: Annotated[int, typer.Option(help="Seed of the task's draw.")] = 0,
) -> None:
    """Which known heads of the IOI circuit are among the top by relevance, and our correlations beside the published ones."""
    asked = resolve_direction(direction)
    loaded = load_model(model)
    pairs = ioi(loaded, n, seed, corruption="abc")
    check = gpt2_check(loaded, pairs, top, direction=asked, seed=seed)
    console = Console()
    console.print(frame_table(check.heads, f"Heads of the IOI circuit (Wang et al. 2022), ranked by {OWN} over {len(pairs)} pairs"))
    absent = int((check.heads["rank"] == 0).sum())
    note = f"; {absent} are no heads of {model}, which then is not GPT-2 small" if absent else ""
    n_heads = int(loaded.cfg.n_heads) * len(loaded.blocks)
    console.print(f"{check.found} of {len(check.heads)} among the top {top} of {n_heads}{note}", markup=False, highlight=False)
    console.print(frame_table(check.cells, f"Pearson with activation patching ({direction}); published: arXiv 2508.21258"))


if __name__ == "__main__":
    typer.run(main)
