"""jsonargparse's parser, with plain forms of options, and one sentence with the nearest right word for every error."""

from __future__ import annotations

import json
import os
import re
import sys
import types
from argparse import Action, ArgumentError
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from inspect import isclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace

from cdm_lightning.foundation.errors import InputError

LISTS = (list, tuple, Sequence, Iterable)
KINDS = {  # of a value: in words, one and several; what an example shows
    bool: ("true or false", "true or false", "true"),
    int: ("a whole number", "whole numbers", "8"),
    float: ("a number", "numbers", "0.1"),
    str: ("a word", "words", "WORD"),
    os.PathLike: ("a path", "paths", "PATH"),
}


@dataclass(frozen=True)
class Problem:
    """What is wrong with the option `key` ("" for none), and an option with a value that would be right instead.

    link: how the sentence goes on to that option.
    """

    key: str
    text: str
    link: str = ", as in"
    right: str = ""
    value: Any = None

    def inside(self, key: str) -> Problem:
        """The same problem, of an option of the class that the option `key` names."""
        return replace(self, key=f"{key}.{self.key}", right=self.right and f"{key}.{self.right}")

    def sentence(self, file: str = "") -> str:
        """For the command line, or for a configuration."""
        start = f"{file}: {self.key}" if file else f"--{self.key}" if self.key else ""
        right, value = self.right, self.value
        if isinstance(value, list):
            value = f"[{', '.join(map(str, value))}]" if file else ",".join(map(str, value))
        if right and file:
            right = right if value is None else f"{right.rpartition('.')[2]}: {value}"
        elif right:
            right = f"--{right}" + (f" {value}" if value is not None else "")
        return f"{start} {self.text}{f'{self.link} {right}' if right else ''}".strip()


