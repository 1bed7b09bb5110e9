"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from lens_relevance.errors import RelevanceError


def write_whole(path: str | Path, writer: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there once it is complete: whatever happens, it is whole or as it was before.

    Args:
        path: where to.
        writer: writes the file to the path that it is given, which has the same ending.

    Raises:
        RelevanceError: it cannot be written (no such folder, no permission, a full disk).
    """
    place = check_writable(path)
    beside = None
    try:
        if place.exists() and not place.is_file():  # /dev/stdout and the like cannot be replaced
            writer(place)
            return
        beside = _temporary(place)
        writer(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.chmod(place.stat().st_mode & 0o777 if place.exists() else 0o666 & ~_umask())
        os.replace(beside, place)
        beside = None
    except (OSError, SafetensorError) as error:
        raise _cannot_be_written(path, error) from error
    except RelevanceError as error:  # of a writer that writes its file whole by itself, and names it
        if isinstance(error.__cause__, OSError | SafetensorError):
            raise _cannot_be_written(path, error.__cause__) from error
        raise
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def check_writable(path: str | Path) -> Path:
    """Check that a file could be written, or written over, and leave everything as it is.

    Returns:
        The path, links resolved (a link stays a link).

    Raises:
        RelevanceError: it could not.
    """
    try:
        place = Path(path).resolve()
        if not place.parent.is_dir():
            raise RelevanceError(f"{path} cannot be written: there is no folder {place.parent}")
        if place.is_dir():
            raise RelevanceError(f"{path} cannot be written: it is a folder; name a file in it")
        if place.exists() and not os.access(place, os.W_OK):
            raise RelevanceError(f"{path} cannot be written: it is read-only")
        if place.is_file() or not place.exists():
            _temporary(place).unlink()
    except OSError as error:
        raise _cannot_be_written(path, error) from error
    return place


def _cannot_be_written(path: str | Path, error: Exception) -> RelevanceError:
    """What the system objects to, in one sentence."""
    return RelevanceError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}. What was there before is as it was")


def _temporary(place: Path) -> Path:
    """A new empty file beside a place, of the same ending, since writers choose the format by it, and a name that no other process has."""
    handle, name = tempfile.mkstemp(prefix=f".{place.stem[:100]}.", suffix=f".tmp{place.suffix}", dir=place.parent)
    os.close(handle)
    return Path(name)


def _umask() -> int:
    """The permissions that a new file does not get; they can only be read by setting them."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
