"""The command line of the entry points: `--config FILE [flags] [key=value …]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from r3rag_jax.config.experiment import Config
from r3rag_jax.config.loader import load_config
from r3rag_jax.config.redact import redact_override
from r3rag_jax.config.schema import did_you_mean, help_text, schema
from r3rag_jax.config.section import ConfigError
from r3rag_jax.config.values import clip
from r3rag_jax.errors import USER_ERROR_STATUS


class FlagParser(argparse.ArgumentParser):
    """argparse whose errors are one line: `error: …`, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """End with argparse's message, which repeats words of the command line."""
        self.fail(" ".join(map(redact_override, message.split())))

    def fail(self, message: str) -> NoReturn:
        """End with a message of our own."""
        self.exit(USER_ERROR_STATUS, f"error: {' '.join(message.split())}\n")

    def flags(self) -> list[str]:
        """Every spelling of every flag, e.g. `--config`."""
        return [flag for action in self._actions for flag in action.option_strings]


def parse_args(
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    extra: Callable[[argparse.ArgumentParser], object] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """The configuration of `--config FILE [key=value …]`, and the parsed flags.

    Args:
      argv: words after the program's name; None takes the process's own.
      prog: what the usage line calls the program.
      description: one sentence for `--help`, which also lists every key.
      extra: adds an entry point's own flags to the parser; read them from the second result.

    Exits with status 2 and one `error: …` line when the words or the configuration are wrong.
    """
    parser = FlagParser(
        prog=prog,
        description=description,
        usage="%(prog)s --config FILE [flags] [key=value ...]",
        epilog="Configuration keys, in the file or as key=value:\n\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="a YAML recipe")
    if extra is not None:
        extra(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a configuration key to change")
    options, unknown = parser.parse_known_intermixed_args(argv)
    for word in unknown:
        parser.fail(_unknown_flag(word, parser.flags()))
    try:
        return load_config(options.config, options.overrides), options
    except ConfigError as error:
        parser.fail(str(error))


def _unknown_flag(word: str, flags: list[str]) -> str:
    """The error for a flag that the program does not have."""
    name = word.lstrip("-").partition("=")[0]
    hint = f"; did you mean {name + '=…'!r}?" if name in schema() else ""
    hint = hint or did_you_mean(word.partition("=")[0], flags)
    return f"unknown flag {clip(redact_override(word))!r}{hint or '; --help lists all flags and keys'}"
