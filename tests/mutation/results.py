"""What became of each change, in a file that runs in parts share, and the table of docs/measurements/mutations.md."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from analyses.benchmarks.tables import markdown, write_table
from tests.mutation.mutation import Mutation

KILLED, SURVIVED, EQUIVALENT, NOT_EQUIVALENT = "killed", "SURVIVED", "equivalent", "NOT EQUIVALENT"
KEY = ["file", "name", "change"]
COLUMNS = [*KEY, "outcome", "noticed by", "measured"]


def identity(mutation: Mutation) -> tuple[str, str, str]:
    """The values of KEY: a change that is written differently is another one."""
    return mutation.file, mutation.name, hashlib.sha256(f"{mutation.old}\n{mutation.new}".encode()).hexdigest()[:12]


def read(file: Path) -> pd.DataFrame:
    """The rows of a file; none where it is not there."""
    return pd.read_csv(file, keep_default_na=False, dtype=str) if file.exists() else pd.DataFrame(columns=COLUMNS)


def keep(file: Path, mutation: Mutation, outcome: str, noticed_by: str) -> None:
    """Put what became of one change into the file, in the place of what was there of it."""
    row = [*identity(mutation), outcome, noticed_by, f"{datetime.now(UTC):%Y-%m-%d}"]
    rows = pd.concat([read(file), pd.DataFrame([row], columns=COLUMNS)]).drop_duplicates(KEY, keep="last")
    rows.sort_values(KEY, kind="stable").to_csv(file, index=False)


def of_the_list(mutations: Sequence[Mutation], file: Path) -> pd.DataFrame:
    """The file's rows of these changes; what is no longer in the list is left out."""
    wanted = pd.DataFrame([identity(mutation) for mutation in mutations], columns=KEY)
    return wanted.merge(read(file), on=KEY, how="inner")


def untried(mutations: Sequence[Mutation], file: Path) -> list[Mutation]:
    """Those that the file does not have yet, and survivors, which a new test may notice."""
    rows = of_the_list(mutations, file)
    done = set(rows.loc[rows["outcome"].isin([KILLED, EQUIVALENT]), KEY].itertuples(index=False, name=None))
    return [mutation for mutation in mutations if identity(mutation) not in done]


def table(mutations: Sequence[Mutation], file: Path) -> pd.DataFrame:
    """A row for each part of the packages: changes, and what became of them."""
    listed = pd.DataFrame([identity(mutation) for mutation in mutations], columns=KEY).merge(read(file), on=KEY, how="left")
    part = listed["file"].map(lambda name: str(Path(name).parent))
    rows = []
    for name, here in [*listed.groupby(part), ("all", listed)]:
        counts = here["outcome"].value_counts()
        killed, equivalent, tried = counts.get(KILLED, 0), counts.get(EQUIVALENT, 0), int(here["outcome"].notna().sum())
        rows.append(
            {
                "part": name,
                "changes": len(here),
                "tried": tried,
                "killed": killed,
                "equivalent": equivalent,
                "not noticed": tried - killed - equivalent,
            }
        )
    return pd.DataFrame(rows)


def write_page(page: Path, mutations: Sequence[Mutation], file: Path) -> None:
    """Write the table into its place."""
    days = of_the_list(mutations, file)["measured"]
    write_table(
        page,
        "mutations",
        markdown(table(mutations, file)),
        command=f"tests.mutation --results docs/measurements/results/{file.name} --page docs/measurements/{page.name}",
        settings="Each change by itself, with the test files nearest to it; no random choice",
        measured=" to ".join(sorted({days.min(), days.max()})),
    )
