"""The command line: `glm-export COMMAND`. Every failure becomes one sentence on stderr and a documented exit code.

    0 ok               3 bad input        6 missing backend    130 SIGINT
    1 our bug          4 accuracy         7 locked             141 closed pipe
    2 usage            5 resources        8 integrity          143 SIGTERM

A command imports torch, onnx and numpy when it runs, so that help is instant.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import click

from glm_export.exporter.commands.bench import bench
from glm_export.exporter.commands.build import build
from glm_export.exporter.commands.checkpoint import checkpoint
from glm_export.exporter.commands.engine import engine
from glm_export.exporter.commands.inspect import inspect
from glm_export.exporter.commands.make_checkpoint import make_checkpoint
from glm_export.exporter.commands.plan import plan
from glm_export.exporter.commands.run import run
from glm_export.exporter.commands.validate import validate
from glm_export.exporter.commands.verify import verify
from glm_export.exporter.signals import interruptible
from glm_export.exporter.supervise import supervised
from glm_export.runtime.errors import GlmExportError, InputError, ResourceError, UsageError, printable

PROGRAM = "glm-export"

_CLOSED_PIPE = 141  # 128 + SIGPIPE, what a shell reports for a program that the signal ended
_OUT_OF_RESOURCES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_FAILING_DISK = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE)


@dataclass
class Settings:
    """The options before the command."""

    debug: bool = False


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"{PROGRAM} {version(PROGRAM)}")
        except PackageNotFoundError:
            click.echo(f"{PROGRAM} (not installed)")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print it.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_obj
def cli(settings: Settings, debug: bool) -> None:
    """Turns a GLM-4.5-family checkpoint into a verified, deployable bundle, and runs it."""
    settings.debug = debug


for _command in (make_checkpoint, plan, build, engine, checkpoint, run, bench, validate, inspect, verify):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--debug" in arguments:
        sys.exit(execute(arguments))
    sys.exit(supervised(lambda: execute(arguments), _report))


def execute(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    settings = Settings()
    with interruptible() as received:
        try:
            code = cli.main(list(arguments), prog_name=PROGRAM, obj=settings, standalone_mode=False)
            sys.stdout.flush()
            return int(code or 0)
        except BaseException as error:
            if settings.debug:
                traceback.print_exception(error)
            if received:
                click.echo(f"{PROGRAM}: stopped by {received[0].name}", err=True)
                return 128 + received[0]
            if isinstance(error, (BrokenPipeError, SystemExit)):  # Click exits on a closed pipe that it sees itself
                return _discard_output()
            return _report(error)


def _report(error: BaseException) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    code, sentence = _explain(error)
    click.echo(f"{PROGRAM}: error: {printable(' '.join(sentence.split()))}", err=True)
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence for an error."""
    if isinstance(error, GlmExportError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else PROGRAM
        return UsageError.exit_code, f"{error.format_message()} See `{command} --help`."
    # torch has no type for it: "DefaultCPUAllocator: can't allocate memory"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return ResourceError.exit_code, "There is not enough memory: free some, or use a machine with more."
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        if error.errno in _OUT_OF_RESOURCES:
            return ResourceError.exit_code, f"{where}{error.strerror}: free some and run the same command again."
        if error.errno in _FAILING_DISK:
            return ResourceError.exit_code, f"{where}{error.strerror}: check the disk and run the same command again."
        return InputError.exit_code, f"{where}{error.strerror}: check the path and its permissions."
    return GlmExportError.exit_code, (
        f"This is a bug in {PROGRAM} ({type(error).__name__}: {error}): please report it with the output of the same "
        f"command as `{PROGRAM} --debug ...`."
    )


def _discard_output() -> int:
    """Nobody reads any more: what Python still flushes when it exits goes nowhere, and without a complaint."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    return _CLOSED_PIPE


if __name__ == "__main__":
    main()
