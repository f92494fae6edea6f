"""Evidence: questions without supporting passages, and supporting ids that the corpus does not hold."""

import pytest

from r3rag_jax.config import RewardConfig
from r3rag_jax.data import evidence
from r3rag_jax.data.evidence import Evidence
from r3rag_jax.data.records import Records
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Question

CORPUS = {id: Passage(id, "a") for id in ("1", "2", "3")}


def questions(*ids_of: list[str | int] | None) -> Records[Question]:
    rows = [
        (line, Question(f"q{line}", "Who?", ("x",), {} if ids is None else {"supporting_ids": ids}))
        for line, ids in enumerate(ids_of, 1)
    ]
    return Records("rl.jsonl", rows)


def said(evidence: Evidence, rewards: RewardConfig | None = None) -> list[str]:
    texts: list[str] = []
    evidence.report(texts.append)
    evidence.check(rewards or RewardConfig(), texts.append)
    return texts


def test_evidence_that_is_whole_is_not_spoken_of() -> None:
    assert said(Evidence.of(questions(["1", "2"], [3]), CORPUS)) == []


def test_ids_that_are_not_in_the_corpus_are_counted() -> None:
    found = Evidence.of(questions(["1", "9"], ["2"], ["9", "8", "9"]), CORPUS)
    assert (found.num_ids, found.num_without) == (5, 1)
    assert said(found) == [
        "rl.jsonl: 3 of 5 metadata.supporting_ids are no passages of the corpus: '9' (line 1), "
        "'9' (line 3), '8' (line 3)",
        "rl.jsonl: 1 of 3 questions have no metadata.supporting_ids of the corpus: with rewards.process=gold "
        "their searches earn nothing",
    ]


def test_passages_that_are_cut_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = {id: Passage(id, text) for id, text in (("1", "short"), ("2", "much longer"), ("3", "longer still"))}
    asked, texts = questions(["1", "2", "9"], ["2", "3"]), list[str]()

    def shown(passage: Passage) -> str:
        return passage.contents[:5]

    Evidence.of(asked, corpus).report_cut(shown, 5, texts.append)
    Evidence.of(asked, corpus).report_cut(lambda passage: passage.contents, 50, texts.append)
    Evidence.of(asked, None).report_cut(shown, 5, texts.append)  # a server's corpus
    monkeypatch.setattr(evidence, "MAX_READ", 2)
    Evidence.of(asked, corpus).report_cut(shown, 5, texts.append)
    assert texts == [
        f"rl.jsonl: retrieval.passage_tokens=5 cuts {some} supporting passages: the policy never reads what is behind "
        "the cut"
        for some in ("2 of 3", "1 of 2")
    ]


@pytest.mark.parametrize("ids", [None, [], ["9"]])
def test_gold_rewards_without_any_evidence_are_refused(ids: list[str | int] | None) -> None:
    found = Evidence.of(questions(ids, ids), CORPUS)
    with pytest.raises(UserError) as error:
        found.check(RewardConfig(), print)
    assert str(error.value) == (
        "rl.jsonl: rewards.process=gold needs metadata.supporting_ids of the corpus; none of 2 questions "
        "has any: take rewards.process=gain, embedding or judge, or rewards.use_process=false"
    )


@pytest.mark.parametrize(
    "rewards",
    [RewardConfig(process="embedding"), RewardConfig(use_process=False), RewardConfig(process_weight=0.0)],
)
def test_other_rewards_need_none(rewards: RewardConfig) -> None:
    assert said(Evidence.of(questions(None, None), CORPUS), rewards) == []


def test_every_id_counts_where_the_corpus_is_not_known() -> None:
    assert said(Evidence.of(questions(["of a server"]), None)) == []
    with pytest.raises(UserError, match="none of 1 questions has any"):
        Evidence.of(questions(None), None).check(RewardConfig(), print)
