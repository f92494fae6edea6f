"""Every layout that is read: a typed-out record as its data set releases it, and the question that it becomes."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from r3rag_jax.config.data import DATA_SETS
from r3rag_jax.data.decomposition import decomposition_of
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import question_to_dict, read_questions
from r3rag_jax.data.readers.layouts import LAYOUTS
from r3rag_jax.errors import UserError
from r3rag_jax.types import Question

HOTPOT = {
    "_id": "5a7a06935542990198eaf050",
    "answer": "Arthur's Magazine",
    "question": "Which magazine was started first Arthur's Magazine or First for Women?",
    "supporting_facts": [["Arthur's Magazine", 0], ["First for Women", 0], ["First for Women", 1]],
    "context": [
        ["Radio City", ["Radio City is India's first.", " It plays."]],
        ["Arthur's Magazine", ["It is (1844)."]],
    ],
    "type": "comparison",
    "level": "medium",
}
HOTPOT_EVIDENCE = {
    "type": "comparison",
    "level": "medium",
    "supporting_facts": [["Arthur's Magazine", 0], ["First for Women", 0], ["First for Women", 1]],
    "supporting_titles": ["Arthur's Magazine", "First for Women"],
    "hops": 2,
}
HOTPOT_HUB = {
    "id": HOTPOT["_id"],
    "question": HOTPOT["question"],
    "answer": HOTPOT["answer"],
    "type": "comparison",
    "level": "medium",
    "supporting_facts": {"title": ["Arthur's Magazine", "First for Women", "First for Women"], "sent_id": [0, 0, 1]},
    "context": {"title": ["Radio City"], "sentences": [["Radio City is India's first.", " It plays."]]},
}
HOTPOT_QUESTION = Question(HOTPOT["_id"], HOTPOT["question"], ("Arthur's Magazine",), HOTPOT_EVIDENCE)

WIKI2 = {
    "_id": "8813f87c0bdd11eba7f7acde48001122",
    "type": "compositional",
    "question": "Who is the mother of the director of film Polish-Russian War (Film)?",
    "context": [["Maheen Khan", ["She is a designer."]]],
    "entity_ids": "Q3569222_Q8040461",
    "supporting_facts": [["Polish-Russian War (film)", 1], ["Xawery Żuławski", 2]],
    "evidences": [
        ["Polish-Russian War", "director", "Xawery Żuławski"],
        ["Xawery Żuławski", "mother", "Małgorzata Braunek"],
    ],
    "answer": "Małgorzata Braunek",
    "evidences_id": [["Q3569222", "director", "Q8040461"]],
    "answer_id": "Q274277",
}
WIKI2_EVIDENCE = {
    "type": "compositional",
    "supporting_facts": [["Polish-Russian War (film)", 1], ["Xawery Żuławski", 2]],
    "supporting_titles": ["Polish-Russian War (film)", "Xawery Żuławski"],
    "evidences": WIKI2["evidences"],
    "decomposition": [
        {
            "sub_question": "Who directed Polish-Russian War?",
            "answer": "Xawery Żuławski",
            "title": "Polish-Russian War (film)",
        },
        {
            "sub_question": "Who was the mother of Xawery Żuławski?",
            "answer": "Małgorzata Braunek",
            "title": "Xawery Żuławski",
        },
    ],
    "hops": 2,
}
WIKI2_QUESTION = Question(WIKI2["_id"], WIKI2["question"], ("Małgorzata Braunek",), WIKI2_EVIDENCE)
WIKI2_COLUMNS = {
    "type": "compositional",
    "supporting_facts": {"title": ["Polish-Russian War (film)", "Xawery Żuławski"], "sent_id": [1, 2]},
    "context": {"title": ["Maheen Khan"], "content": [["She is a designer."]]},
    "evidences": {
        "fact": ["Polish-Russian War", "Xawery Żuławski"],
        "relation": ["director", "mother"],
        "entity": ["Xawery Żuławski", "Małgorzata Braunek"],
    },
}

MUSIQUE = {
    "id": "2hop__482757_12019",
    "paragraphs": [
        {"idx": 5, "title": "Miquette Giraudy", "paragraph_text": "Born in Nice …", "is_supporting": True},
        {"idx": 10, "title": "Green (Steve Hillage album)", "paragraph_text": "Green is …", "is_supporting": True},
    ],
    "question": "Who is the spouse of the Green performer?",
    "question_decomposition": [
        {"id": 482757, "question": "Green >> performer", "answer": "Steve Hillage", "paragraph_support_idx": 10},
        {"id": 12019, "question": "#1 >> spouse", "answer": "Miquette Giraudy", "paragraph_support_idx": 5},
    ],
    "answer": "Miquette Giraudy",
    "answer_aliases": ["Giraudy"],
    "answerable": True,
}
MUSIQUE_EVIDENCE = {
    "type": "2hop",
    "decomposition": [
        {"sub_question": "Who performed Green?", "answer": "Steve Hillage", "title": "Green (Steve Hillage album)"},
        {
            "sub_question": "Who was married to Steve Hillage?",
            "answer": "Miquette Giraudy",
            "title": "Miquette Giraudy",
        },
    ],
    "supporting_titles": ["Green (Steve Hillage album)", "Miquette Giraudy"],
    "hops": 2,
}
MUSIQUE_QUESTION = Question(MUSIQUE["id"], MUSIQUE["question"], ("Miquette Giraudy", "Giraudy"), MUSIQUE_EVIDENCE)

NQ_TOKENS = "<P> The Beatles were John <B> Lennon </B> and others . </P>".split()
NQ_ANNOTATION = {
    "annotation_id": 1,
    "long_answer": {"start_token": 0, "end_token": 11, "candidate_index": 0},
    "short_answers": [{"start_token": 4, "end_token": 8}, {"start_token": 1, "end_token": 3}],
    "yes_no_answer": "NONE",
}
NQ = {
    "example_id": 5655493461695504401,
    "question_text": "who was in the beatles",
    "document_url": "https://en.wikipedia.org/…",
    "document_text": " ".join(NQ_TOKENS),
    "annotations": [NQ_ANNOTATION, NQ_ANNOTATION | {"short_answers": [], "yes_no_answer": "YES"}],
}
NQ_FULL = {name: value for name, value in NQ.items() if name != "document_text"} | {
    "document_tokens": [{"token": token, "html_token": token.startswith("<")} for token in NQ_TOKENS]
}
NQ_HUB = {
    "id": "5655493461695504401",
    "document": {
        "title": "The Beatles",
        "tokens": {"token": NQ_TOKENS, "is_html": [token.startswith("<") for token in NQ_TOKENS]},
    },
    "question": {"text": "who was in the beatles", "tokens": ["who"]},
    "annotations": {
        "id": ["1", "2"],
        "short_answers": [
            {"start_token": [4, 1], "end_token": [8, 3], "text": ["John Lennon", "The Beatles"]},
            {"start_token": [], "end_token": [], "text": []},
        ],
        "yes_no_answer": [-1, 1],
    },
}
NQ_QUESTION = Question("5655493461695504401", "who was in the beatles", ("John Lennon", "The Beatles", "yes"), {})

TRIVIA_ANSWER = {
    "Aliases": ["Sunset Blvd", "Sunset Boulevard", ""],
    "MatchedWikiEntityName": "Sunset Boulevard",
    "NormalizedAliases": ["sunset blvd", "sunset boulevard"],
    "NormalizedValue": "sunset boulevard",
    "Type": "WikipediaEntity",
    "Value": "Sunset Boulevard",
}
TRIVIA = {
    "Answer": TRIVIA_ANSWER,
    "EntityPages": [{"DocSource": "TagMe", "Title": "Andrew Lloyd Webber"}],
    "Question": "Which Lloyd Webber musical premiered in the US on 10th December 1993?",
    "QuestionId": "tc_33",
    "QuestionSource": "http://www.triviacountry.com/",
    "SearchResults": [],
}
TRIVIA_HUB = {
    "question": TRIVIA["Question"],
    "question_id": "tc_33",
    "answer": {
        "aliases": ["Sunset Blvd", "Sunset Boulevard"],
        "normalized_aliases": ["sunset blvd"],
        "type": "WikipediaEntity",
        "value": "Sunset Boulevard",
    },
}
TRIVIA_QUESTION = Question(
    "tc_33", TRIVIA["Question"], ("Sunset Boulevard", "Sunset Blvd"), {"type": "WikipediaEntity"}
)

POPQA = {
    "id": 4222362,
    "subj": "George Rankin",
    "prop": "occupation",
    "obj": "politician",
    "s_aliases": '["George James Rankin"]',
    "s_wiki_title": "George Rankin",
    "s_pop": 142,
    "question": "What is George Rankin's occupation?",
    "possible_answers": '["politician", "political leader", "polit."]',
}
POPQA_QUESTION = Question(
    "4222362",
    "What is George Rankin's occupation?",
    ("politician", "political leader", "polit."),
    {"type": "occupation", "supporting_titles": ["George Rankin"], "hops": 1, "s_pop": 142},
)


def flashrag(question: Question, metadata: dict[str, Any]) -> dict[str, Any]:
    return question_to_dict(question) | {"metadata": metadata}


# (data set, record, question), a row for each layout and each way in which a field is written.
SAMPLES = {
    "hotpotqa": ("hotpotqa", HOTPOT, HOTPOT_QUESTION),
    "hotpotqa of the hub": ("hotpotqa", HOTPOT_HUB, HOTPOT_QUESTION),
    "hotpotqa of FlashRAG": (
        "hotpotqa",
        flashrag(HOTPOT_QUESTION, {k: HOTPOT_HUB[k] for k in ("type", "level", "supporting_facts", "context")}),
        HOTPOT_QUESTION,
    ),
    "2wiki": (
        "2wikimultihopqa",
        WIKI2,
        Question(WIKI2["_id"], WIKI2["question"], ("Małgorzata Braunek",), WIKI2_EVIDENCE | {"answer_id": "Q274277"}),
    ),
    "2wiki of the hub": (
        "2wikimultihopqa",
        {k: WIKI2[k] for k in ("_id", "question", "answer")} | WIKI2_COLUMNS,
        WIKI2_QUESTION,
    ),
    "2wiki of the hub, JSON texts": (
        "2wikimultihopqa",
        {k: WIKI2[k] for k in ("_id", "type", "question", "answer")}
        | {k: json.dumps(WIKI2[k]) for k in ("context", "supporting_facts", "evidences")},
        WIKI2_QUESTION,
    ),
    "2wiki of FlashRAG": ("2wikimultihopqa", flashrag(WIKI2_QUESTION, WIKI2_COLUMNS), WIKI2_QUESTION),
    "musique": ("musique", MUSIQUE, MUSIQUE_QUESTION),
    "musique of FlashRAG": (
        "musique",
        flashrag(
            MUSIQUE_QUESTION,
            {
                "question_decomposition": [
                    {"question": step["question"], "answer": step["answer"], "support_paragraph": paragraph}
                    for step, paragraph in zip(
                        MUSIQUE["question_decomposition"], reversed(MUSIQUE["paragraphs"]), strict=True
                    )
                ]
            },
        ),
        MUSIQUE_QUESTION,
    ),
    "nq, simplified": ("nq", NQ, NQ_QUESTION),
    "nq, full": ("nq", NQ_FULL, NQ_QUESTION),
    "nq of the hub": ("nq", NQ_HUB, NQ_QUESTION),
    "nq of DPR": (
        "nq",
        {"question": "who?", "answers": ["x", "y"], "positive_ctxs": [], "negative_ctxs": []},
        Question("nq_1", "who?", ("x", "y"), {}),
    ),
    "nq-open": ("nq", {"question": "who?", "answer": ["x", "y"]}, Question("nq_1", "who?", ("x", "y"), {})),
    "nq of FlashRAG": (
        "nq",
        {"id": "test_0", "question": "who?", "golden_answers": ["x"]},
        Question("test_0", "who?", ("x",), {}),
    ),
    "triviaqa": ("triviaqa", TRIVIA, TRIVIA_QUESTION),
    "triviaqa of the hub": ("triviaqa", TRIVIA_HUB, TRIVIA_QUESTION),
    "triviaqa of DPR": (
        "triviaqa",
        {"question": "who?", "answers": ["x"], "positive_ctxs": []},
        Question("triviaqa_1", "who?", ("x",), {}),
    ),
    "popqa": ("popqa", POPQA, POPQA_QUESTION),
    "popqa, a list": (
        "popqa",
        POPQA | {"possible_answers": ["politician", "political leader", "polit."]},
        POPQA_QUESTION,
    ),
    "bamboogle": (
        "bamboogle",
        {"Question": "Who was president when superconductivity was discovered?", "Answer": "William Howard Taft"},
        Question(
            "bamboogle_1",
            "Who was president when superconductivity was discovered?",
            ("William Howard Taft",),
            {"hops": 2},
        ),
    ),
}  # fmt: skip
NEEDS_A_NAME = {"nq-open"}


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_layout_and_every_data_set_has_a_sample() -> None:
    used = {
        next((i for i, layout in enumerate(LAYOUTS) if layout.fields <= row.keys() and layout.data_set == name), None)
        for name, row, _ in SAMPLES.values()
    } - {None}
    of_flashrag = {i for i, layout in enumerate(LAYOUTS) if layout.data_set == "flashrag"}
    assert used | of_flashrag == set(range(len(LAYOUTS)))
    assert {name for name, _, _ in SAMPLES.values()} == set(DATA_SETS[1:])
    assert {layout.data_set for layout in LAYOUTS} == set(DATA_SETS)


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_record_becomes_its_question_in_json_and_parquet(tmp_path: Path, sample: str) -> None:
    name, row, expected = SAMPLES[sample]
    path = write(tmp_path, row)
    assert read_questions(f"{name}:{path}") == [expected]
    if sample in NEEDS_A_NAME:
        with pytest.raises(UserError, match="give the data set of a file without ids as NAME:FILE"):
            read_questions(path)
    else:
        [found] = read_questions(path)
        assert (found.question, found.golden_answers, found.metadata) == (
            expected.question,
            expected.golden_answers,
            expected.metadata,
        )
    if not isinstance(row.get("supporting_facts"), list) and "context" not in row:  # columns have one type
        table = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), table)
        assert read_questions(f"{name}:{table}") == [expected]


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_question_is_written_and_read_back(tmp_path: Path, sample: str) -> None:
    expected = SAMPLES[sample][2]
    write_jsonl(tmp_path / "written.jsonl", [question_to_dict(expected)])
    [found] = read_questions(tmp_path / "written.jsonl")
    assert found == expected and decomposition_of(found) == decomposition_of(expected)


# ------------------------------------------------------------------------------- files as released


def test_triviaqa_is_one_object(tmp_path: Path) -> None:
    path = tmp_path / "wikipedia-dev.json"
    content = {"Domain": "Wikipedia", "Data": [TRIVIA, TRIVIA | {"QuestionId": "tc_34"}], "Version": 1.0}
    for indent in (None, 4):
        path.write_text(json.dumps(content, indent=indent))
        if indent is None:
            path.write_text(json.dumps({"Data": content["Data"], "Version": 1.0}))
        found = read_questions(path)
        assert [question.id for question in found] == ["tc_33", "tc_34"]
    assert [path.read_text().splitlines()[line - 1].strip() for line in found.lines] == ["{", "{"]
    assert found.lines[0] == 4
    path.write_text(json.dumps({"Data": [TRIVIA | {"Answer": None}]}, indent=4))
    with pytest.raises(UserError, match=r"wikipedia-dev\.json:3: Answer must be an object; got null"):
        read_questions(path)


def test_popqa_is_a_tsv_and_bamboogle_a_csv(tmp_path: Path) -> None:
    tsv = tmp_path / "popQA.tsv"
    answers = '"[""politician"", ""political leader"", ""polit.""]"'
    tsv.write_text(
        "id\tprop\ts_wiki_title\ts_pop\tquestion\tpossible_answers\n"
        f"4222362\toccupation\tGeorge Rankin\t142\tWhat is George Rankin's occupation?\t{answers}\n"
    )
    assert read_questions(tsv) == read_questions(f"popqa:{tsv}") == [POPQA_QUESTION]
    csv = tmp_path / "bamboogle.csv"
    csv.write_text('\ufeffQuestion,Answer\r\n"Who, and why?",x\r\n', encoding="utf-8", newline="")
    assert read_questions(csv) == [Question("bamboogle_2", "Who, and why?", ("x",), {"hops": 2})]


def test_names_of_2wikis_answers_come_from_the_file_beside(tmp_path: Path) -> None:
    path = write(tmp_path, WIKI2, WIKI2 | {"_id": "q1", "answer_id": "Q1"}, WIKI2 | {"_id": "q2", "answer_id": None})
    aliases = {"Q_id": "Q274277", "aliases": ["Malgorzata Braunek", "Małgorzata Braunek"], "demonyms": []}
    (tmp_path / "id_aliases.json").write_text(json.dumps(aliases) + "\n" + json.dumps({"Q_id": "Q2"}) + "\n")
    first, second, third = read_questions(path)
    assert first.golden_answers == ("Małgorzata Braunek", "Malgorzata Braunek")
    assert second.golden_answers == third.golden_answers == ("Małgorzata Braunek",)


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        ("hotpotqa", {k: HOTPOT[k] for k in ("_id", "question")}, "expected a field 'golden_answers' (or 'answers'"),
        ("hotpotqa", HOTPOT | {"answer": ""}, 'answer must be one or more texts, numbers or truth values; got ""'),
        ("hotpotqa", HOTPOT | {"supporting_facts": ["a"]}, "supporting_facts must have the shape that its data"),
        ("musique", TRIVIA, "expected a record of musique, with the fields ['golden_answers', 'question'] or ['answer"),
        ("musique", MUSIQUE | {"question_decomposition": [{"question": "?"}]}, "question_decomposition, step 1: expec"),
        ("nq", NQ | {"annotations": [NQ_ANNOTATION | {"short_answers": []}]}, "a question must have an answer"),
        ("nq", NQ | {"annotations": "x"}, "annotations must be a list of objects with the fields short_answers, yes_n"),
        (
            "nq",
            NQ | {"annotations": [NQ_ANNOTATION | {"short_answers": [{"start_token": 5, "end_token": 99}]}]},
            "a short answer must be among 12 tokens; got those from 5 to 99",
        ),
        ("triviaqa", TRIVIA | {"Answer": TRIVIA_ANSWER | {"Aliases": {}}}, "Aliases must be a list of texts; got {}"),
        ("popqa", POPQA | {"possible_answers": "[]"}, "a question must have an answer; got none"),
        ("popqa", POPQA | {"s_pop": "many"}, 's_pop must be a number; got "many"'),
        ("popqa", POPQA | {"id": None}, "id must be a text; got null"),
        ("bamboogle", {"Question": "Who?", "Answer": None}, "answer must be one or more texts"),
        ("", {"question": "Who?", "answer": "x"}, "expected a record with an id, or of a known data set; got the"),
    ],
)  # fmt: skip
def test_a_fault_names_file_and_line(tmp_path: Path, source: str, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path, row)
    with pytest.raises(UserError) as error:
        read_questions(f"{source}:{path}" if source else path)
    assert str(error.value).startswith(f"{path}:1: {message}")


def test_lone_texts_are_lists_of_one(tmp_path: Path) -> None:
    rows = [
        MUSIQUE | {"answer_aliases": "Giraudy"},
        TRIVIA | {"Answer": TRIVIA_ANSWER | {"Aliases": "Sunset Blvd"}},
        POPQA | {"possible_answers": "politician"},
    ]
    found = read_questions(write(tmp_path, *rows))
    assert found[:2] == [MUSIQUE_QUESTION, TRIVIA_QUESTION]
    assert found[2].golden_answers == ("politician",)


def test_evidence_of_another_shape_stays_in_flashrags_metadata(tmp_path: Path) -> None:
    metadata = {"supporting_facts": ["a", "b"], "evidences": "text", "context": "kept", "paragraphs": [1]}
    row = {"id": "q", "question": "Who?", "golden_answers": ["x"], "metadata": metadata}
    assert read_questions(write(tmp_path, row))[0].metadata == metadata
