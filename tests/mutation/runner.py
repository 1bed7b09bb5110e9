"""Runs tests on a scratch copy of the repository, in processes forked from one that has imported the large libraries.

Importing torch, transformers and TransformerLens takes longer than most of the tests chosen here; a fork finds them imported, and imports
the packages under test, which are never imported in the parent, from its copy.
"""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("lens_relevance", "analyses")
TIMEOUT = 600  # seconds of processor time, so that a busy machine kills nothing; a change that makes a test run on for ever is noticed
WAITING = 3600  # seconds by the clock; so is one that makes it wait for ever
_STAMP = 1_000_000_000  # a time of modification before that of any file, another one for each mutation: no compiled file is taken for it


def copy_repository(target: Path) -> None:
    """Everything that git tracks or would add, and beside the copy what stands beside the checkout for tests."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = REPOSITORY / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    shared = REPOSITORY.parent / "shared"
    if shared.is_dir() and not (target.parent / "shared").exists():
        (target.parent / "shared").symlink_to(shared.resolve())


def warm_up() -> None:
    """Import what the tests need and what is not under test."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    import beartype  # noqa: F401
    import hypothesis  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import networkx  # noqa: F401
    import pandas  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformer_lens.model_bridge.sources.transformers  # noqa: F401
    import transformers

    torch.set_num_threads(1)
    for config in ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"):
        getattr(transformers, config)


def write(path: Path, text: str, number: int) -> None:
    """Write a changed source file so that no compiled one is taken for it."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, (_STAMP + number, _STAMP + number))


@dataclass(frozen=True)
class Done:
    """What became of a run: pytest's exit code (negative: ended after TIMEOUT or WAITING), the seconds it took, and its output."""

    code: int
    seconds: float
    log: str


class Running:
    """One run of pytest in a copy, in a process of its own.

    Args:
        copy: the repository's copy.
        tests: arguments of pytest.
        log: where its output goes.
        compiled: whether compiled files may be written, which only a run of the packages as they are may do.
    """

    def __init__(self, copy: Path, tests: str, log: Path, *, compiled: bool) -> None:
        self.started, self.log = time.monotonic(), log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _in_the_fork(copy, tests, log, compiled)

    def poll(self) -> Done | None:
        """None while it runs."""
        seconds = time.monotonic() - self.started
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and seconds <= WAITING:
            return None
        if not pid:
            self.end()
        return Done(os.waitstatus_to_exitcode(status) if pid else -1, seconds, self.log.read_text(encoding="utf-8", errors="replace"))

    def end(self) -> None:
        """End it, and what it has started."""
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _in_the_fork(copy: Path, tests: str, log: Path, compiled: bool) -> None:
    """Never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT, TIMEOUT))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(copy)
        sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != REPOSITORY)]
        sys.dont_write_bytecode = not compiled
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", *PACKAGES)]:
            del sys.modules[name]
        if not compiled:
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        os.environ["PYTHONPATH"] = str(copy)
        import importlib

        import pytest

        for package in PACKAGES:
            spec = importlib.util.find_spec(package)
            if spec is None or not str(spec.origin).startswith(str(copy)):
                raise RuntimeError(f"{package} would not come from the copy")
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", *shlex.split(tests)]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
