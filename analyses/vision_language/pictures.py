"""Synthetic pictures: coloured shapes at random places on a noisy grey ground, so that it is known which patches show what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

SIDE, PATCH = 24, 4
GRID = SIDE // PATCH
N_PATCHES = GRID * GRID
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (0.85, 0.15, 0.15), "green": (0.15, 0.7, 0.2), "blue": (0.15, 0.25, 0.9), "yellow": (0.9, 0.85, 0.15)}
_SIZE = 6  # of a shape, in pixels: it lies on four to nine patches
_NOISE = 0.06


@dataclass(frozen=True)
class Thing:
    """A coloured shape with its top left corner."""

    shape: str
    colour: str
    top: int
    left: int

    def pixels(self) -> Bool[np.ndarray, "side side"]:
        """Where it is drawn."""
        drawn = np.zeros((SIDE, SIDE), dtype=bool)
        drawn[self.top : self.top + _SIZE, self.left : self.left + _SIZE] = _outline(self.shape)
        return drawn

    def patches(self) -> Bool[np.ndarray, " patch"]:
        """The patches on which any of it is drawn, row by row."""
        return self.pixels().reshape(GRID, PATCH, GRID, PATCH).any((1, 3)).flatten()


def _outline(shape: str) -> Bool[np.ndarray, "size size"]:
    """The filled shape in its own square."""
    y, x = np.mgrid[:_SIZE, :_SIZE] - (_SIZE - 1) / 2
    return {
        "circle": x**2 + y**2 <= (_SIZE / 2) ** 2,
        "square": np.ones_like(x, dtype=bool),
        "triangle": np.abs(x) <= (y + _SIZE / 2) / 2 + 0.25,
        "cross": (np.abs(x) < 1) | (np.abs(y) < 1),
    }[shape]


def scatter(rng: np.random.Generator, kinds: list[tuple[str, str]]) -> tuple[Thing, ...]:
    """Things of these (shape, colour) at random places on every other pixel, not touching each other."""
    while True:
        corners = 2 * rng.integers(0, (SIDE - _SIZE) // 2 + 1, size=(len(kinds), 2))
        apart = np.abs(corners[:, None] - corners[None]).max(-1) > _SIZE
        if (apart | np.eye(len(kinds), dtype=bool)).all():
            return tuple(Thing(shape, colour, int(y), int(x)) for (shape, colour), (y, x) in zip(kinds, corners, strict=True))


def draw(rng: np.random.Generator, things: tuple[Thing, ...]) -> Float[np.ndarray, "3 side side"]:
    """The picture, values around 0 to 1; ground and noise are drawn from `rng`."""
    picture = np.full((SIDE, SIDE, 3), rng.uniform(0.4, 0.6))
    for thing in things:
        picture[thing.pixels()] = COLOURS[thing.colour]
    picture += rng.normal(0, _NOISE, picture.shape)
    return picture.transpose(2, 0, 1).astype(np.float32)


def stack(pictures: list[Float[np.ndarray, "3 side side"]]) -> Float[Tensor, "batch 3 side side"]:
    """Pictures as one batch."""
    return torch.from_numpy(np.stack(pictures))
