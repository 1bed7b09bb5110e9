"""Processes that start in milliseconds, where a new interpreter takes ten seconds of processor time for its imports.

They are copies of a process that has imported what the tests import and has done nothing yet: it is itself made when the tests have been
collected. Each has standard streams, an environment, signals, random states and an exit status of its own.
"""

from __future__ import annotations

import atexit
import faulthandler
import io
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
import torch

_TORCH_SEED = 67280421310721  # that of a new process


class Forked:
    """A process that calls a function of a module, in this directory, and ends. Its pipes hold 64 KiB, as any."""

    def __init__(self, function: Callable[..., object], *arguments: object, environment: Mapping[str, str] = os.environ) -> None:
        (stdin, to_stdin), (from_stdout, stdout), (from_stderr, stderr) = (os.pipe() for _ in range(3))
        _ORIGINAL.send((function, arguments, dict(environment), os.getcwd()))
        for stream in (stdin, stdout, stderr):
            send_handle(_ORIGINAL, stream, None)
            os.close(stream)
        self.stdin, self.stdout, self.stderr = open(to_stdin, "w"), open(from_stdout), open(from_stderr)
        self.pid: int = _ORIGINAL.recv()

    def kill(self) -> None:
        """End the process at once. Its number is its own until `wait`."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit status once it has ended; less than 0 where a signal ended it."""
        self.stdin.close()
        _ORIGINAL.send(self.pid)
        status: int = _ORIGINAL.recv()
        self.stdout.close()
        self.stderr.close()
        return status


_ORIGINAL: Connection


def pytest_collection_finish() -> None:
    """A hook of the folders whose tests start processes: make the process that is copied, before the first test."""
    global _ORIGINAL
    if "_ORIGINAL" not in globals():
        _ORIGINAL, requests = Pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _ORIGINAL.close()
                _serve(requests)
            finally:  # the tests go on in the other process alone
                os._exit(1)
        requests.close()
        atexit.register(os.waitpid, pid, 0)
        atexit.register(_ORIGINAL.close)  # the last one is called first


def _serve(requests: Connection) -> None:
    """The process that is copied: makes a copy, or waits for the end of one, until the tests have ended."""
    faulthandler.disable()  # it writes to a file of the test run
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and then this process
    for name in os.listdir("/dev/fd"):
        if int(name) > 2 and int(name) != requests.fileno():
            try:
                os.close(int(name))
            except OSError:
                pass  # of listing the folder
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return
        if isinstance(request, int):
            requests.send(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]))
            continue
        streams = [recv_handle(requests) for _ in range(3)]
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                requests.close()
                status = _call(streams, *request)
            finally:
                os._exit(status)
        for stream in streams:
            os.close(stream)
        requests.send(pid)


def _call(streams: list[int], function: Callable[..., object], arguments: tuple[Any, ...], environment: dict[str, str], folder: str) -> int:
    """In a copy: what an interpreter does around a program. Returns the exit status."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), encoding)
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding)
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), encoding, "backslashreplace", line_buffering=True)
    random.seed()
    np.random.seed()
    torch.manual_seed(_TORCH_SEED)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 0
    try:
        function(*arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    return status
