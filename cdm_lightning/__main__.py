"""The command line, `cdm COMMAND` or `python -m cdm_lightning COMMAND`: the table of commands, and their errors.

To start fast, this module imports only what the given command needs, once the command is known.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cdm_lightning import __version__
from cdm_lightning.foundation.errors import InputError, user_error
from cdm_lightning.foundation.process_group import (
    connection_error,
    ending_together,
    exit_with_sentence,
    follows_a_refusal,
)
from cdm_lightning.foundation.stopping import closed_outputs, ending_with_a_sentence
from cdm_lightning.foundation.terminal import quiet_libraries


@dataclass(frozen=True)
class Command:
    """A command of our own.

    about: what it does, in one line. function: "module:function" below cdm_lightning, or one for each subcommand.
    """

    about: str
    function: str | dict[str, str]

    def load(self) -> Any:
        """Import the function, or the functions by subcommand."""
        if isinstance(self.function, dict):
            return {name: import_function(function) for name, function in self.function.items()}
        return import_function(self.function)


def import_function(function: str) -> Callable[..., Any]:
    """The function at "module:function" below cdm_lightning."""
    module, _, name = function.partition(":")
    return getattr(import_module(f"cdm_lightning.{module}"), name)


LIGHTNING = {  # commands of Lightning's command line, see training/lightning_cli.py
    "fit": "Train one stage.",
    "validate": "Compute the loss of a stage on the validation images.",
    "test": "Test a stage or a cascade on the validation images; the callback CascadeFigures computes FID and KID.",
    "predict": "Draw samples for the classes of the validation images; a BasePredictionWriter callback can store them.",
}
COMMANDS = {
    "prepare": Command(
        "Make shards from the ImageNet archives, a folder of images, WebDataset tars, parquet files or LSUN.",
        {
            "imagenet": "data.preparation.imagenet:prepare_imagenet",
            "folder": "data.preparation.folders:prepare_folder",
            "webdataset": "data.preparation.webdataset:prepare_webdataset",
            "parquet": "data.preparation.parquet:prepare_parquet",
            "lsun": "data.preparation.lsun:prepare_lsun",
        },
    ),
    "import": Command(
        "Make a checkpoint of a stage from a network of guided-diffusion (ADM), such as 64x64_diffusion.pt.",
        "stages.import_stage:import_adm",
    ),
    "bundle": Command(
        "Put trained stages into one folder: averaged weights as safetensors, everything else as JSON, all hashed.",
        "cascade.make_bundle:bundle",
    ),
    "sample": Command(
        "Draw images from a trained cascade: shards of samples that training can read, and a picture to look at.",
        "sampling.sample:sample",
    ),
    "upscale": Command(
        "Enlarge pictures of your own by the super-resolution stages of a trained cascade.",
        "sampling.upscale:upscale",
    ),
    "evaluate": Command(
        "Measure stored samples as the paper does: FID, KID, precision and recall against each reference, and the IS.",
        "evaluation.evaluate:evaluate",
    ),
    "search": Command(
        "Measure each super-resolution stage over s, on generated and on real low-resolution images, and choose s.",
        "evaluation.search.search:search",
    ),
    "detector": Command(
        "Keep the canonical Inception network for FID and KID in the cache, $CDM_CACHE or ~/.cache/cdm_lightning.",
        "evaluation.detectors.inception:detector",
    ),
    "reference": Command(
        "Measure real images once: moments and features for FID, KID, precision and recall, in one file.",
        "evaluation.references.reference:reference",
    ),
    "npz": Command(
        "Write finished samples as ADM's .npz: arr_0, uint8 (N, R, R, C), and arr_1, int64 (N,) class numbers.",
        "evaluation.references.adm:npz",
    ),
    "sweep": Command(
        "Run every combination of a W&B sweep file, and print them as one table, best first.",
        "planning.sweep:sweep",
    ),
    "cas": Command(
        "Classification accuracy score: train a classifier on generated images alone, test it on real ones.",
        "evaluation.cas.cas:cas",
    ),
    "plan": Command(
        "Parameters, FLOPs, memory, time, micro-batch and accumulation of a training, and the command that starts it.",
        "planning.plan:plan",
    ),
    "inspect": Command(
        "Say what a folder or file is: shards, samples, a bundle, a checkpoint or a card; and whether it is whole.",
        "inspection.inspect:inspect",
    ),
}
POSITIONAL = {"plan": "--stage", "inspect": "--path"}  # the option that a first word without a name is


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. An error of the user ends with one sentence and exit code 2, a signal with 128 + its number.

    arguments: None for sys.argv.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    if arguments[0] == "--version":
        print(f"cdm_lightning {__version__}")
        return
    with ending_together(), ending_with_a_sentence():
        try:
            arguments = import_modules(arguments)
            sys.argv[1:] = arguments  # Lightning reads it, and starts further processes with it
            run(arguments)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and closed_outputs():
                raise  # nobody reads the output any more
            refusal = user_error(error)
            if refusal is None and not follows_a_refusal() and (refusal := connection_error(error)) is None:
                raise
            sys.exit(2 if refusal is None else exit_with_sentence(refusal))


def import_modules(arguments: list[str]) -> list[str]:
    """Import the modules of `--import MODULE` before the command, which may define stages; gives the other arguments.

    $CDM_IMPORT, modules parted by commas, does the same; it hands them on to further processes.
    """
    named = [name for name in os.environ.get("CDM_IMPORT", "").split(",") if name]
    while arguments[:1] == ["--import"]:
        named, arguments = [*named, *arguments[1:2]], arguments[2:]
    if named:
        os.environ["CDM_IMPORT"] = ",".join(dict.fromkeys(named))
        sys.path.insert(0, os.getcwd())
    for name in named:
        try:
            import_module(name)
        except ImportError as error:
            raise InputError(f"--import {name}: {error}") from error
    return arguments


def run(arguments: list[str]) -> None:
    """Pass the arguments to Lightning's command line or to a command of our own."""
    command, rest = arguments[0], arguments[1:]
    if command not in LIGHTNING and command not in COMMANDS:
        from difflib import get_close_matches

        known = [*LIGHTNING, *COMMANDS]
        close = "".join(f" (the nearest is {name})" for name in get_close_matches(command, known, 1))
        raise InputError(f"{command!r} is no command of cdm{close}: known are {', '.join(known)}")
    quiet_libraries()
    if command in LIGHTNING:
        from cdm_lightning.training.lightning_cli import run as run_lightning

        run_lightning()
        return
    from jsonargparse import auto_cli

    from cdm_lightning.foundation.parser import Parser

    if command in POSITIONAL and rest and not rest[0].startswith("-"):
        rest = [POSITIONAL[command], *rest]
    components = COMMANDS[command].load()
    auto_cli(components, args=rest, prog=f"cdm {command}", as_positional=False, parser_class=Parser)


def overview() -> str:
    """The text of `cdm --help`: every command and what it does."""
    about = LIGHTNING | {name: command.about for name, command in COMMANDS.items()}
    lines = (f"  {name:10s}{text}" for name, text in about.items())
    return "\n".join(
        [
            "usage: cdm COMMAND [options]",
            "       cdm COMMAND --help",
            "       cdm --import MODULE COMMAND [options]",
            "",
            "Cascaded diffusion models.",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    main()
