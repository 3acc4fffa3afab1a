"""How a script's one function is called: by Snakemake or from the command line, with a log either way."""

import argparse
import inspect
import json
import logging
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perturbflow.errors import InputError
from perturbflow.provenance.records import inputs_as_made, write_records

logger = logging.getLogger("perturbflow")

# Calls by hand have one thread unless the environment sets more. With several threads small products of matrices wait
# for each other longer than they gain. Scripts and the command import this module first, and libraries read the
# variable when they are loaded. Jobs have the threads of their rule.
THREADS = os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))

# Inputs and params that decide when a job runs again; its function does not take them.
FOR_SNAKEMAKE = ("again", "code_version", "content", "descriptions", "moment")


def _is_first_process() -> bool:
    """Return False in a process that was started beside another one, for a further device of the same training."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_PROCID"))


def _configure_logging(log: str | None) -> None:
    """Send log lines, warnings and uncaught exceptions to stderr and, under Snakemake, to the rule's log."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log and _is_first_process():
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log, mode="w", encoding="utf-8"))
    level = logging.INFO if _is_first_process() else logging.WARNING
    logging.basicConfig(
        level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers, force=True
    )
    logging.captureWarnings(capture=True)
    # On a full disk a lost log line is not worth a traceback: the terminal has the line too.
    logging.raiseExceptions = False


def _argument_parser(function: Callable) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{function.__name__}.py",
        description=inspect.getdoc(function),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, str)
        options = [part for part in typing.get_args(hint) if part is not type(None)]
        if isinstance(hint, types.UnionType) and options:
            hint = options[0]
        kind = typing.get_origin(hint) or hint
        is_required = parameter.default is inspect.Parameter.empty
        if hint is bool:
            parser.add_argument(
                f"--{name.replace('_', '-')}", action="store_true", help=f"default: {parameter.default}"
            )
            continue
        if hint == list[str]:
            parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", required=is_required, metavar="TEXT")
            continue
        converter = json.loads if kind in (dict, list) else kind
        shown = "JSON" if kind in (dict, list) else getattr(kind, "__name__", str(kind)).upper()
        arguments: dict[str, Any] = {"required": is_required, "type": converter, "metavar": shown}
        if not is_required:
            arguments["default"] = parameter.default
            arguments["help"] = f"default: {parameter.default}"
        parser.add_argument(f"--{name.replace('_', '-')}", **arguments)
    return parser


def _as_declared(value: Any, hint: Any) -> Any:
    """Return strings as paths where the signature says so; Snakemake hands over strings."""
    if value is None:
        return None
    options = (hint, *typing.get_args(hint))  # of a union, its members
    if any(typing.get_origin(option) is list and Path in typing.get_args(option) for option in options):
        return [Path(item) for item in ([value] if isinstance(value, str) else value)]
    return Path(value) if Path in options else value


def _arguments_of_job(function: Callable, snakemake: Any) -> dict[str, Any]:
    """Return the named inputs, outputs and params of a job, and the resources that the function takes."""
    arguments = {**dict(snakemake.input), **dict(snakemake.output), **dict(snakemake.params)}
    arguments = {name: value for name, value in arguments.items() if name not in FOR_SNAKEMAKE}
    accepted = inspect.signature(function).parameters
    if "threads" in accepted:
        arguments["threads"] = snakemake.threads
    if "devices" in accepted:
        arguments["devices"] = max(1, snakemake.resources.get("gpu", 0))
    if "provenance" in accepted:
        code_version = snakemake.params.get("code_version")
        arguments["provenance"] = {**dict(snakemake.wildcards), "code_version": code_version}
    return arguments


def run(function: Callable, snakemake: Any = None, by_hand: Callable | None = None) -> None:
    """Call a script's function with the inputs, outputs and params of a Snakemake job, or of the command line.

    The command line calls `by_hand` in its place, where there is one, as people give fewer arguments. Bad input ends in
    one message and exit status 1; any other error in a traceback, in the log too.
    """
    made_of = None
    if snakemake is None:
        function = by_hand or function
        _configure_logging(None)
        arguments = vars(_argument_parser(function).parse_args())
        logger.info("%s: OMP_NUM_THREADS is %s", function.__name__, THREADS)
    else:
        _configure_logging(snakemake.log[0] if snakemake.log else None)
        arguments = _arguments_of_job(function, snakemake)
        made_of = arguments.pop("made_of", None)
    hints = typing.get_type_hints(function)
    arguments = {name: _as_declared(value, hints.get(name)) for name, value in arguments.items()}
    try:
        inputs = inputs_as_made(snakemake.input) if made_of else {}
        function(**arguments)
        if made_of and _is_first_process():
            write_records(snakemake.output, dict(made_of), inputs)
    except InputError as error:
        logger.error("%s", error)  # noqa: TRY400  the message is all that helps
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit:  # a training that was stopped, and has logged so
        raise
    except BaseException:
        logger.exception("%s failed", function.__name__)
        sys.exit(1)
