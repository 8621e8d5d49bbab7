"""Mutation testing: change one operator or condition of the package at a time, and see whether a test fails.

    .venv/bin/python tests/mutants.py cascade stages data/stream.py --sample 100

tries 100 changes by chance in each of these rooms and files, and prints the share that tests notice and the rest.
First every test file runs once under a tracer, which notes the lines that each test reaches. Then a process that has
imported torch forks a child for each change. The child imports the package with the change, in memory alone, and runs
the tests that reach its line, the nearest and fastest first. What was found stays in runs/mutants, and a stopped run
goes on.

Tests that start another program do not see the change. Not changed are docstrings, annotations, decorators, what
follows `raise` and calls of SKIPPED_CALLS (words for the user), and SKIPPED_KEYWORDS (guards against slips; looks).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import importlib.machinery
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, STORE = ROOT / "cdm_lightning", ROOT / "runs" / "mutants"
STARTED = time.time()
PRELOADED = (
    "torch lightning.pytorch diffusers torchmetrics jsonargparse webdataset safetensors.torch scipy.stats jinja2 "
    "matplotlib.pyplot hypothesis pytest PIL.Image rich.console torch.utils.data torch.distributed omegaconf"
)
TESTS = [
    *("cascade", "stages", "diffusion", "evaluation", "sampling/test_sampling.py", "sampling/test_sampling_scale.py"),
    *("sampling/test_sample_command.py", "sampling/test_going_on.py", "sampling/test_shared_work.py"),
    *(
        "data/test_stream.py",
        "data/test_datamodule.py",
        "data/test_shards.py",
        "data/test_packed.py",
        "data/test_data_faults.py",
    ),
    "test_cli.py",
]  # not those that only start other programs
LEFT_OUT = "not flat"  # their figures also depend on what else the machine does
SKIPPED_CALLS = {"rank_zero_warn", "rank_zero_info", "print", "warn", "print_line"}
SKIPPED_KEYWORDS = {"strict", "mininterval", "figsize", "dpi"}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


class Mutant(NamedTuple):
    file: str  # in the package
    number: int  # of the node, and of the change of it
    kind: int
    what: str
    line: int
    reach: tuple[int, int]  # a test that reaches one of these lines may notice; (0, 0): any line

    def __str__(self) -> str:
        return f"{self.file}:{self.line} [{self.number}.{self.kind}] {self.what}"


def changes(node: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(what changes, a function that changes the node in place or returns its successor)."""
    if isinstance(node, ast.Compare):
        for at, op in enumerate(node.ops):
            yield swap_name(op), lambda at=at, op=op: node.ops.__setitem__(at, SWAPS[type(op)]())
    elif isinstance(node, ast.BoolOp):
        yield swap_name(node.op), lambda: setattr(node, "op", SWAPS[type(node.op)]())
        for value in node.values:
            rest = [other for other in node.values if other is not value]
            left = ast.BoolOp(node.op, rest) if rest[1:] else rest[0]
            yield f"drop {ast.unparse(value)}", lambda left=left: left
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield swap_name(node.op), lambda: setattr(node, "op", SWAPS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield f"drop {type(node.op).__name__}", lambda: node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        new = not node.value if isinstance(node.value, bool) else node.value + (1 if node.value % 1 == 0 else 0.5)
        yield f"{node.value} -> {new}", lambda: setattr(node, "value", new)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        for to in (False,) if isinstance(node, ast.While) else (True, False):
            yield f"{ast.unparse(node.test)} -> {to}", lambda to=to: setattr(node, "test", ast.Constant(to))
    elif isinstance(node, ast.comprehension):
        for at, test in enumerate(node.ifs):
            yield f"drop if {ast.unparse(test)}", lambda at=at: node.ifs.pop(at) and None
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield f"{node.func.id} -> {NAMES[node.func.id]}", lambda: setattr(node.func, "id", NAMES[node.func.id])
    elif isinstance(node, ast.Return) and node.value and getattr(node.value, "value", 0) is not None:
        yield "return None", lambda: setattr(node, "value", None)
    elif isinstance(node, ast.Expr | ast.Continue | ast.Break):
        yield f"drop {ast.unparse(node)}", lambda: ast.Pass()
    elif isinstance(node, ast.Slice):
        for field in ("lower", "upper", "step"):
            if getattr(node, field) is not None:
                yield f"drop {field} {ast.unparse(getattr(node, field))}", lambda f=field: setattr(node, f, None)


def swap_name(op: ast.AST) -> str:
    return f"{type(op).__name__} -> {SWAPS[type(op)].__name__}"


def skipped(node: Any) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant | ast.Yield | ast.YieldFrom) or skipped(node.value)
    if isinstance(node, ast.Call):
        return (getattr(node.func, "id", None) or getattr(node.func, "attr", None)) in SKIPPED_CALLS
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.Raise) or (isinstance(node, ast.keyword) and node.arg in SKIPPED_KEYWORDS)


