"""The command: every mutation of the list, killed or not."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.mutation import results
from tests.mutation.everything import MUTATIONS
from tests.mutation.mutation import Mutation, StaleMutation
from tests.mutation.results import EQUIVALENT, KILLED, NOT_EQUIVALENT, SURVIVED
from tests.mutation.runner import REPOSITORY, Done, Running, copy_repository, warm_up, write


def main() -> int:
    """Run the list; 0 where every mutation was killed or is equivalent."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description="Change single lines and see which tests notice.")
    parser.add_argument("--only", default="", help="the mutations whose name or file holds this text")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at once")
    parser.add_argument("--results", type=Path, help="a .csv for what becomes of each; those that it has, but for survivors, are left out")
    parser.add_argument("--page", type=Path, help="the page with the table's place; it is written from the results")
    arguments = parser.parse_args()
    if arguments.page and not arguments.results:
        parser.error("--page needs --results")
    chosen = [mutation for mutation in MUTATIONS if arguments.only in f"{mutation.file} {mutation.name}"]
    if not chosen:
        print(f"no mutation is called {arguments.only!r}")
        return 2
    code = _try(results.untried(chosen, arguments.results) if arguments.results else chosen, arguments.jobs, arguments.results)
    if arguments.page:
        results.write_page(arguments.page, MUTATIONS, arguments.results)
    return code


def _try(chosen: list[Mutation], jobs: int, file: Path | None) -> int:
    if not chosen:
        return 0
    stale = []
    for mutation in chosen:
        try:
            mutation.applied(REPOSITORY)
        except StaleMutation as error:
            stale.append(str(error))
    if stale:
        print("\n".join(["The list is out of date:", *stale]))
        return 2
    warm_up()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is ended too
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        return _run(chosen, Path(folder), max(1, jobs), file=file)


def _run(chosen: list[Mutation], folder: Path, jobs: int, *, file: Path | None) -> int:
    started, copies = time.monotonic(), [folder / f"copy{i}" for i in range(jobs)]
    for copy in copies:
        copy_repository(copy)
    selections = [replace(chosen[0], tests=tests) for tests in {mutation.tests: None for mutation in chosen}]
    for as_it_is, done in _runs(selections, copies, changed=False):
        if done.code != 0:
            print(done.log[-3000:])
            print(f"these tests fail, or find nothing, without any change, so that they can tell nothing: {as_it_is.tests}")
            return 2
        print(f"as it is   {done.seconds:6.1f} s  {as_it_is.tests}", flush=True)
    outcomes: Counter[str] = Counter()
    survivors: list[Mutation] = []
    for mutation, done in _runs(chosen, copies, changed=True):
        outcome = _outcome(mutation, done.code)
        outcomes[outcome] += 1
        survivors += [mutation] * (outcome in (SURVIVED, NOT_EQUIVALENT))
        detail = mutation.equivalent or _first_failure(done.log)
        if file is not None:
            results.keep(file, mutation, outcome, "" if mutation.equivalent else detail)
        print(f"{outcome:<10} {done.seconds:6.1f} s  {mutation.file}: {mutation.name}{f'  [{detail}]' if detail else ''}", flush=True)
    minutes = (time.monotonic() - started) / 60
    counted = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    print(f"\n{len(chosen)} mutations in {minutes:.1f} minutes: {counted}")
    for mutation in survivors:
        print(f"  {mutation.file}: {mutation.old!r} -> {mutation.new!r} ({mutation.name}); tests: {mutation.tests}")
    return 1 if survivors else 0


def _runs(chosen: list[Mutation], copies: list[Path], *, changed: bool) -> Iterator[tuple[Mutation, Done]]:
    """The tests of each mutation, in as many processes as there are copies; changed: with the change made, or as it is."""
    queue, running = list(enumerate(chosen)), dict[int, tuple[Mutation, str, Running]]()
    try:
        while queue or running:
            for slot, copy in enumerate(copies):
                if slot not in running and queue:
                    number, mutation = queue.pop(0)
                    original = (copy / mutation.file).read_text(encoding="utf-8")
                    if changed:
                        write(copy / mutation.file, mutation.applied(copy), number)
                    running[slot] = mutation, original, Running(copy, mutation.tests, copy.parent / f"log{slot}", compiled=not changed)
            for slot, (mutation, original, run) in list(running.items()):
                if (done := run.poll()) is not None:
                    del running[slot]
                    if changed:
                        write(copies[slot] / mutation.file, original, len(chosen))
                    yield mutation, done
            time.sleep(0.05)
    finally:
        for _, _, run in running.values():
            run.end()


def _outcome(mutation: Mutation, code: int) -> str:
    if code in (4, 5, 70):  # pytest's usage errors, and what went wrong outside it
        raise RuntimeError(f"{mutation.name}: the tests could not be run (exit code {code})")
    if mutation.equivalent:
        return EQUIVALENT if code == 0 else NOT_EQUIVALENT
    return SURVIVED if code == 0 else KILLED


def _first_failure(log: str) -> str:
    """The test that noticed."""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
    return found[1] if found else ""


if __name__ == "__main__":
    sys.exit(main())
