"""The `heedful` command: one module a subcommand, each with `add_parser(subparsers)` and `run(args) -> exit status`.

The modules import torch and the engine when they run, so `heedful --help` needs neither. What a user did wrong is one
line on standard error and status 1; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from heedful.cli import bench, doctor, generate, inspect

# FloatingPointError: the weights made NaN of a prompt.
_USER_ERRORS = (ValueError, OSError, MemoryError, ModuleNotFoundError, FloatingPointError)
_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_DEBUG = "show the traceback of an error"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: the arguments behind the program's name; None takes those of this process.

    Returns:
        The exit status: 0, or 1 for an error, 130 for Ctrl-C. A wrong usage exits with 2 through SystemExit.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # a closed pipe shows here and not at exit, where nothing could catch it
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has what it wanted. What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return args.run(args)
        except BrokenPipeError:
            raise
        except _USER_ERRORS as error:
            if args.debug:
                raise
            print(f"heedful: error: {_message(error)}", file=sys.stderr)
            return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heedful",
        description="DeepSeek Sparse Attention on any machine.",
        epilog="'heedful COMMAND --help' tells a command's options.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help=_DEBUG)
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in (generate, bench, inspect, doctor):
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        # Left alone where it is not given, so that one before the command stays.
        subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG)
    return parser


class _Version(argparse.Action):
    """Asks for the version only when it is wanted: it lies in the compiled module."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        from heedful import __version__

        print(f"heedful {__version__}")
        parser.exit()


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "safetensors", "tqdm"):
        return f"this command needs {error.name}: pip install 'heedful[torch]'"
    if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
        return "a plot needs matplotlib: pip install 'heedful[replay]'"
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    print(f"heedful: warning: {message}", file=sys.stderr)