class Parser(ArgumentParser):
    """An ArgumentParser that takes plain forms of options, and whose errors are one sentence.

    An option of a list takes a lone value or values with commas (`--levels 501,0`) beside a JSON list, which is exact,
    and a name takes dashes for underscores. Names must be whole. An error is an InputError that says what is wrong, and
    the nearest name or a value that would be right; if a configuration is wrong, its file.
    """

    example = ""  # options that would work where required ones are missing
    reading = ""  # the configuration that is being read
    inner: ClassVar[dict[str, Problem]] = {}  # problems with options of classes, by their sentences
    words: Sequence[str] = ()  # of the command line

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]  # as in jsonargparse
        """Parse command-line words, after turning plain forms into those of jsonargparse."""
        self.words = self.exact(sys.argv[1:] if args is None else args)
        return super().parse_args(self.words, *more, **kwargs)

    def exact(self, words: Iterable[str]) -> list[str]:
        """The words with names as declared, and values of list options as JSON lists."""
        options, found = self._option_string_actions, []
        action: Action | None = None  # whose value comes next
        for word in words:
            name, equals, value = word.partition("=")
            if not word.startswith("--"):
                found.append(word if action is None else exact_list(word, action))
                action = None
                continue
            if name not in options and "--" + name[2:].replace("-", "_") in options:
                name = "--" + name[2:].replace("-", "_")
            action = options.get(name)
            found.append(f"{name}={exact_list(value, action) if action else value}" if equals else name)
            action = None if equals else action
        return found

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Read a configuration; errors name its file."""
        read_yaml(Path(path))
        self.reading = str(path)
        try:
            settings = super().parse_path(path, *args, **kwargs)
            known = {action.dest for action in self._actions if not action.dest.endswith(".help")}
            leaves = {key for key in known if not any(other.startswith(f"{key}.") for other in known)}
            for key in settings.keys():  # noqa: SIM118, a Namespace of jsonargparse
                if not (key in known or "__" in key or any(key.startswith(f"{leaf}.") for leaf in leaves)):
                    self.error(f"Option '{key}' is not accepted")
            return settings
        finally:
            self.reading = ""

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Check the values; null too, which jsonargparse takes for every option of a class or a configuration."""
        super().validate(namespace, *args, **kwargs)
        for action in self._actions:
            if hasattr(action, "_typehint") and action.default is not None and namespace.get(action.dest, "") is None:
                self._check_value_key(action, None, action.dest, None)

    def names(self) -> list[str]:
        """Names of options that a mistyped one may mean."""
        options = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        return [name for name in options if not name.endswith(("+", "help"))]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an InputError of one sentence for an error message of jsonargparse or argparse."""
        problem = self.problem(message)
        if not self.exit_on_error:  # the parser of a class: the message of the outer one holds this sentence
            self.inner[problem.sentence()] = problem
            raise ArgumentError(None, problem.sentence()) from ex
        raise InputError(problem.sentence(self.reading)) from ex

    def problem(self, message: str) -> Problem:
        """What the message is about, and what would be right."""
        said = min(  # the first, and the longest there
            (sentence for sentence in self.inner if sentence in message),
            key=lambda sentence: (message.find(sentence), -len(sentence)),
            default=None,
        )
        inner = None if said is None else self.inner[said]
        command = self.prog.replace(" [options]", "")
        if found := re.match(r'Parser key "([^"]+)"(?: element \d+)?:\s*(.*)', message, re.S):
            key, rest = found.groups()
            if inner is None:
                return self.wrong_value(key, rest)
            if (base := re.search(r"given class_path '([^']*)'", rest)) and base[1].startswith("lightning.Lightning"):
                return Problem(f"{key}.{inner.key}", f"comes before its class: first --{key} CLASS, or --config FILE")
            if "is no option" in inner.text and not inner.right:
                return Problem(f"{key}.{inner.key}", f"is no option: `{command} --{key}.help CLASS` lists them")
            if inner.value is None and (nested := re.search(r"NestedArg\(key='[^']*', val='([^']*)'\)", rest)):
                inner = replace(inner, value=nested[1])
            return inner.inside(key)
        if inner is not None:
            return inner
        if found := re.search(r"(?:Group '([^']*)'.*)?[Oo]ption '([^']+)'", message):
            return self.unknown(f"{found[1]}.{found[2]}" if found[1] else found[2])
        if found := re.match(r"unrecognized arguments: (\S+)(?: ([^-]\S*))?", message):
            if not found[1].startswith("--"):
                return Problem("", f"{found[1]!r} follows no option: it takes --name value, and one,two for a list")
            name, _, value = found[1][2:].partition("=")
            return self.unknown(name, value or found[2])
        if found := re.match(r"the following arguments are required: (.*)", message):
            missing = found[1].split(", ")
            if not self.exit_on_error:  # of a class
                others = f", and so must {', '.join(missing[1:])}" if missing[1:] else ""
                return self.suggested(missing[0], f"must be given{others}")
            if self._subcommands_action is not None:
                missing = [name.partition(".")[2] for name in missing]
            line = [*self.words, *(f"--{name} {name.upper()}" for name in missing)]
            needed = " and ".join(f"--{name}" for name in missing)
            return Problem("", f"{needed} must be given, as in {command} {self.example or ' '.join(line)}")
        if found := re.match(r"argument -*(\S+): expected one argument", message):
            return self.suggested(self.without_value(found[1]), "needs a value")
        if found := re.match(r"expected \"\w+\" to be one of \{(.*)\}", message):
            names = found[1].split(",")
            return Problem("", f"{command} needs one of {', '.join(names)}, as in {command} {names[0]} --help")
        if found := re.match(r"argument \S+: invalid choice: '(.*)' \(choose from (.*)\)", message):
            choices = found[2].replace("'", "").split(", ")
            return Problem("", f"{found[1]!r} is none of {', '.join(choices)}{likely(nearest(found[1], choices))}")
        return Problem("", shortened(message))

    def unknown(self, name: str, value: str | None = None) -> Problem:
        """The problem of an option that does not exist, with the nearest one."""
        command = self.prog.replace(" [options]", "")
        if close := nearest(name, self.names()):
            return Problem(name, "is no option", ": the nearest is", close, value)
        return Problem(name, f"is no option: `{command} --help` lists them" if self.exit_on_error else "is no option")

    def without_value(self, name: str) -> str:
        """The name of the option of a class, below the option `name`, that has no value among the words."""
        for word, after in zip(self.words, [*self.words[1:], "--"], strict=True):
            if word.startswith(f"--{name}.") and "=" not in word and after.startswith("--"):
                return word[2:]
        return name

    def wrong_value(self, key: str, message: str) -> Problem:
        """What the option takes instead of the value in the message, by the option's type."""
        if found := re.match(r"(File does not exist|Path is not a file|.* not readable)[^:]*: '(.*)'", message):
            path = Path(found[2])
            if path.is_dir():
                return Problem(key, f"{relative(path)} is a folder: give a file in it")
            close = get_close_matches(path.name, [p.name for p in path.parent.glob("*")], 1)
            text = f"{relative(path)} {'cannot be read' if path.exists() else 'does not exist'}"
            return Problem(key, text + likely(str(relative(path.parent / close[0])) if close else None))
        typehint = getattr(self.option(key), "_typehint", None)
        if typehint is None:
            return Problem(key, f"cannot be taken: {shortened(message.splitlines()[0])}")
        if (classes := classes_of(typehint)) and (problem := wrong_class(message, classes)):
            return Problem(key, problem)
        given = re.findall(r"(?:Got|Given) value: (.*)", message) or re.findall(r": (\S+) does not conform", message)
        value = re.sub(r"^\['([^']*)'\]$", r"\1", given[-1].strip()) if given else ""
        return self.suggested(key, f"takes {described(typehint)}{f', not {value[:80]!r}' if value else ''}", value)

    def option(self, key: str) -> Action | None:
        """The option of this parser, or of one of its commands."""
        commands = self._subcommands_action
        parsers = [self, *(commands._name_parser_map.values() if commands is not None else ())]
        return next((action for parser in parsers for action in parser._actions if action.dest == key), None)

    def suggested(self, key: str, text: str, value: str = "") -> Problem:
        """A problem with an example: the word nearest to `value`, the default, or a value of the option's type."""
        option = self.option(key)
        if (typehint := getattr(option, "_typehint", None)) is None:
            return Problem(key, text)
        right = getattr(option, "default", None)
        if (choices := choices_of(typehint)) and value:
            right = nearest(value, choices) or choices[0]
        elif not isinstance(right, int | float | str | list) or right in ([], "", -1):
            right = example_of(typehint)
        return Problem(key, text, right=key, value=str(right).lower() if isinstance(right, bool) else right)


