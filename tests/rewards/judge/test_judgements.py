"""The file of judgements: nothing is asked twice, and every way in which a file can be damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from judging import ask, asking, number_of, open_at, tenths
from openai_server import chat, serve

from r3rag_jax.errors import UserError
from r3rag_jax.rewards.judge.judgements import Judgements


def test_what_is_known_is_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "j.jsonl"
    ask(tenths, path, [1, 2])
    verdicts, endpoint = ask(tenths, path, [1, 2, 3])
    np.testing.assert_allclose(verdicts.values, [0.1, 0.2, 0.3])
    assert [number_of(body) for body in endpoint.bodies] == [3]
    assert (verdicts.num, verdicts.num_known) == (3, 2)
    assert verdicts.metrics == {"judge_failure_rate": 0.0, "judge_known_rate": 2 / 3}
    with serve(tenths) as away:
        pass  # nobody listens there
    judge = open_at(away.url, path, retries=0)
    np.testing.assert_allclose(judge.ask([asking(judge, n) for n in (3, 1)]).values, [0.3, 0.1])
    with serve(tenths) as endpoint:
        judge = open_at(endpoint.url, path)
        for known in (0, 1):  # a judge also remembers what it has just said
            assert judge.ask([asking(judge, 4)]).num_known == known
    assert len(endpoint.bodies) == 1
    verdicts, endpoint = ask(tenths, path, [1], model="another")
    assert len(endpoint.bodies) == 1  # another model says something else
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sorted(row) for row in rows] == [["key", "reply", "score"]] * 5


def test_a_file_of_judgements_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    ask(tenths, path, [1, 2])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-20])  # killed while it wrote
    left = set(Judgements(path)._scores.values())
    verdicts, endpoint = ask(tenths, path, [1, 2])
    np.testing.assert_allclose(verdicts.values, [0.1, 0.2])
    assert len(endpoint.bodies) == 1 and len(left) == 1
    verdicts, endpoint = ask(tenths, path, [1, 2])
    assert len(endpoint.bodies) == 0  # the new line stands behind the half one, not in it


def test_half_a_character_in_a_reply_is_no_reason_to_end_a_run(tmp_path: Path) -> None:
    for _ in range(2):
        verdicts, endpoint = ask(lambda _: (200, chat("\ud83d\nRelevance: 0.5")), tmp_path / "j", [1])
        assert verdicts.values == np.float32(0.5)
    assert len(endpoint.bodies) == 0


def test_a_wrong_score_in_the_file_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    ask(tenths, path, [1])
    row = json.loads(path.read_text())
    for score_ in (7, -0.1, "0.5", None, True):
        path.write_text(json.dumps(row | {"score": score_}) + "\n[]\n")
        verdicts, endpoint = ask(tenths, path, [1])
        assert len(endpoint.bodies) == 1 and verdicts.values == np.float32(0.1)


def test_a_folder_is_no_file_of_judgements(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.cache: .* cannot be read: Is a directory"):
        open_at("http://127.0.0.1:1", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"judge\.cache: .* cannot be written: Not a directory|File exists"):
        ask(tenths, tmp_path / "file" / "j.jsonl", [1])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    judgements = Judgements(path)
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, judgements.writing() as add:
        add("key", {"score": 0.5})
    assert caught.value.filename == str(path)
