"""The journal: what is in it stays in it, whatever kills the process that writes it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from parts import DARWIN, PASSAGES

from r3rag_jax.coldstart.journal import Attempt, Journal, Reply, open_journal
from r3rag_jax.errors import UserError
from r3rag_jax.types import Status, Step, Trajectory

REPLIES = {"k1": Reply("Step 1:\n…", True, 12, 3), "k2": Reply("half", False), "k3": Reply("lone \ud83d", True, 1, 1)}
ATTEMPT = Attempt(
    Trajectory(
        DARWIN,
        (Step("look up", query="Who?", passages=(PASSAGES[0],)), Step("known", answer="Shrewsbury")),
        Status.ANSWERED,
        sample_index=2,
    ),
    0.4,
)


def no_news(text: str) -> None:
    raise AssertionError(text)


def write(path: Path) -> None:
    with open_journal(path, no_news) as journal:
        journal.add_facts({"teacher": "m", "temperatures": (0.1, 0.2)})
        for key, reply in REPLIES.items():
            journal.add_reply(key, reply)
        journal.add_attempt(ATTEMPT)
        journal.add_failure("k4", "503")
        check(journal)


def check(journal: Journal) -> None:
    assert {key: journal.reply(key) for key in REPLIES} == REPLIES
    assert journal.reply("k4") is None
    assert [*journal.attempts()] == [ATTEMPT]
    assert (journal.input_tokens, journal.output_tokens) == (13, 4)
    assert (journal.num_replies, journal.num_uncounted) == (3, 1)


def test_a_journal_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    write(path)
    before = path.read_bytes()
    with open_journal(path, no_news) as journal:
        check(journal)
        journal.add_facts({"teacher": "m", "temperatures": (0.1, 0.2)})
    assert path.read_bytes() == before
    assert [json.loads(line)["kind"] for line in before.splitlines()] == [
        "journal", "reply", "reply", "reply", "attempt", "failure",
    ]  # fmt: skip


@pytest.mark.parametrize("kept", [1, 20, -2])
def test_half_a_last_line_is_left_out_and_said(tmp_path: Path, kept: int) -> None:
    path, said = tmp_path / "journal.jsonl", list[str]()
    write(path)
    whole = path.read_bytes()
    torn = b'{"kind": "reply", "key": "k9", "text": "never finished"}\n'[:kept]
    path.write_bytes(whole + torn)
    with open_journal(path, said.append) as journal:
        check(journal)
        assert path.read_bytes() == whole
        journal.add_reply("k9", Reply("finished"))
    assert said == [f"{path}:7: left out, half a line of a process that was killed"]
    with open_journal(path, no_news) as journal:
        check_all = {**REPLIES, "k9": Reply("finished")}
        assert {key: journal.reply(key) for key in check_all} == check_all


def test_a_last_line_that_lacks_its_end_alone_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path)
    path.write_bytes(path.read_bytes() + b'{"kind": "reply", "key": "k9", "text": "x", "is_whole": true}')
    with open_journal(path, no_news) as journal:
        journal.add_reply("k10", Reply("y"))
        assert journal.reply("k9") == Reply("x")
    assert len(path.read_bytes().splitlines()) == 8


@pytest.mark.parametrize(
    ("line", "text", "words"),
    [
        (3, b"{broken", ":3: expected a further row of a journal; got b'{broken"),
        (3, b"[1]", ":3: expected a further row"),
        (1, b'{"id": "q"}', ":1: expected the first row of a journal"),
        (2, b'{"kind": "journal"}', ":2: expected a further row"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: int, text: bytes, words: str) -> None:
    path = tmp_path / "journal.jsonl"
    write(path)
    lines = path.read_bytes().splitlines()
    lines[line - 1] = text
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError) as caught, open_journal(path, no_news):
        pass
    assert f"{path}{words}" in str(caught.value)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path)
    with open_journal(path, no_news) as journal, pytest.raises(UserError) as caught:
        journal.add_facts({"teacher": "other", "temperatures": (0.1, 0.2)})
    assert str(caught.value) == (
        f'{path} was begun with other settings (teacher was "m", now "other"): restore them, or choose another '
        "coldstart.dir=…"
    )


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with open_journal(path, no_news):
        with pytest.raises(UserError, match="in use by process"), open_journal(path, no_news):
            pass


def test_a_row_is_on_the_disk_before_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "journal.jsonl", list[bytes]()
    with open_journal(path, no_news) as journal:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_bytes()))
        journal.add_reply("k1", REPLIES["k1"])
        assert synced == [path.read_bytes()] != [b""]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    write(path)
    whole = path.read_bytes()
    with open_journal(path, no_news) as journal:

        def fail(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="No space left") as caught:
                journal.add_reply("k9", Reply("lost"))
        assert caught.value.filename == str(path)
        assert path.read_bytes() == whole and journal.reply("k9") is None
        journal.add_reply("k9", Reply("kept"))
        assert journal.reply("k9") == Reply("kept")
        check_rest = [*journal.attempts()]
    assert check_rest == [ATTEMPT]
