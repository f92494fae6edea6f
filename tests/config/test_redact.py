"""No error repeats a secret that stands in an override or a URL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from r3rag_jax.config import ConfigError, load_config, parse_args
from r3rag_jax.config.cli import FlagParser
from r3rag_jax.config.redact import redact_override, redact_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://me:hidden@host/v1", "http://…@host/v1"),
        ("http://me:hid@den@host", "http://…@host"),
        ("http://host/v1?api_key=hid@den", "http://host/v1…"),
        ("http://me:hidden@host/v1?api_key=hidden#hidden", "http://…@host/v1…"),
        ("http://host#hidden", "http://host…"),
        ("me:hidden@host:80", "…@host:80"),
        ("host:80", "host:80"),
        ("", ""),
    ],
)
def test_user_query_and_fragment_of_a_url_are_hidden(url: str, shown: str) -> None:
    assert redact_url(url) == shown == redact_url(shown)


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("rl.lr=1e-4", "rl.lr=1e-4"),
        ("retrieval.encoder.query_prefix=what?", "retrieval.encoder.query_prefix=what?"),
        ("judge.max_tokens=many", "judge.max_tokens=many"),
        ("judge.endpoint.url=http://me:hidden@h/v1", "judge.endpoint.url=http://…@h/v1"),
        ("judge.endpoint.url=me:hidden@h", "judge.endpoint.url=…@h"),
        ("judge.endpont.ulr=http://h?key=hidden", "judge.endpont.ulr=http://h…"),
        ("judge.endpoint.key_env=MY_KEY", "judge.endpoint.key_env=MY_KEY"),
        ("judge.endpoint.key_env=sk-hidden", "judge.endpoint.key_env=…"),
        ("judge.api_key=hidden", "judge.api_key=…"),
        ("HF_TOKEN=hidden", "HF_TOKEN=…"),
        ("http://me:hidden@h", "http://…@h"),
        ("rl.lr", "rl.lr"),
    ],
)
def test_an_override_is_repeated_without_its_secret(word: str, shown: str) -> None:
    assert redact_override(word) == shown


@pytest.mark.parametrize(
    "word",
    [
        "judge.endpoint.url=http://me:hidden@h/v1",
        "judge.endpoint.url=http://h/v1?api_key=hidden",
        "judge.endpoint.url='http://h?key=hidden",
        "judge.endpoint.key_env=sk-hidden",
        "judge.endpoint.key=hidden",
        "judge.url=http://me:hidden@h",
        "rollout.server=http://me:hidden@h",
        "rollout.server.api_token=hidden",
        "http://me:hidden@h/v1",
    ],
)
def test_no_error_of_an_override_shows_it(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [word])
    assert "hidden" not in str(caught.value) and "override" in str(caught.value)


def test_no_error_of_a_file_shows_it(write: Callable[[str], Path]) -> None:
    for line in ("judge.endpoint.url: http://me:hidden@h", "judge.endpoint: {url: 'h?k=hidden', key_env: sk-hidden}"):
        with pytest.raises(ConfigError, match=r"x\.yaml:1") as caught:
            load_config(write(f"{line}\n"))
        assert "hidden" not in str(caught.value)


def test_no_error_of_the_command_line_shows_it(
    write: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write("seed: 0\n")
    for word in ("--judge.endpoint.url=http://me:hidden@h", "--api-key=hidden"):
        with pytest.raises(SystemExit):
            parse_args(["--config", "x.yaml", word], prog="train", description="Trains.")
        with pytest.raises(SystemExit):
            FlagParser(prog="ask").parse_args([word])
        assert "hidden" not in capsys.readouterr().err
