"""The command line: one line and exit status 2 for wrong words."""

from collections.abc import Callable
from pathlib import Path

import pytest

from r3rag_jax.config import Config, parse_args
from r3rag_jax.config.schema import help_text

Write = Callable[[str], Path]


def call(argv: list[str]) -> Config:
    return parse_args(argv, prog="python -m r3rag_jax.train", description="Trains.")[0]


def test_parse_args_reads_the_file_and_overrides_around_flags(write: Write) -> None:
    path = write("seed: 1\n")
    config, options = parse_args(
        ["rl.lr=1e-4", "--port", "80", "--config", str(path), "mesh.data=-1", "rl.kl.coef=0"],
        prog="serve",
        description="Serves.",
        extra=lambda parser: parser.add_argument("--port", type=int),
    )
    assert (config.seed, config.rl.lr, config.rl.kl.coef) == (1, 1e-4, 0.0)
    assert (options.port, options.config) == (80, "x.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: the following arguments are required: --config"),
        (["--config"], "error: argument --config: expected one argument"),
        (["--config", "x.yaml", "--confg=a"], "error: unknown flag '--confg=a'"
         "; did you mean '--config'?"),
        (["--config", "x.yaml", "--rl.lr=3"], "error: unknown flag '--rl.lr=3'"
         "; did you mean 'rl.lr=…'?"),
        (["--config", "x.yaml", "-z"], "error: unknown flag '-z'; --help lists all flags and keys"),
        (["--config", "x.yaml", "rl.lr"], "error: override 'rl.lr': expected key=value"
         "; did you mean 'rl.lr=…'?"),
        (["--config", "y.yaml"], "error: y.yaml: no such file; did you mean x.yaml?"),
        (["--config", "x.yaml", "seed=a"], "error: override 'seed=a': seed must be an integer"
         "; got 'a'"),
    ],
)  # fmt: skip
def test_wrong_words_end_with_one_line_and_status_2(
    write: Write, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    write("seed: 0\n")
    with pytest.raises(SystemExit) as caught:
        call(argv)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", message + "\n")


def test_help_prints_usage_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert out.startswith("usage: python -m r3rag_jax.train --config FILE [flags] [key=value ...]")
    assert out.endswith(help_text())
    assert "cosine to 10 %" in out  # a % stands as it is
