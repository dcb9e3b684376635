"""The `giantdet` command: errors and exit codes. The commands are in commands/."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys

from giantdet.commands import COMMANDS
from giantdet.engine.quiet import quieten
from giantdet.errors import GiantdetError, InputError, LostContactError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    An error of `errors.py` ends it with one line on stderr and that error's code; a bug shows its traceback.
    """
    options = parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    handler = logging.StreamHandler()
    handler.setFormatter(_Named("%(package)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if not getattr(options, "verbose", False):
        quieten()
    try:
        return int(options.command(options) or 0)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        _say("giantdet: stopped: Ctrl-C")
        return 128 + signal.SIGINT
    except GiantdetError as error:
        _say(f"giantdet: {'error' if isinstance(error, InputError) else 'stopped'}: {error}")
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"giantdet: error: {error.filename}: {error.strerror}")
        return InputError.exit_code
    except RuntimeError as error:
        comm = sys.modules.get("giantdet.distributed.comm")
        if comm is None or not comm.is_lost_contact(error):
            raise
        # Each rank prints, as each may know another part of the reason; on its own line, after the progress
        # bar.
        print(f"\ngiantdet: stopped: {comm.describe_lost_contact(error)}", file=sys.stderr, flush=True)
        return LostContactError.exit_code
    finally:
        if "giantdet.distributed.comm" in sys.modules:
            sys.modules["giantdet.distributed.comm"].stop()


class _Named(logging.Formatter):
    """Begins a line with the package that has logged it."""

    def format(self, record: logging.LogRecord) -> str:
        record.package = record.name.partition(".")[0]
        return super().format(record)


def _say(message: str) -> None:
    """Print to stderr, once: if many ranks stop for one reason, only the main rank prints it.

    Before the ranks are connected, the first rank of each machine prints: a file may be missing on one
    machine only.
    """
    if "giantdet.distributed.comm" in sys.modules:
        comm = sys.modules["giantdet.distributed.comm"]
        if comm.world_size() > 1:
            if not comm.said_by_main(message):
                print(message, file=sys.stderr, flush=True)
            return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed arguments; overrides may come before, between and after options."""
    parser = build_parser()
    # argparse takes positional arguments in one place only, and leaves the others.
    options, left = parser.parse_known_args(arguments)
    if left and not (hasattr(options, "overrides") and all(map(_is_override, left))):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides += left
    return options


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="giantdet", description="Train detectors of up to billions of parameters under DeepSpeed ZeRO."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
