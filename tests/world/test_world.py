"""The embedded world: the same every time, answerable from its passages, and fair to its test split."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable

import pytest

from r3rag_jax.config import Config, WorldConfig
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.types import Question, Step
from r3rag_jax.world.dataset import write_teacher
from r3rag_jax.world.encyclopedia import PASSAGES, RELATIONS, RL_ONLY, SHARES, UNSEEN, World, realm_of
from r3rag_jax.world.teacher import teacher_steps

SEEDS = (0, 1, 7)
COUNTS = {"sft": 60, "rl": 100, "dev": 15, "test": 80}


@pytest.fixture(scope="module", params=SEEDS)
def world(request: pytest.FixtureRequest) -> World:
    return World.generate(request.param, num_people=120)


@pytest.fixture(scope="module")
def questions(world: World) -> dict[str, list[Question]]:
    """Questions by split; `teacher` are those of the cold start."""
    by_split = {split: world.questions(split, count) for split, count in COUNTS.items()}
    return by_split | {"teacher": world.questions("sft", COUNTS["sft"], with_trajectories=True)}


def names_of(world: World, splits: Iterable[str]) -> set[str]:
    return {name for split in splits for names in world.regions[split].entities.values() for name in names}


def mentions(names: set[str], text: str) -> set[str]:
    """Which of the names a text holds; where they overlap, the longest counts ("Balbury House" is not Balbury)."""
    words, found, at = re.findall(r"\w+", text), set[str](), 0
    while at < len(words):
        here = (" ".join(words[at : at + size]) for size in (3, 2, 1))  # no name has four words
        name = next((candidate for candidate in here if candidate in names), None)
        found |= {name} if name else set()
        at += len(name.split()) if name else 1
    return found


def hops_of(question: Question) -> list[dict[str, str]]:
    return question.metadata["decomposition"]


def holds(question: Question, compositions: Iterable[tuple[str, str]]) -> bool:
    """Whether a question composes one of these pairs of relations, read off its hops."""
    hops = hops_of(question)
    if question.metadata["type"].endswith("comparison"):
        kind = question.metadata["type"]
        pairs = {(kind, "creator" if hop["relation"] in ("author", "director", "composer") else hop["relation"])
                 for hop in hops}  # fmt: skip
    else:
        pairs = set(itertools.pairwise(hop["relation"] for hop in hops))
    return bool(pairs & set(compositions))


# ------------------------------------------------------------------------------------ determinism


def digest(seed: int) -> str:
    world = World.generate(seed, num_people=40)
    parts = [(p.id, p.contents) for p in world.passages]
    asked = [
        (q, teacher_steps(q, random.Random(1), needless_retrievals=0.5))
        for q in world.questions("sft", 10, with_trajectories=True)
    ]
    return hashlib.sha256(repr((parts, asked)).encode()).hexdigest()


def test_a_seed_is_a_world_in_every_process() -> None:
    code = "import test_world; print(test_world.digest(3))"
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == digest(3), done.stderr
    assert digest(3) != digest(4)


def test_settings_that_no_world_can_meet_are_the_users_to_fix() -> None:
    with pytest.raises(UserError, match=r"world\.num_people must leave every entity a name"):
        World.generate(0, num_people=20_000)
    with pytest.raises(UserError, match=r"world\.num_dev must be at most .* got 5000, .* raise world\.num_people"):
        World.generate(0, num_people=40).questions("dev", 5000)


# ------------------------------------------------------------------------- questions and passages


def test_counts_ids_and_texts_are_unique(questions: dict[str, list[Question]]) -> None:
    for split, count in COUNTS.items():
        assert len(questions[split]) == count
        assert len({q.id for q in questions[split]}) == len({q.question for q in questions[split]}) == count


def test_every_hop_is_told_by_its_passage(world: World, questions: dict[str, list[Question]]) -> None:
    for question in itertools.chain(*questions.values()):
        assert list(question.supporting_ids) == [hop["passage_id"] for hop in hops_of(question)]
        for hop in hops_of(question):
            passage = world.passages[int(hop["passage_id"])]
            assert passage.id == hop["passage_id"]
            assert passage.title == hop["entity"]
            assert re.search(rf"\b{re.escape(hop['answer'])}\b", passage.text)


def test_answers_follow_from_the_hops(questions: dict[str, list[Question]]) -> None:
    for question in itertools.chain(*questions.values()):
        hops, [answer] = hops_of(question), question.golden_answers
        if question.metadata["type"].endswith("comparison"):
            years = {hop["entity"]: int(hop["answer"]) for hop in hops[-2:]}
            best = min if " earlier," in question.question else max
            assert answer == best(years, key=years.__getitem__)
            assert len(set(years.values())) == 2
        else:
            assert answer == hops[-1]["answer"]
            assert all(a["answer"] == b["entity"] for a, b in itertools.pairwise(hops))
        if question.metadata["type"] != "comparison":  # which names both and asks for one of them
            assert answer not in question.question


def test_a_multi_hop_question_hides_its_bridges(questions: dict[str, list[Question]]) -> None:
    for question in itertools.chain(*questions.values()):
        if question.metadata["type"] in ("bridge", "bridge_comparison"):
            bridges = {hop["entity"] for hop in hops_of(question)} - {hops_of(question)[0]["entity"]}
            if question.metadata["type"] == "bridge_comparison":
                bridges = {hop["entity"] for hop in hops_of(question)[2:]}
            assert bridges
            assert not any(re.search(rf"\b{re.escape(name)}\b", question.question) for name in bridges)


# ----------------------------------------------------------------------------------------- splits


def test_splits_share_no_entity(world: World) -> None:
    for one, other in itertools.combinations(SHARES, 2):
        assert not names_of(world, [one]) & names_of(world, [other])


def test_nothing_of_a_test_question_is_in_a_training_question(
    world: World, questions: dict[str, list[Question]]
) -> None:
    everyone = names_of(world, SHARES)

    def told(splits: Iterable[str]) -> set[str]:
        asked = itertools.chain(*(questions[split] for split in splits))
        texts = [[q.question, *(text for hop in hops_of(q) for text in (hop["entity"], hop["answer"]))] for q in asked]
        return set().union(*(mentions(everyone, text) for text in itertools.chain(*texts)))

    trained, tested = told(["sft", "teacher", "rl"]), told(["test", "dev"])
    assert len(trained) > 50 and len(tested) > 50
    assert not trained & tested
    assert tested <= names_of(world, ["test", "dev"])
    assert trained <= names_of(world, ["sft", "rl"])
    texts = {question.question for split in ("sft", "teacher", "rl") for question in questions[split]}
    assert not texts & {question.question for question in questions["test"]}


def test_passages_speak_of_their_own_split_alone(world: World) -> None:
    everyone, own = names_of(world, SHARES), {split: names_of(world, [split]) for split in SHARES}
    for passage in world.passages:
        named = mentions(everyone, passage.contents)
        assert passage.title in named
        assert named <= own[world.split_of[passage.id]]


class ShuffledRetriever:
    """A retriever at its worst: passages of all splits in random order."""

    def __init__(self, world: World):
        self.passages, self._rng = list(world.passages), random.Random(5)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        return [[Hit(passage, 0.0) for passage in self._rng.sample(self.passages, k)] for _ in queries]


def test_trajectories_show_nothing_of_the_test_split(world: World, tmp_path) -> None:
    config = Config().replace(world=WorldConfig(num_sft=COUNTS["sft"]))
    run = RunDirectory(tmp_path)
    write_teacher(world, config, ShuffledRetriever(world), run)
    corpus = {passage.id: passage for passage in world.passages}
    trajectories = read_trajectories(run.data("sft"), corpus, 2)
    assert len(trajectories) == COUNTS["sft"]
    everyone, names = names_of(world, SHARES), set[str]()
    for trajectory in trajectories:
        told = [trajectory.question.question]
        for step in trajectory.steps:
            told += [step.analysis, step.query or "", step.answer or "", *(p.contents for p in step.passages)]
        names |= set().union(*(mentions(everyone, text) for text in told))
    assert len(names & names_of(world, ["rl"])) > 10  # the index did bring passages of other splits
    assert not names & names_of(world, ["test", "dev"])


def test_unseen_compositions_are_in_test_questions_alone(questions: dict[str, list[Question]]) -> None:
    for split, asked in questions.items():
        found = [holds(question, UNSEEN) for question in asked]
        assert found == [question.metadata["unseen"] for question in asked]
        assert any(found) is (split == "test")


def test_rl_asks_compositions_that_have_no_trajectory(questions: dict[str, list[Question]]) -> None:
    assert not any(holds(question, RL_ONLY) for question in questions["teacher"])
    assert any(holds(question, RL_ONLY) for question in questions["rl"])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_base_model_never_read_a_name_of_a_users_world(seed: int) -> None:
    base = names_of(World.generate(seed + 100, num_people=120, realm="base"), SHARES)
    user = names_of(World.generate(seed, num_people=120), SHARES)
    assert {realm_of(name) for name in base} == {"base"}
    assert {realm_of(name) for name in user} == {"user"}
    assert not base & user


# ---------------------------------------------------------------------------------------- teacher


@pytest.mark.parametrize("waste", [0.0, 1.0])
def test_the_teacher_reaches_the_answer_in_time(
    world: World, questions: dict[str, list[Question]], waste: float
) -> None:
    rng, wasted = random.Random(0), 0
    for question in questions["teacher"]:
        steps = teacher_steps(question, rng, needless_retrievals=waste)
        parsed = [Step(s["analysis"], query=s.get("query"), answer=s.get("answer")) for s in steps]
        assert len(parsed) <= 5
        assert [step.answer for step in parsed] == [None] * (len(parsed) - 1) + [question.golden_answers[0]]
        useful = [step for step in steps[:-1] if step["passage_ids"]]
        assert [step["passage_ids"][0] for step in useful] == list(question.supporting_ids)
        for step, hop in zip(useful, hops_of(question), strict=True):
            assert hop["entity"] in step["query"]
        wasted += len(steps) - 1 - len(useful)
        if question.metadata["hops"] <= 3:
            assert len(steps) - 1 - len(useful) == waste
    assert bool(wasted) is bool(waste)


def test_a_hasty_teacher_guesses_comparisons_one_look_up_early(questions: dict[str, list[Question]]) -> None:
    for question in questions["teacher"]:
        full, hasty = (
            teacher_steps(question, random.Random(0), needless_retrievals=0.0, lucky_guesses=haste)
            for haste in (0.0, 1.0)
        )
        is_comparison = question.metadata["type"].endswith("comparison")
        assert len(full) - len(hasty) == is_comparison
        assert hasty[-1]["answer"] == question.golden_answers[0]
        if is_comparison:
            assert hasty[:-1] == full[:-2]
            assert hops_of(question)[-1]["answer"] not in hasty[-1]["analysis"]


def test_the_teacher_states_what_it_found(questions: dict[str, list[Question]]) -> None:
    for question in questions["teacher"]:
        steps = teacher_steps(question, random.Random(0), needless_retrievals=0.0)
        for step, hop in zip(steps[1:], hops_of(question), strict=True):
            assert hop["answer"] in step["analysis"]


def test_tables_are_closed() -> None:
    """Every relation a passage tells can be asked, and the other way round; wordings hold what they tell."""
    told = {relation for passages in PASSAGES.values() for relations, _ in passages for relation in relations}
    assert told == RELATIONS.keys()
    for passages in PASSAGES.values():
        for relations, wordings in passages:
            for wording in wordings:
                assert set(re.findall(r"{(\w+)}", wording)) == {"x", *relations}
    for relation in RELATIONS.values():
        assert all("{x}" in text for text in (*relation.phrases, *relation.questions))
