"""Files as strangers may send them: mutated by chance, or made to act when they are unpickled."""

import json
import pickle
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdm_lightning.foundation.errors import InputError


def examples(few, many):
    """So many inputs by default, always the same ones; so many, others each time, with the long tests."""
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=[pytest.mark.long, pytest.mark.timeout(0)])])


def tried(n, whole, strategy, use):
    """use(whole) succeeds; use(input) of n others may succeed or refuse in one line, and do nothing else."""
    use(whole)
    counts = {"used": 0, "refused": 0}

    @settings(max_examples=n, deadline=None, database=None, derandomize=n < 1000,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def run(given_input):
        try:
            use(given_input)
            counts["used"] += 1
        except InputError as error:
            assert "\n" not in str(error) and str(error)
            counts["refused"] += 1

    run()
    print(f"{n} inputs: {counts}")
    assert counts["refused"] > n // 20  # else nothing was tried
    return counts


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**12)
    | st.floats()
    | st.sampled_from(["", "x", "../x", "8", "\n", "ü"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "name"]), inner, max_size=2),
    max_leaves=4,
)


def paths_in(value, path=()):
    """Paths of everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from ([path] if path else [])
    for name, each in inside:
        yield from paths_in(each, (*path, name))


@st.composite
def mutated_json(draw, value):
    """The JSON value with one or two of its parts left out, changed a little, or replaced by anything."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(paths_in(value)) or [()]))
        holder = value
        for name in path[:-1]:
            holder = holder[name]
        if not path:
            continue
        old, kind = holder[path[-1]], draw(st.sampled_from(["any", "any", "like", "like", "out"]))
        if kind == "out":
            del holder[path[-1]]
        elif kind == "like" and type(old) is int:
            holder[path[-1]] = old + draw(st.integers(-3, 3))
        elif kind == "like" and isinstance(old, (list, str)) and old:
            holder[path[-1]] = draw(st.sampled_from([old[1:], old + old[:1], old * 2, old[::-1]]))
        else:
            holder[path[-1]] = draw(JSON)
    return value


@st.composite
def mutated_bytes(draw, data):
    """Bytes with some changed, cut off, doubled or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        last = max(0, len(data) - 1)
        place = draw(
            st.integers(0, last)
            | st.integers(0, min(600, last))
            | st.integers(0, last).map(lambda k, end=last: end - k)
        )
        kind = draw(st.sampled_from(["change", "change", "cut", "insert", "repeat", "zero"]))
        if kind == "change":
            data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 600))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "repeat":
            data[place:place] = data[place : place + 512]
        else:
            data[place : place + 512] = bytes(len(data[place : place + 512]))
    return bytes(data)


class FileMaker:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def write_acting_pickle(path, trace, kind):
    if kind == "torch":
        torch.save({"stage": "BaseStage", "state_dict": {}, "callbacks": FileMaker(trace)}, path)
    elif kind == "legacy":
        torch.save(FileMaker(trace), path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(FileMaker(trace)))


@contextmanager
def taking_less_than(size):
    """Within it, this process may not come to hold `size` bytes more, whatever it held before."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():  # not Linux: the most that it ever held, which an earlier test may have raised
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < size / 1024
        return
    reset.write_text("5")  # VmHWM starts anew
    before = held("VmRSS")
    yield
    assert held("VmHWM") - before < size


def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