def nodes(node: Any, parent: Any = None, inside: bool = False, line: int = 0, reach: tuple[int, int] = (0, 0)) -> Any:
    """(node, parent, line, lines that a test must reach) of everything that may be changed, in order."""
    line = getattr(node, "lineno", line)
    if isinstance(node, ast.stmt) and inside:
        body = getattr(node, "body", None)
        reach = (node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or line)
    yield node, parent, line, reach
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        function = isinstance(node, ast.FunctionDef)
        body = (node.body[0].lineno, node.end_lineno) if function else reach
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not skipped(child):
                yield from nodes(child, node, inside or (function and field == "body"), line, body)


def mutants(file: str) -> list[Mutant]:
    """Every change of a file of the package."""
    found = nodes(ast.parse((PACKAGE / file).read_text()))
    return [
        Mutant(file, number, kind, what, line, reach)
        for number, (node, _, line, reach) in enumerate(found)
        for kind, (what, _) in enumerate(changes(node))
    ]


def mutated(mutant: Mutant) -> ast.Module:
    tree = ast.parse((PACKAGE / mutant.file).read_text())
    node, parent, *_ = list(nodes(tree))[mutant.number]
    successor = list(changes(node))[mutant.kind][1]()
    if successor is not None:
        for field, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, field, successor)
            elif isinstance(value, list) and node in value:
                value[value.index(node)] = successor
    return ast.fix_missing_locations(tree)


class MutantFinder(importlib.machinery.PathFinder):
    """Imports the file of a mutant from its syntax tree."""

    origin, tree = "", ast.Module([], [])

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        spec = super().find_spec(fullname, path, target) if fullname.startswith("cdm_lightning") else None
        if spec is None or spec.origin != cls.origin:
            return None
        spec.loader = loader = importlib.machinery.SourceFileLoader(fullname, cls.origin)
        loader.get_code = lambda _: compile(cls.tree, cls.origin, "exec")  # type: ignore[method-assign, assignment]
        return spec


