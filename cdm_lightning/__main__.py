"""`cdm COMMAND` and `python -m cdm_lightning COMMAND`: the commands, and where each of them lives.

Nothing heavy is imported before the command is known, and then only what the command needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cdm_lightning import __version__
from cdm_lightning.foundation.errors import InputError, user_error
from cdm_lightning.foundation.process_group import ending_together, exit_with_sentence, follows_a_refusal
from cdm_lightning.foundation.terminal import quiet_libraries


@dataclass(frozen=True)
class Command:
    """A command: what it does in a line, and module:function, or several of them by the words of its subcommands."""

    about: str
    function: str | dict[str, str]

    def load(self) -> Any:
        """Import what carries the command out."""
        if isinstance(self.function, dict):
            return {word: imported(function) for word, function in self.function.items()}
        return imported(self.function)


def imported(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    return getattr(import_module(f"cdm_lightning.{module}"), name)


LIGHTNING = {  # carried out by Lightning's own command line, training/lightning_cli.py
    "fit": "Train one stage.",
    "validate": "Loss of a stage on the validation images.",
    "test": "Run a stage or a cascade over the validation images, with the callbacks that measure it.",
    "predict": "Sample for the classes of the validation images; a prediction writer among the callbacks keeps them.",
}
COMMANDS = {
    "prepare": Command(
        "Make shards from the ImageNet archives as downloaded, or from a folder of images.",
        {word: f"data.preparation.prepare:prepare_{word}" for word in ("imagenet", "folder")},
    ),
    "bundle": Command(
        "Put trained stages into one folder: averaged weights as safetensors, everything else as JSON, all hashed.",
        "cascade.make_bundle:bundle",
    ),
    "sample": Command(
        "Draw images from a trained cascade: shards of samples that training can read, and a picture to look at.",
        "sampling.sample:sample",
    ),
    "evaluate": Command(
        "Measure stored samples as the paper does: FID, KID, precision and recall against each reference, and the IS.",
        "evaluation.evaluate:evaluate",
    ),
    "search": Command(
        "Measure FID(s) of every super-resolution stage, on generated and on real low-resolution images, and choose s.",
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
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends in one sentence and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    if arguments[0] == "--version":
        print(f"cdm_lightning {__version__}")
        return
    sys.argv[1:] = arguments  # where Lightning looks, and what the processes it starts repeat
    with ending_together():
        try:
            run(arguments)
        except Exception as error:
            explained = user_error(error)
            if explained is None and not follows_a_refusal():
                raise
            sys.exit(2 if explained is None else exit_with_sentence(explained))


def run(arguments: list[str]) -> None:
    """Hand the arguments to Lightning's command line or to a command of our own."""
    command, rest = arguments[0], arguments[1:]
    if command not in LIGHTNING and command not in COMMANDS:
        known = [*LIGHTNING, *COMMANDS]
        raise InputError(f"{command!r} is no command of cdm: known are {', '.join(known)}")
    quiet_libraries()
    if command in LIGHTNING:
        from cdm_lightning.training.lightning_cli import run as run_lightning

        run_lightning()
        return
    from jsonargparse import auto_cli

    if command == "plan" and rest and not rest[0].startswith("-"):
        rest = ["--stage", *rest]
    auto_cli(COMMANDS[command].load(), args=rest, prog=f"cdm {command}", as_positional=False)


def overview() -> str:
    """The help of `cdm`: every command with what it does."""
    about = LIGHTNING | {name: command.about for name, command in COMMANDS.items()}
    lines = (f"  {name:10s}{text}" for name, text in about.items())
    return "\n".join(
        ["usage: cdm COMMAND [options], and cdm COMMAND --help", "", "Cascaded diffusion models.", "", *lines]
    )


if __name__ == "__main__":
    main()
