import json
import warnings

import pytest

from autoprune.errors import ConfigError
from autoprune.reporting.session import INTERRUPTED, session, write


def test_an_error_is_one_message_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "/a/rather/long/path" * 6
    with pytest.raises(SystemExit) as ended, session(verbose=False):
        raise ConfigError(f"no [such] space {long}")
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert err == f"error: no [such] space {long}\n"
    assert out == ""


def test_verbose_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), session(verbose=True):
        raise ConfigError("no such space")
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, session(verbose=False):
        raise KeyboardInterrupt
    assert ended.value.code == INTERRUPTED == 130
    assert "what was done is kept" in capsys.readouterr().err


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), session(verbose=False):
        1 / 0  # noqa: B018 - it is the exception that counts


def test_other_libraries_are_silent_unless_verbose() -> None:
    with session(verbose=False):
        warnings.warn("nobody asked", stacklevel=1)
    with pytest.raises(UserWarning, match="asked"), session(verbose=True):
        warnings.warn("asked", stacklevel=1)


def test_json_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    write({"kl": 0.5}, "a line", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"kl": 0.5}


def test_people_get_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    write({"kl": 0.5}, "a [line] " + "x" * 100, as_json=False)
    assert capsys.readouterr().out == "a [line] " + "x" * 100 + "\n"
