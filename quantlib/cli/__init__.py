"""The ``quantlib`` command: one file a verb, each with ``arguments(parser)`` and ``run(args) -> exit status``.

Nothing here imports torch: a verb that needs it imports it when it runs, so that ``quantlib bits pi`` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from quantlib import __version__, _interrupted
from quantlib.cli import (
    bench,
    bits,
    build,
    check,
    compare,
    convert,
    eval,
    formats,
    info,
    inspect,
    plan,
    quantize,
    tune,
    verify,
    warmup,
)
from quantlib.cli.parser import Parser

VERBS = {
    "bench": bench,
    "bits": bits,
    "build": build,
    "check": check,
    "compare": compare,
    "convert": convert,
    "eval": eval,
    "formats": formats,
    "info": info,
    "inspect": inspect,
    "plan": plan,
    "quantize": quantize,
    "tune": tune,
    "verify": verify,
    "warmup": warmup,
}

FAILED, WRONG, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141  # exit statuses; 0 is success
STOPPED = {signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}  # the status is 128 and the signal's number


class Stopped(BaseException):
    """A signal asked the process to end: what is under way is cleaned up on the way out, as after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        0 when it did what was asked, 1 when it could not (a mismatch, a full disk), 2 when it was asked wrongly,
        130 after Ctrl-C, 143 after SIGTERM. A failure is one line on stderr.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the program
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the end)
    with stoppable():
        status = run(argv)
    try:
        sys.stdout.flush()
    except OSError:  # it has been said; Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def run(argv: Sequence[str] | None) -> int:
    """`main`, for signals that raise."""
    verb = None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a locale may lack the characters of bars, and of names of files
    try:
        args = parser().parse_args(argv)
        verb = args.verb
        status: int = VERBS[verb].run(args)
        sys.stdout.flush()
        return status
    except SystemExit as done:  # argparse: --help, --version, a wrong argument
        return int(done.code or 0)
    except KeyboardInterrupt:
        return complain(verb, "interrupted", INTERRUPTED)
    except Stopped as stopped:
        number: int = stopped.args[0]
        return complain(verb, STOPPED[signal.Signals(number)], 128 + number)
    except BrokenPipeError:
        # The reader left, as `head` does. Python flushes stdout once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        return complain(verb, describe(error), WRONG)
    except (OSError, ImportError, RuntimeError, MemoryError) as error:
        return complain(verb, describe(error), FAILED)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Make the signals of `STOPPED` and Ctrl-C raise inside the block, unless somebody handles or ignores them."""

    def stop(number: int, frame: FrameType | None) -> None:
        interrupted = number == signal.SIGINT
        if is_importing("torch"):  # whose C++ calls abort() if it imports what raises; nothing is written yet
            os._exit(complain(None, "interrupted" if interrupted else STOPPED[signal.Signals(number)], 128 + number))
        raise KeyboardInterrupt if interrupted else Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (*STOPPED, signal.SIGINT)}
    ours = [n for n, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler, _interrupted)]
    try:
        for number in ours:
            signal.signal(number, stop)
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def is_importing(name: str) -> bool:
    """True while the module ``name`` is imported for the first time."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def parser() -> Parser:
    top = Parser(prog="quantlib", description="Project FP32 values and models to small formats, bit for bit.")
    top.add_argument("--version", action="version", version=f"quantlib {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="verb", required=True)
    for name, module in VERBS.items():
        about = (module.__doc__ or name).splitlines()[0]  # -OO leaves no docstrings
        module.arguments(verbs.add_parser(name, help=about, description=about))
    return top


def describe(error: Exception) -> str:
    """One line: the message, or the reason and the file of an OSError."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def complain(verb: str | None, message: str, status: int) -> int:
    print(f"quantlib {verb}: {message}" if verb else f"quantlib: {message}", file=sys.stderr)
    return status
