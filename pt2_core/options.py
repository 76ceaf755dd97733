"""Options of a command, written once: as the fields of a dataclass, whose defaults they share.

@dataclass(frozen=True)
class Config:
    rounds: int = option(5, "how often each test is timed", flags="-r --rounds", parse=positive)

add_options(parser, Config, groups=("speed",))
config = Config(**option_values(args, Config))
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

_KEY = "option"


def option(
    default: Any,
    help: str,
    *,
    group: str,
    flags: str = "",
    parse: Callable[[str], Any] | None = None,
    **more: Any,
) -> Any:
    """A field of a dataclass that is an option of a command, too.

    Args:
        default: of the field and of the option. True and False make a switch, which is called
            ``--no-NAME`` where True is the default.
        help: what ``--help`` says; ``%(default)s`` in it is the default.
        group: title of the group in which ``--help`` shows it.
        flags: its names on the command line, blanks between (``--NAME`` of the field otherwise).
        parse: makes the field's value of a word.
        more: passed on to ``argparse`` (metavar, choices, ...).
    """
    kept = {"help": help, "group": group, "flags": flags, "parse": parse, "more": more}
    return dataclasses.field(default=default, metadata={_KEY: kept})


def add_options(
    parser: argparse.ArgumentParser, cls: type, groups: Sequence[str]
) -> dict[str, argparse._ArgumentGroup]:
    """Give a parser the options of a dataclass, in groups of this order.

    Returns:
        The groups by title, for options that are no fields.

    Raises:
        ValueError: an option's group is not among ``groups``.
    """
    made = {title: parser.add_argument_group(title) for title in groups}
    for field in dataclasses.fields(cls):
        if (kept := field.metadata.get(_KEY)) is None:
            continue
        if kept["group"] not in made:
            raise ValueError(f"{cls.__name__}.{field.name}: no group {kept['group']!r}")
        switch = isinstance(field.default, bool)
        name = field.name.replace("_", "-")
        flags = kept["flags"].split() or [f"--no-{name}" if field.default is True else f"--{name}"]
        how: dict[str, Any] = {"default": field.default, "dest": field.name, "help": kept["help"]}
        if switch:
            how["action"] = "store_false" if field.default else "store_true"
        elif kept["parse"] is not None:
            how["type"] = kept["parse"]
        made[kept["group"]].add_argument(*flags, **how, **kept["more"])
    return made


def option_values(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of the dataclass that are options, with what the command line gave them."""
    named = [f.name for f in dataclasses.fields(cls) if _KEY in f.metadata]
    return {name: getattr(args, name) for name in named}


def positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def natural(text: str) -> int:
    """A whole number of at least 0.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return value
