"""`python -m aiohypertunity`, as far as it needs no cluster."""

from __future__ import annotations

import pytest

import aiohypertunity
from aiohypertunity.__main__ import main


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """It says what there is, and that this was none of it."""
    assert main([]) == 2
    assert "doctor" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--host", "x"], ["--host=x"], ["--option", "a=1", "doctor"]])
def test_an_option_without_its_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An option of `doctor` before it, or alone, gets the right command line."""
    with pytest.raises(SystemExit) as exited:
        main(argv)
    assert exited.value.code == 2
    wanted = " ".join(word for word in argv if word != "doctor")
    said = capsys.readouterr().err
    assert said.endswith(f"did you mean: python -m aiohypertunity doctor {wanted}\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """That of the package."""
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out.strip() == aiohypertunity.__version__
