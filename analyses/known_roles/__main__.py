"""Does relevance rank heads of a known role first? Writes the tables as a page.

python -m analyses.known_roles --whisper FOLDER --rxnmapper FOLDER --out docs/measurements/known_roles.md
"""

from __future__ import annotations

from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

from analyses.datasets.progress import progress_bar
from analyses.known_roles import reactions, speech
from analyses.known_roles.cases import Case
from analyses.known_roles.head_scores import head_scores
from analyses.known_roles.page import page
from analyses.known_roles.ranking import ranking_table
from lens_relevance.sites import HookedModule


def main(
    whisper: Annotated[Path, typer.Option(envvar="LENS_RELEVANCE_WHISPER", help="Whisper tiny.en in Hugging Face format.")],
    rxnmapper: Annotated[
        Path, typer.Option(envvar="LENS_RELEVANCE_RXNMAPPER", help="rxnmapper's models/transformers/albert_heads_8_uspto_all_1310k.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write; the tables go beside it as .csv.")] = Path("known_roles.md"),
) -> None:
    """Rank the heads of both models by every method, and write what came out."""
    torch.set_num_threads(1)
    listener, cases, texts = speech.listening(speech.load_whisper(whisper), speech.SENTENCES)
    heard = _measured(listener, cases, "cross", speech.KNOWN, "Whisper tiny.en")
    mapper, vocabulary = reactions.load_rxnmapper(rxnmapper)
    copied = [reactions.copying(mapper, vocabulary, one) for one in reactions.REACTIONS]
    mapped = _measured(mapper, copied, None, reactions.KNOWN, "rxnmapper's ALBERT")
    for name, (table, _) in (("whisper", heard), ("rxnmapper", mapped)):
        table.to_csv(out.with_name(f"{out.stem}_{name}.csv"), index=False)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens"))
    out.write_text(page(heard, mapped, n_words=sum(len(text) for text in texts), when=f"{date.today()} with {versions}"))
    typer.echo(f"wrote {out}")


def _measured(
    model: HookedModule, cases: list[Case], stack: str | None, known: tuple[tuple[int, int], ...], words: str
) -> tuple[pd.DataFrame, np.ndarray]:
    """The table of one model, and how much each head does what its role says."""
    found: dict[str, list[torch.Tensor]] = {}
    with progress_bar() as progress:
        task = progress.add_task(words, total=len(cases))
        for case in cases:
            for name, scores in head_scores(model, case, stack).items():
                found.setdefault(name, []).append(scores)
            progress.advance(task)
    role = torch.cat([case.role for case in cases]).mean(0).numpy()
    return ranking_table({name: torch.cat(scores).numpy() for name, scores in found.items()}, known, role), role


if __name__ == "__main__":
    typer.run(main)