def in_child(work: Callable[[Path], int], limit: float) -> int:
    """The exit code of `work` in a forked process with a folder; -1 where it takes longer than `limit` seconds."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"mutants{os.getpid()}"
    folder.mkdir(parents=True)
    if not (child := os.fork()):
        os.setpgid(0, 0)
        output, code = os.open(folder / "output", os.O_WRONLY | os.O_CREAT), 3
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            code = work(folder)
        finally:
            os._exit(code)
    end, done, status = time.time() + limit, 0, 0
    while not done and time.time() < end:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it left behind too
    if not done:
        os.waitpid(child, 0)
    shutil.rmtree(folder, ignore_errors=True)
    return os.waitstatus_to_exitcode(status) if done else -1


def run_pytest(folder: Path, arguments: list[str], plugins: Any = ()) -> int:
    import pytest

    options = f"-p no:cacheprovider --tb=no --basetemp={folder}/base --rootdir={ROOT}".split()
    return int(pytest.main([*arguments, *options, "-k", LEFT_OUT], plugins=plugins))


def trace_file(file: Path, out: Path, folder: Path) -> int:
    """Run a test file, and write the processor seconds of each test and the lines that it reaches in this process."""
    import pytest

    found: dict[str, Any] = {}
    of_fixture: dict[str, set[tuple[str, int]]] = {}
    lines: set[tuple[str, int]] = set()

    def enter(frame: Any, *_: Any) -> Any:
        name = frame.f_code.co_filename
        return note if name.startswith(str(PACKAGE)) else None

    def note(frame: Any, *_: Any) -> Any:
        lines.add((frame.f_code.co_filename[len(str(PACKAGE)) + 1 :], frame.f_lineno))
        return note

    class Plugin:
        def pytest_collection_finish(self) -> None:
            sys.settrace(enter)
            threading.settrace(enter)

        @pytest.hookimpl(wrapper=True)
        def pytest_fixture_setup(self, fixturedef: Any) -> Any:
            outer = set(lines)
            lines.clear()
            result = yield
            if fixturedef.scope != "function":  # any of the tests that take it may be the first to set it up
                of_fixture[fixturedef.argname] = set(lines)
            lines.update(outer)
            return result

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: Any) -> Any:
            lines.clear()
            begin, about = time.process_time(), found.setdefault(item.nodeid, {"passed": True})
            result = yield
            about["lines"] = sorted(lines.union(*(of_fixture.get(name, set()) for name in item.fixturenames)))
            about["seconds"] = time.process_time() - begin
            return result

        def pytest_runtest_logreport(self, report: Any) -> None:
            found[report.nodeid]["passed"] &= report.passed

    code = run_pytest(folder, [str(file)], [Plugin()])
    sys.settrace(None)
    out.write_text(json.dumps(found))
    return code


def traced(places: list[str]) -> dict[str, Any]:
    """What `trace_file` notes of these folders and files of tests/; kept until they or the package change."""
    sources = b"".join(file.read_bytes() for file in sorted(PACKAGE.rglob("*.py")))
    tests: dict[str, Any] = {}
    for file in sorted({file for place in places for file in files_of(ROOT / "tests" / place, "test_*.py")}):
        digest = hashlib.sha256(sources + file.read_bytes()).hexdigest()[:16]
        out, begin = STORE / f"{file.stem}-{digest}.json", time.time()
        if not out.exists():
            trace = partial(trace_file, file, out)
            print(f"{file.name}: code {in_child(trace, 1800)}, traced in {time.time() - begin:.0f} s", flush=True)
        tests |= json.loads(out.read_text()) if out.exists() else {}
    return {name: test for name, test in tests.items() if test["passed"]}


def files_of(place: Path, pattern: str) -> list[Path]:
    return [place] if place.suffix == ".py" else list(place.rglob(pattern))


def try_mutant(mutant: Mutant, tests: dict[str, Any], budget: float) -> dict[str, Any]:
    """Whether a test notices a mutant: killed, survived or unreached.

    budget: processor seconds of tests, those of the same room first, and the fastest of them first.
    """
    first, last = mutant.reach
    reach = {name for name, t in tests.items() if any(not first or first <= n <= last for n in t["of"][mutant.file])}
    chosen, cost = [], 0.0
    own = f"tests/{mutant.file.split('/')[0]}/"
    for test in sorted(reach, key=lambda name: (not name.startswith(own), tests[name]["seconds"])):
        if chosen and cost + tests[test]["seconds"] > budget:
            break
        chosen.append(test)
        cost += tests[test]["seconds"]
    if not chosen:
        return {"state": "unreached"}
    if any((ROOT / test.split("::")[0]).stat().st_mtime > STARTED for test in chosen):
        raise SystemExit("a test file has changed: start again, and what is known stays")

    def work(folder: Path) -> int:
        MutantFinder.origin, MutantFinder.tree = str(PACKAGE / mutant.file), mutated(mutant)
        sys.meta_path.insert(0, MutantFinder)
        return run_pytest(
            folder, ["-x", f"--timeout={15 + 5 * max(tests[test]['seconds'] for test in chosen)}", *chosen]
        )

    state = "killed" if in_child(work, 60 + 4 * cost) else "survived"  # also by hanging
    return {"state": state, "tests": len(chosen), "slower_tests": len(reach) - len(chosen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="+", help="rooms and files of the package")
    parser.add_argument("--sample", type=int, help="how many changes of each room or file, by chance; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=20, help="processor seconds of tests for a change")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="folders and files of tests/")
    parser.add_argument("--again", action="store_true", help="try once more what was not killed before")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    STORE.mkdir(parents=True, exist_ok=True)
    for name in PRELOADED.split():
        importlib.import_module(name)
    tests = traced(arguments.tests)
    for test in tests.values():
        test["of"] = defaultdict(set)
        for file, line in test.pop("lines"):
            test["of"][file].add(line)
    for room in arguments.rooms:
        files = sorted(files_of(PACKAGE / room, "*.py"))
        chosen = [mutant for file in files for mutant in mutants(str(file.relative_to(PACKAGE)))]
        random.Random(arguments.seed).shuffle(chosen)  # a larger sample holds every smaller one
        chosen = chosen[: arguments.sample]
        versions = {m.file: hashlib.sha256((PACKAGE / m.file).read_bytes()).hexdigest()[:8] for m in chosen}
        store = STORE / f"results-{room.replace('/', '-')}.json"
        results = json.loads(store.read_text()) if store.exists() else {}
        for mutant in chosen:
            name = f"{mutant} {versions[mutant.file]}"
            if name not in results or (arguments.again and results[name]["state"] != "killed"):
                results[name] = try_mutant(mutant, tests, arguments.budget)
                store.write_text(json.dumps(results, indent=0))
            if results[name]["state"] != "killed":
                print(f"{results[name]['state']}: {mutant}", flush=True)
        killed = sum(results[f"{m} {versions[m.file]}"]["state"] == "killed" for m in chosen)
        print(f"{room}: {killed} of {len(chosen)} killed, {killed / max(1, len(chosen)):.0%}", flush=True)


if __name__ == "__main__":
    main()
