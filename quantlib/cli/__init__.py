"""The ``quantlib`` command: one file a verb, each with ``arguments(parser)`` and ``run(args) -> exit status``.

Nothing here imports torch: a verb that needs it imports it when it runs, so that ``quantlib bits pi`` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from quantlib import __version__
from quantlib.cli import bench, bits, build, formats, info, quantize, tune, verify
from quantlib.cli.parser import Parser

VERBS = {
    "bench": bench,
    "bits": bits,
    "build": build,
    "formats": formats,
    "info": info,
    "quantize": quantize,
    "tune": tune,
    "verify": verify,
}

FAILED, WRONG, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141  # exit statuses; 0 is success


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
        130 after Ctrl-C. A failure is one line on stderr.
    """
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
    except BrokenPipeError:
        # The reader left, as `head` does. Python flushes stdout once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        return complain(verb, describe(error), WRONG)
    except (OSError, ImportError, RuntimeError, MemoryError) as error:
        return complain(verb, describe(error), FAILED)


def parser() -> Parser:
    top = Parser(prog="quantlib", description="Project FP32 values and models to small formats, bit for bit.")
    top.add_argument("--version", action="version", version=f"quantlib {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="verb", required=True)
    for name, module in VERBS.items():
        about = (module.__doc__ or "").splitlines()[0]
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
