"""Questions about the pictures and captions for them, in words of one token each, with the patches that an answer rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.vision_language.pictures import COLOURS, SHAPES, Thing, draw, scatter, stack
from lens_relevance import RelevanceError

KINDS = ("colour", "shape", "count")
COUNTS = ("one", "two", "three")
ANSWERS = (*COLOURS, *SHAPES, *COUNTS)
_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
_WORDS = ("what", "which", "colour", "shape", "is", "the", "how", "many", "are", "there", "things", "here", "and", "?", ".")
VOCABULARY = ("<pad>", *COLOURS, *SHAPES, *_PLURALS.values(), *_WORDS)
PAD = 0
_INDEX = {word: i for i, word in enumerate(VOCABULARY)}
LONGEST = 12


@dataclass(frozen=True)
class Examples:
    """Questions with their pictures.

    Attributes:
        kind: colour, shape or count.
        relevant: the patches on which the things asked for lie.
    """

    images: Float[Tensor, "n 3 side side"]
    questions: Int[Tensor, "n word"]
    answers: Int[Tensor, " n"]
    relevant: Bool[Tensor, "n patch"]
    kind: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.answers)

    def rows(self, rows: Int[Tensor, " m"]) -> Examples:
        """Some of them."""
        kind = tuple(self.kind[i] for i in rows.tolist())
        return Examples(self.images[rows], self.questions[rows], self.answers[rows], self.relevant[rows], kind)


def ids(text: str) -> list[int]:
    """Token ids of a text whose words are separated by spaces."""
    unknown = [word for word in text.split() if word not in _INDEX]
    if unknown:
        raise RelevanceError(f"not in the vocabulary: {', '.join(unknown)}; it has {' '.join(VOCABULARY[1:])}")
    return [_INDEX[word] for word in text.split()]


def words(tokens: Int[Tensor, " word"]) -> list[str]:
    """The words of token ids."""
    return [VOCABULARY[i] for i in tokens.tolist()]


def questions_about(things: Sequence[Thing]) -> list[tuple[str, str, str, list[Thing]]]:
    """Every (kind, question, answer, things asked for) that has one answer; all questions have six words."""
    shapes, colours = Counter(t.shape for t in things), Counter(t.colour for t in things)
    asked = []
    for shape, n in shapes.items():
        those = [t for t in things if t.shape == shape]
        if n == 1:
            asked.append(("colour", f"what colour is the {shape} ?", those[0].colour, those))
        asked.append(("count", f"how many {_PLURALS[shape]} are there ?", COUNTS[n - 1], those))
    for colour, n in colours.items():
        those = [t for t in things if t.colour == colour]
        if n == 1:
            asked.append(("shape", f"which shape is {colour} here ?", those[0].shape, those))
        asked.append(("count", f"how many things are {colour} ?", COUNTS[n - 1], those))
    return asked


def caption(things: Sequence[Thing]) -> str:
    """One line that names everything, from left to right."""
    return " and ".join(f"{t.colour} {t.shape}" for t in sorted(things, key=lambda t: (t.left, t.top))) + " ."


def random_things(rng: np.random.Generator) -> tuple[Thing, ...]:
    """Two to four things, at most three of a shape or colour; half of them share the shape or the colour of the first."""
    while True:
        kinds: list[tuple[str, str]] = []
        for _ in range(int(rng.integers(2, 5))):
            shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
            if kinds and rng.random() < 0.5:
                shape, colour = (kinds[0][0], colour) if rng.random() < 0.5 else (shape, kinds[0][1])
            kinds.append((shape, colour))
        if max(*Counter(s for s, _ in kinds).values(), *Counter(c for _, c in kinds).values()) <= len(COUNTS):
            return scatter(rng, kinds)


def examples(n: int, seed: int) -> Examples:
    """n questions, each with a picture of its own, a third of each kind; a third of the counts is one, two and three."""
    rng = np.random.default_rng(seed)
    images: list[np.ndarray] = []
    asked = []
    wanted = [(kind, count) for count in COUNTS for kind in KINDS]
    while len(images) < n:
        things, (kind, count) = random_things(rng), wanted[len(images) % len(wanted)]
        of_kind = [q for q in questions_about(things) if q[0] == kind and (kind != "count" or q[2] == count)]
        if of_kind:
            images.append(draw(rng, things))
            asked.append(of_kind[int(rng.integers(len(of_kind)))])
    return Examples(
        stack(images),
        torch.tensor([ids(question) for _, question, _, _ in asked]),
        torch.tensor([ANSWERS.index(answer) for _, _, answer, _ in asked]),
        torch.from_numpy(np.stack([np.any([t.patches() for t in those], 0) for *_, those in asked])),
        tuple(kind for kind, *_ in asked),
    )


def quizzed(n: int, seed: int, each: int) -> tuple[Float[Tensor, "n 3 side side"], Int[Tensor, "n each word"], Int[Tensor, "n each"]]:
    """n pictures with `each` questions about every one, and their answers; kinds are drawn with equal chances."""
    rng = np.random.default_rng(seed)
    images: list[np.ndarray] = []
    asked: list[list[tuple[str, str, str, list[Thing]]]] = []
    for _ in range(n):
        things = random_things(rng)
        possible = questions_about(things)
        kinds = [[q for q in possible if q[0] == kind] for kind in KINDS]
        kinds = [of_kind for of_kind in kinds if of_kind]
        chosen = [kinds[i][int(rng.integers(len(kinds[i])))] for i in rng.integers(len(kinds), size=each)]
        images.append(draw(rng, things))
        asked.append(chosen)
    questions = torch.tensor([[ids(question) for _, question, _, _ in row] for row in asked])
    return stack(images), questions, torch.tensor([[ANSWERS.index(answer) for _, _, answer, _ in row] for row in asked])


def captioned(n: int, seed: int) -> tuple[Float[Tensor, "n 3 side side"], Int[Tensor, "n word"]]:
    """n pictures and their captions, padded on the right with `PAD`."""
    rng = np.random.default_rng(seed)
    scenes = [random_things(rng) for _ in range(n)]
    captions = torch.full((n, LONGEST), PAD)
    for row, things in zip(captions, scenes, strict=True):
        line = torch.tensor(ids(caption(things)))
        row[: len(line)] = line
    return stack([draw(rng, things) for things in scenes]), captions
