"""The command line answers at once: what is imported before it does. Modules are counted, not seconds."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "lightning", "diffusers", "torchmetrics", "scipy", "matplotlib", "wandb", "webdataset")
RUN = """
import sys
sys.argv[1:] = {arguments!r}
from cdm_lightning.__main__ import main
try:
    main()
except SystemExit as stop:
    assert stop.code == {code}, stop.code
print("IMPORTED", *(name for name in {names!r} if name in sys.modules))
"""


def imported(program: str) -> set[str]:
    """The heavy packages that a program of its own has imported at its end."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["--version"], 0), ([], 0), (["nonsense"], 2)])
def test_an_answer_without_a_command_imports_nothing_heavy(arguments, code):
    names = (*HEAVY, "jsonargparse", "numpy", "PIL", "rich", "omegaconf", "jinja2")
    assert imported(RUN.format(arguments=arguments, code=code, names=names)) == set()


def test_importing_the_package_imports_nothing_heavy_and_its_names_are_there():
    program = f"""
import sys
import cdm_lightning
before = [name for name in {(*HEAVY, "numpy")!r} if name in sys.modules]
from cdm_lightning import *
assert all(name in globals() for name in cdm_lightning.__all__)
assert CascadeModule.__module__ == "cdm_lightning.cascade.cascade" and BaseStage is cdm_lightning.stages.BaseStage
print("IMPORTED", *before)
"""
    assert imported(program) == set()


def test_the_help_of_our_own_commands_imports_torch_at_most():
    """All of them in one process, and a wrong option; only the datasets' format may come with torch."""
    program = f"""
import sys
from cdm_lightning.__main__ import COMMANDS, main
for name, command in COMMANDS.items():
    parts = [[sub] for sub in command.function] if isinstance(command.function, dict) else [[]]
    for arguments in [*([name, *part, "--help"] for part in parts), [name, "--no_such_option", "1"]]:
        try:
            main(arguments)
        except SystemExit as stop:
            assert stop.code == (2 if "--no_such_option" in arguments else 0), (arguments, stop.code)
print("IMPORTED", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    assert imported(program) <= {"torch", "webdataset"}


def test_the_overview_says_what_each_command_says_of_itself():
    from cdm_lightning.__main__ import COMMANDS, overview

    for name, command in COMMANDS.items():
        loaded = command.load()
        functions = loaded.values() if isinstance(loaded, dict) else [loaded]
        assert f"  {name:10s}{command.about}" in overview().splitlines()
        if len(functions) == 1 or not isinstance(loaded, dict):
            assert next(iter(functions)).__doc__.splitlines()[0] == command.about
