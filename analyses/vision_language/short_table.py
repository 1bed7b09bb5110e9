"""The short table of docs/measurements/pictures_and_questions.md, from the results of the experiment.

python -m analyses.vision_language.short_table --page docs/measurements/pictures_and_questions.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from analyses.benchmarks.tables import markdown, write_table
from analyses.vision_language import FOLDER
from analyses.vision_language.experiment import CANDIDATES, CHOSEN, interval
from analyses.vision_language.model import IMAGE, QUESTION

PLACE = "pictures and questions"
SHOWN = (
    *(CHOSEN[family] for family in ("deeplift", "deeplift_ln", "weighted accumulation", "Chefer 2021b")),
    *("occlusion", "Chefer 2021b", "weighted accumulation", "gim", "attnlrp", "rollout", "random"),
)


def short(results: pd.DataFrame) -> pd.DataFrame:
    """The best of the families that are compared, and the simple methods, by area of patches."""
    of_words = results[results["set"] == QUESTION].set_index("method").to_dict("index")
    rows = results[(results["set"] == IMAGE) & results["method"].isin(SHOWN)].sort_values("area", ascending=False, kind="stable")
    return pd.DataFrame(
        [
            {
                "method": row["method"],
                "patches: area between": interval(row, "area"),
                "localisation": interval(row, "localisation"),
                "words: area between": interval(of_words[row["method"]], "area"),
            }
            for row in rows.to_dict("records")
        ]
    )


def main(page: Annotated[Path, typer.Option(help="The page with the table's place.")]) -> None:
    """Write the table into the page."""
    results = pd.read_csv(FOLDER / "results.csv")
    settings = (
        f"The embedded vision-language model, {results['questions'].max()} test questions; in brackets 95 % intervals over 2000 resamples "
        f"of the questions; rows with a comma are the best of their family among {len(CANDIDATES)} configurations tried on other pictures"
    )
    command = f"analyses.vision_language.short_table --page docs/measurements/{page.name}"
    write_table(page, PLACE, markdown(short(results)), command=command, settings=settings, measured=str(results["measured"].max()))


if __name__ == "__main__":
    typer.run(main)
