"""The options of all commands are those of options.txt: one is added, renamed or taken away on purpose."""

from __future__ import annotations

from pathlib import Path

from fastflower.arguments import Option, options_of
from fastflower.options import COMMANDS
from fastflower.values import is_switch
from tests.conftest import fastflower

FROZEN = Path(__file__).with_name("options.txt")
UPDATE = "python -m tests.test_options"


def options() -> list[str]:
    """COMMAND OPTION, and its other names, of all commands."""
    every = [(name, option) for name, kind in COMMANDS.items() for option in options_of(kind)]
    return sorted(f"fastflower {name} {', '.join(_names(option))}" for name, option in every)


def _names(option: Option) -> list[str]:
    others = ["--" + other.replace("_", "-") for other in option.others]
    return [option.flag, *others, *([option.opposite] if is_switch(option.annotation) else [])]


def test_options_are_those_that_are_written_down() -> None:
    now, frozen = options(), FROZEN.read_text().splitlines()
    new = [f"+ {line}" for line in now if line not in frozen]
    gone = [f"- {line}" for line in frozen if line not in now]
    assert now == frozen, "\n".join(
        [
            "The command line has changed:",
            *gone,
            *new,
            f"Is it on purpose? Scripts and documentation that use what is gone break. Then run `{UPDATE}`, and commit "
            "options.txt with the change and a line in CHANGELOG.md.",
        ]
    )


def test_every_command_is_among_them() -> None:
    """What they are found by sees all commands and their nested settings."""
    named = options()
    for command in ("train", "eval", "predict", "ensemble", "cv", "flops", "report", "doctor", "data check"):
        assert f"fastflower {command} --debug, --no-debug" in named
        assert fastflower(*command.split(), "--help").code == 0
    assert "fastflower train --train.batch-size" in named


if __name__ == "__main__":
    FROZEN.write_text("\n".join(options()) + "\n")
