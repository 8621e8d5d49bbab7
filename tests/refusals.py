"""What is refused is one sentence, of a command or of a call."""

import pytest

from cdm_lightning.__main__ import main
from cdm_lightning.foundation.errors import InputError


def sentence_of_refusal(capsys, arguments) -> str:
    """Run a command, and give the one sentence that it printed; nothing else may be."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2
    lines = [line for line in said.err.splitlines() if line.startswith("cdm: error: ")]
    assert len(lines) == 1 and "Traceback" not in said.err + said.out
    return lines[0].removeprefix("cdm: error: ")


def sentence_of_error(call, *parts) -> str:
    """The one line that `call` raises as InputError, after a look for `parts` in it."""
    with pytest.raises(InputError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400
    for part in parts:
        assert part in sentence
    return sentence
