"""The splits of a run: which questions are the same, and what is said of those that come twice."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from r3rag_jax.config import ColdStartConfig, Config, DataConfig, SFTConfig
from r3rag_jax.config.data import split_source
from r3rag_jax.data.balance import balanced
from r3rag_jax.data.dataset import Dataset
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import identity
from r3rag_jax.data.records import OnError
from r3rag_jax.errors import UserError
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.types import Question

STEPS = [{"analysis": "Known.", "answer": "x"}]


def rows(*texts: str, prefix: str = "train_") -> list[dict[str, Any]]:
    return [{"id": f"{prefix}{i}", "question": text, "golden_answers": ["x"]} for i, text in enumerate(texts)]


def dataset(tmp_path: Path, *, cold_start: SFTConfig | None = None, **given: Any) -> tuple[Dataset, list[str]]:
    """A data set of files, given as lists of rows, with other keys of `data`; and what it says."""
    files = {name: value for name, value in given.items() if isinstance(value, list)}
    for name, content in files.items():
        write_jsonl(tmp_path / f"{name}.jsonl", content)
    keys = given | {name: f"{name}.jsonl" for name in files}
    data = DataConfig(source="files", dir=str(tmp_path), corpus="corpus.jsonl", **keys)
    said: list[str] = []
    config = Config(data=data, sft=cold_start or SFTConfig(), phases=("index",))
    return Dataset(config, RunDirectory(tmp_path), dict, OnError(say=said.append)), said


def test_an_order_whose_every_beginning_is_balanced() -> None:
    assert balanced(list(zip("aababaca", strict=True))) == [0, 2, 6, 1, 4, 3, 5, 7]  # one c, two b, the rest are a
    assert balanced([("a", "1"), ("a", "1"), ("a", "2")]) == [0, 2, 1]
    assert balanced([()] * 3) == [0, 1, 2]


def test_a_balanced_cold_start(tmp_path: Path) -> None:
    kinds = [("bridge", 2)] * 4 + [("bridge", 3)] * 2 + [("comparison", 2)] * 3
    taught = [
        row | {"steps": STEPS, "metadata": {"type": type, "hops": hops}}
        for row, (type, hops) in zip(rows(*(f"Who is {i}?" for i in range(9))), kinds, strict=True)
    ]
    found, _ = dataset(tmp_path, sft=taught, num_sft=6, cold_start=SFTConfig(balance=("type", "hops")))
    drawn = Counter((t.question.metadata["type"], t.question.metadata["hops"]) for t in found.trajectories())
    assert drawn == {("bridge", 2): 2, ("bridge", 3): 2, ("comparison", 2): 2}
    missing, _ = dataset(tmp_path, sft=taught, num_sft=4, cold_start=SFTConfig(balance=("hops", "depth")))
    with pytest.raises(UserError, match=r"sft\.balance must be fields .*, which are type, hops in .*:\d+; got depth"):
        missing.trajectories()


def test_files_that_a_phase_reads_are_there(tmp_path: Path) -> None:
    found, _ = dataset(tmp_path, sft=[], rl=[], test=[])
    found.check_files(["index", "sft", "rl", "eval"])  # `dev` is not given
    (tmp_path / "test.jsonl").unlink()
    found.check_files(["index", "sft", "rl"])
    with pytest.raises(UserError, match=r"data\.test must name a file that is there; got .*test\.jsonl$"):
        found.check_files(["sft", "eval"])


def test_a_file_that_a_phase_can_do_without(tmp_path: Path) -> None:
    missing = {"sft": "sft.jsonl", "rl": "rl.jsonl"}
    (tmp_path / "rl.jsonl").touch()
    apart, _ = dataset(tmp_path, disjoint=False, **missing)
    apart.check_files(["rl"])
    with pytest.raises(UserError, match=r"data\.sft must name"):
        apart.check_files(["sft", "rl"])
    with pytest.raises(UserError, match=r"data\.sft must name"):
        dataset(tmp_path, **missing)[0].check_files(["rl"])
    RunDirectory(tmp_path).data_dir.mkdir()
    RunDirectory(tmp_path).data("sft").touch()
    dataset(tmp_path, refresh_retrieved=True, **missing)[0].check_files(["sft", "rl"])


@pytest.mark.parametrize(
    ("directory", "sft"),
    [
        ("", "runs/mine-coldstart/trajectories.jsonl"),
        ("", str(Path.cwd() / "runs/mine-coldstart/trajectories.jsonl")),
        ("gold", "gold/trajectories.jsonl"),
    ],
)
def test_trajectories_that_are_not_built_yet(tmp_path: Path, directory: str, sft: str) -> None:
    data = DataConfig(source="files", corpus="c.jsonl", sft=sft)
    config = Config(name="mine", data=data, coldstart=ColdStartConfig(dir=directory), phases=("index",))
    with pytest.raises(UserError, match=r"python -m r3rag_jax\.coldstart with the same configuration writes it"):
        Dataset(config, RunDirectory(tmp_path), dict).check_files(["sft"])


def test_other_trajectories_are_not_the_builders(tmp_path: Path) -> None:
    data = DataConfig(source="files", corpus="c.jsonl", sft="trajectories.jsonl")
    with pytest.raises(UserError, match=r"got trajectories\.jsonl$"):
        Dataset(Config(data=data, phases=("index",)), RunDirectory(tmp_path), dict).check_files(["sft"])


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("Who wrote Emma?", "who  wrote\tEMMA", True),
        ("Who wrote Emma?", "Who wrote Emma ?!", True),
        ("Cafe\u0301 Central?", "Café Central\uff1f", True),  # two Unicode forms, and a wide question mark
        ("Wo ist die Straße?", "WO IST DIE STRASSE?", True),
        ("What is C?", "What is C#?", False),
        ("Who wrote Emma?", "Who wrote Emma, and when?", False),
        ("?", "!", False),
    ],
)
def test_questions_are_the_same_by_their_text(one: str, other: str, are_same: bool) -> None:
    found = [identity(Question("q", text, ("x",))) for text in (one, other)]
    assert (found[0] == found[1]) is are_same


def test_rl_leaves_out_the_cold_starts_questions_by_text_and_says_how_many(tmp_path: Path) -> None:
    taught = [row | {"steps": STEPS} for row in rows("Who is A?", "Who is B?", "Who is C?")]
    asked = rows("Who is D?", "who is b", "Who is E?", "WHO IS C?", prefix="train_")  # the same ids, other questions
    data, said = dataset(tmp_path, sft=taught, rl=asked, dev=asked)
    found = data.questions("rl")
    assert [(question.id, question.question) for question in found] == [
        ("train_0", "Who is D?"),
        ("train_2", "Who is E?"),
    ]
    assert found.lines == [1, 3]
    assert said == ["left out 2 of 4 RL questions: also in the cold start (data.disjoint)"]
    assert data.questions("rl") == found and len(data.questions("dev")) == 4 and len(said) == 1


def test_other_questions_under_the_ids_of_the_cold_start_stay(tmp_path: Path) -> None:
    data, said = dataset(tmp_path, sft=[row | {"steps": STEPS} for row in rows("Who is A?")], rl=rows("Who is B?"))
    assert len(data.questions("rl")) == 1 and said == []


def test_rl_questions_that_are_all_in_the_cold_start_are_refused(tmp_path: Path) -> None:
    data, _ = dataset(tmp_path, sft=[row | {"steps": STEPS} for row in rows("Who is A?")], rl=rows("Who is a?"))
    with pytest.raises(UserError, match=r"data\.disjoint leaves no question for RL: all of .*rl\.jsonl are in"):
        data.questions("rl")


def composed(row: dict[str, Any], composition: str) -> dict[str, Any]:
    return row | {"metadata": {"composition": composition}}


def test_neither_phase_sees_a_held_out_composition(tmp_path: Path) -> None:
    kinds = {"Who is A?": "who", "When is B?": "when", "Where is C?": "where", "Who is D?": "who", "When is E?": "when"}
    asked = [composed(row, kinds[row["question"]]) for row in rows(*kinds)]
    taught = [row | {"steps": STEPS} for row in rows("when is b", "Where is C?", "Who is D?")]  # without metadata
    data, said = dataset(tmp_path, hold_out=("when",), sft=taught, rl=asked, dev=asked[:2], test=asked[:3])
    assert [trajectory.question.question for trajectory in data.trajectories()] == ["Where is C?", "Who is D?"]
    assert [question.question for question in data.questions("rl")] == ["Who is A?"]
    assert [question.metadata["unseen"] for question in data.questions("test")] == [False, True, False]
    assert [question.metadata["unseen"] for question in data.questions("dev")] == [False, True]
    assert said == ["left out 2 of 3 RL questions: also in the cold start (data.disjoint)"]
    assert data.told_apart(data.questions("rl"))[0].metadata == {"composition": "who", "unseen": False}


def test_without_held_out_compositions_questions_stay_as_they_are(tmp_path: Path) -> None:
    data, _ = dataset(tmp_path, rl=rows("Who is A?"), test=[composed(row, "who") for row in rows("Who is B?")])
    assert data.questions("test")[0].metadata == {"composition": "who"} and data.questions("rl")[0].metadata == {}


def test_a_composition_of_no_question_is_refused_and_none_of_any_is_said(tmp_path: Path) -> None:
    data, _ = dataset(
        tmp_path, hold_out=("who", "wen"), rl=[composed(row, "who") for row in rows("Who is A?", "Who is B?")]
    )
    with pytest.raises(UserError, match=r"values of metadata.composition in .*rl.jsonl \(who\); got wen$"):
        data.questions("rl")
    mine, said = dataset(tmp_path, hold_out=("when", "where"), rl=[composed(row, "who") for row in rows("Who is A?")])
    assert len(mine.questions("rl")) == 1
    assert said == [f"data.hold_out holds nothing out: {tmp_path}/rl.jsonl has no question of when, …"]
    with pytest.raises(UserError, match=r"data.hold_out must be empty without data.rl, .*; got who$"):
        DataConfig(source="files", corpus="corpus.jsonl", hold_out=("who",))


def test_a_text_under_two_ids_is_counted(tmp_path: Path) -> None:
    data, said = dataset(tmp_path, test=rows("Who is A?", "Who is B?", "Who is a", "Who is A?"))
    assert len(data.questions("test")) == 4
    assert said == [
        f"{tmp_path}/test.jsonl: 2 of 4 questions are there twice under other ids: "
        "line 3 is that of line 1, line 4 is that of line 1"
    ]


def test_a_split_may_name_its_data_set(tmp_path: Path) -> None:
    questions = [{"question": "who is a", "answer": ["x"]}, {"question": "who is b", "answer": ["y"]}]
    write_jsonl(tmp_path / "NQ-open.dev.jsonl", questions)
    data = DataConfig(source="files", dir=str(tmp_path), corpus="corpus.jsonl", test="nq:NQ-open.dev.jsonl")
    found = Dataset(Config(data=data, phases=("index",)), RunDirectory(tmp_path), dict).questions("test")
    assert [question.id for question in found] == ["nq_1", "nq_2"]
    assert found.place(1) == f"{tmp_path}/NQ-open.dev.jsonl:2" and data.path("test") == tmp_path / "NQ-open.dev.jsonl"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "hotpot:dev.json",
            "data.rl: NAME of a source NAME:FILE must be one of flashrag, .*; got 'hotpot'; did you mean",
        ),
        ("my:dev.json", "got 'my'; a file of this name is ./my:dev.json"),
        ("nq:gs://bucket/dev.json", "data.rl must be a path on a disk of this machine; got nq:gs://bucket/dev.json"),
    ],
)
def test_names_of_no_data_set_are_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(rl=source)


def test_a_file_may_have_a_colon() -> None:
    assert split_source("./my:dev.json") == ("", "./my:dev.json")
    assert split_source("a/b:c") == ("", "a/b:c") and split_source(Path("nq:a/b.json")) == ("nq", "a/b.json")