def exact_list(value: str, action: Action) -> str:
    """The value of an option as a JSON list, if the option is a list and the value is not one already.

    A path that exists is one value, whatever commas it has.
    """
    kinds = list_kinds(getattr(action, "_typehint", None))
    text = value.strip()
    if not kinds or text in ("", "null", "-") or text.startswith("${") or (text[0] == "[" and text[-1] == "]"):
        return value
    words = all(isclass(kind) and issubclass(kind, str | os.PathLike) for kind in kinds)
    whole = any(isclass(kind) and issubclass(kind, os.PathLike) for kind in kinds) and Path(value).exists()
    parts = [value] if whole else [part.strip() for part in value.split(",") if part.strip()]
    return json.dumps(parts if words else [number_or_word(part) for part in parts])


def number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def alternatives(typehint: Any) -> list[Any]:
    """The types of a union without None; else the type itself."""
    union = get_origin(typehint) in (Union, types.UnionType)
    return [kind for kind in (get_args(typehint) if union else [typehint]) if kind is not types.NoneType]


def list_kinds(typehint: Any) -> list[Any]:
    """The types of a list's values, if an option takes a list of plain values and nothing else; else []."""
    kinds = alternatives(typehint)
    if len(kinds) != 1 or get_origin(kinds[0]) not in LISTS:
        return []
    items = [item for kind in get_args(kinds[0]) if kind is not ... for item in alternatives(kind)]
    plain = all(get_origin(i) is Literal or (isclass(i) and issubclass(i, tuple(KINDS))) for i in items)
    return items if plain else []


def described(typehint: Any, several: bool = False) -> str:
    """What an option of this type takes, in words."""
    words: list[str] = []
    if choices := [
        str(word) for kind in alternatives(typehint) if get_origin(kind) is Literal for word in get_args(kind)
    ]:
        *first, last = dict.fromkeys(choices)
        words.append(f"{', '.join(first)} or {last}" if first else last)
    for kind in alternatives(typehint):
        if get_origin(kind) in LISTS:
            items = [described(item, several=True) for item in get_args(kind)[:1]]
            words.append(f"a list of {items[0] if items else 'values'}")
        elif get_origin(kind) is not Literal and isclass(kind):
            name = next((names[several] for base, names in KINDS.items() if issubclass(kind, base)), kind.__name__)
            words.append(name + getattr(kind, "_expression", "").replace("v", " "))
    return " or ".join(dict.fromkeys(words))


def choices_of(typehint: Any) -> list[str]:
    """The words of the Literals in a type, or in the lists in it."""
    kinds = [
        item for kind in alternatives(typehint) for item in (get_args(kind) if get_origin(kind) in LISTS else [kind])
    ]
    return list(dict.fromkeys(str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)))


