"""What a mutation is, and how a list of them is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class StaleMutation(Exception):
    """The text that a mutation changes is not there, or not once."""


@dataclass(frozen=True)
class Mutation:
    """One change to one line.

    Attributes:
        name: what it does wrong, in words.
        file: path within the repository.
        old, new: a text that stands in the file exactly once, within one line, and what takes its place.
        tests: arguments of pytest that choose the nearest tests.
        equivalent: why no test can notice; empty for all others.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""

    def applied(self, root: Path) -> str:
        """The text of the file with the change made.

        Raises:
            StaleMutation: the old text does not stand there exactly once, spans lines, or is what it is to be replaced with.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1 or "\n" in self.old or self.old == self.new:
            raise StaleMutation(
                f"{self.name}: {self.old!r} stands {text.count(self.old)} times in {self.file}, and has to stand there once"
            )
        return text.replace(self.old, self.new)


def of(file: str, tests: str, *changes: tuple[str, str, str] | tuple[str, str, str, str]) -> list[Mutation]:
    """Mutations of one file that the same tests are for: (name, old, new) or (name, old, new, why it is equivalent)."""
    return [Mutation(name, file, old, new, tests, *why) for name, old, new, *why in changes]