def example_of(typehint: Any) -> Any:
    """A value of the type: numbers, or a name in capitals."""
    for kind in alternatives(typehint):
        if get_origin(kind) in LISTS:
            return [*map(example_of, get_args(kind)[:1]), *(["16"] if int in get_args(kind) else [])]
        if isclass(kind):
            return next((names[2] for base, names in KINDS.items() if issubclass(kind, base)), "VALUE")
    return "VALUE"


def classes_of(typehint: Any) -> list[type]:
    """The classes, other than plain values, whose subclasses an option takes by their paths."""
    kinds = [
        item for kind in alternatives(typehint) for item in (get_args(kind) if get_origin(kind) in LISTS else [kind])
    ]
    return [kind for kind in kinds if isclass(kind) and not issubclass(kind, (*KINDS, dict))]


def wrong_class(message: str, classes: list[type]) -> str:
    """What is wrong with a class path, if the message of an error is about one."""
    kind = classes[0].__name__
    if found := re.search(r"Import path (\S+) does not correspond", message):
        return f"takes a {kind}, and {found[1]} is none"
    if found := re.search(r"Problem with given class_path '([^']+)':\s*([^\n]*)", message):
        return f"{found[1]} cannot be imported ({found[2]}){likely(nearest_class(found[1], classes))}"
    if found := re.search(r"Expected a dot import path string: (.*)", message):
        return f"takes the path of a {kind}, and {found[1]!r} is none{likely(nearest_class(found[1], classes))}"
    return ""


def nearest_class(path: str, classes: list[type]) -> str | None:
    """The path of a class like the one at `path`: of its module, else of the imported subclasses of `classes`."""
    module, _, name = path.rpartition(".")
    with suppress(ImportError, ValueError):
        public = getattr(import_module(module), "__all__", None) or dir(import_module(module))
        if close := nearest(name, list(public)):
            return f"{module}.{close}"
    known: dict[str, type] = {}
    waiting = list(classes)
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        known.setdefault(kind.__name__, kind)
    if (close := nearest(name, list(known))) is None:
        return None
    parts = known[close].__module__.split(".")
    shortest = (".".join(parts[:n]) for n in range(2, len(parts) + 1))
    return next((f"{m}.{close}" for m in shortest if hasattr(sys.modules.get(m), close)), None)


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that is most like `name`: by its last part, as a whole, or as one that holds it."""
    words = {word.replace("-", "_").lower(): word for word in reversed(known)}
    branch, _, leaf = (name := name.replace("-", "_").lower()).rpartition(".")
    beside = {word.rpartition(".")[2]: word for word in words if word.rpartition(".")[0] == branch}
    anywhere = {word.rpartition(".")[2]: word for word in words}
    whole = {word: word for word in words}
    holding = {word: word for word in words if len(leaf) > 2 and leaf in word.rpartition(".")[2]}
    for table, key, cutoff in ((beside, leaf, 0.65), (anywhere, leaf, 0.8), (whole, name, 0.85), (holding, leaf, 0)):
        if close := get_close_matches(key, table, 1, cutoff):
            return words[table[close[0]]]
    return None


def likely(close: str | None) -> str:
    """The end of a sentence that names what was likely meant."""
    return f": the nearest is {close}" if close else ""


def relative(path: Path) -> Path:
    """The path as seen from the working directory, if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def shortened(message: str) -> str:
    """A message in one line."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else f"{line[:300]} ..."


def read_yaml(path: Path) -> None:
    """Raise InputError for a file that is no YAML mapping, and for a name that it gives twice."""
    try:
        root = yaml.compose(path.read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: byte {error.object[error.start]:#x} is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        tab = " (indentation takes spaces, not tabs)" if "'\\t'" in str(error.problem) else ""
        raise InputError(f"{path}, line {mark.line + 1 if mark else 1} is no YAML: {error.problem}{tab}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {shortened(str(error))}") from error
    if not isinstance(root, yaml.MappingNode):
        kind = "is empty" if root is None else "holds no names"
        raise InputError(f"{path} {kind}: a configuration has lines such as `seed_everything: 0`")
    waiting: list[yaml.Node] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for (key, _), name in zip(node.value, names, strict=False):
                if names.count(name) > 1 and name != "<<":
                    raise InputError(f"{path} gives {name} twice, first in line {key.start_mark.line + 1}: keep one")
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
