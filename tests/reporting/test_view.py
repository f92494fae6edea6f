"""view.py: who wrote what, right or wrong, and the tables."""

import copy
import dataclasses
import io
import re
from html.parser import HTMLParser

import pytest
import synthetic_run
from rich.console import Console

from r3rag_jax.reporting.rendering import (
    COLUMNS,
    Outcome,
    all_tables,
    comparable_sets,
    environment,
    facts,
    group_rows,
    groups_table,
    is_correct,
    margin_of,
    not_comparable,
    outcome,
    result_rows,
    results_html,
    results_table,
    trajectory_html,
    visible,
)
from r3rag_jax.reporting.terminal import print_trajectory
from r3rag_jax.types import Question, Status, Step, Trajectory

ASKED = synthetic_run.question(1)
EVALS = [synthetic_run.evaluation(system) for system in synthetic_run.TITLES]


def answered(answer, *golds):
    return Trajectory(Question("q", "?", golds), (Step("", answer=answer),), Status.ANSWERED)


def printed(thing, **kwargs):
    console = Console(file=io.StringIO(), width=120, **kwargs)
    if isinstance(thing, Trajectory):
        print_trajectory(thing, console)
    else:
        console.print(thing)
    return console.file.getvalue()


class Tags(HTMLParser):
    """Checks that tags are balanced and gathers them with their attributes."""

    VOID = ("meta", "link", "br")

    def __init__(self, html):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("trajectory", "expected"),
    [
        (answered("the Orvessa.", "Tarn", "Orvessa"), Outcome("right", "✓ right")),
        (answered("in Orvessa", "Orvessa"), Outcome("wrong", "✗ wrong")),
        (answered("Orvessa"), Outcome("unknown", "answered")),
        (synthetic_run.no_answer(ASKED), Outcome("none", "✗ no answer")),
        (synthetic_run.malformed(ASKED), Outcome("none", "✗ malformed step")),
        (
            dataclasses.replace(synthetic_run.malformed(ASKED), status=Status.CONTEXT_FULL),
            Outcome("none", "✗ context full"),
        ),
    ],
)
def test_outcome(trajectory, expected):
    assert outcome(trajectory) == expected
    assert is_correct(trajectory) == (expected.kind == "right")


def test_facts():
    assert facts(synthetic_run.wrong(ASKED)) == [
        "gold: Orvessa",
        "bridge",
        "1 retrieval",
        "★ 0 of 2 supporting passages found",
    ]
    assert facts(answered("x")) == ["0 retrievals"]


def test_visible_shows_control_characters_and_keeps_line_breaks():
    assert visible("a\x1b[31m\x00\r\x7f\n\tb") == "a␛[31m␀␍␡\n\tb"
    assert visible("lone \ud83d half") == "lone ? half"


def test_terminal_holds_every_part_marks_support_and_a_legend():
    text = printed(synthetic_run.right(ASKED))
    rows = [line.split() for line in text.splitlines()]
    assert ["query", "Who", "wrote", "The", "Glass", "Harbour?"] in rows
    assert ["answer", "Orvessa"] in rows
    marks = [row[2:4] for row in rows if row[:2] == ["★", "passage"]]
    assert marks == [["The", "Glass"], ["Ilse", "Malthen"]]
    assert [row[1:3] for row in rows if row[:1] == ["passage"]] == [["Glass", "Bay"]]
    assert "✓ right" in text and rows[-1][0] == "policy"


def test_terminal_prints_malformed_text_verbatim_in_red():
    """Model text must neither act as rich markup nor reach the terminal as an escape sequence."""
    text = printed(synthetic_run.malformed(ASKED), force_terminal=True, color_system="standard")
    assert "\x1b[31m<think> I wonder <b>whether</b> [bold]this[/bold] ends </query>␛[31m" in text


def test_html_escapes_and_colours():
    html = trajectory_html(synthetic_run.malformed(ASKED))
    text = "&lt;think&gt; I wonder &lt;b&gt;whether&lt;/b&gt; [bold]this[/bold] ends "
    text += "&lt;/query&gt;␛[31m"
    block = '<div class="block malformed"><span class="label">malformed</span><div class="text">'
    assert f"{block}{text}</div></div>" in html
    classes = [attrs.get("class", "") for _, attrs in Tags(trajectory_html(synthetic_run.right(ASKED))).seen]
    parts = [name.removeprefix("block ") for name in classes if name.startswith("block ")]
    assert parts == ["analysis", "query", "passages"] * 2 + ["analysis", "answer"]
    assert "badge right" in classes


def test_html_marks_supporting_passages_only():
    html = trajectory_html(synthetic_run.right(ASKED))
    marked = re.findall(r'<span class="mark" title="supporting passage">★</span> <span class="title">(.*?)<', html)
    assert marked == ["The Glass Harbour", "Ilse Malthen"]
    assert "river Ane &lt;&amp; its &#34;old&#34; bridge&gt;." in html


def test_html_of_an_empty_retrieval_says_so():
    assert "nothing new was found" in trajectory_html(synthetic_run.malformed(ASKED))
    assert "nothing new was found" not in trajectory_html(synthetic_run.right(ASKED))


def test_result_rows():
    rows = result_rows(EVALS)
    assert [row.title for row in rows] == ["Closed book", "Naive RAG", "Cold start", "R3-RAG"]
    texts = [cell.text for cell in rows[3].cells]
    assert texts == ["73.0", "77.2", "76.0", "1.95", "79.0", "56", "200"]
    assert [cell.is_best for cell in rows[3].cells] == [True, True, True, False, True, False, False]
    assert rows[0].cells[4].text == "—"
    assert rows[3].cells[0].margin == "±6.1"


def test_a_lone_system_is_not_called_best():
    assert not any(cell.is_best for row in result_rows(EVALS[3:]) for cell in row.cells)


def test_the_margin_is_half_the_interval_of_the_result_or_wilsons():
    def result(em, num, **fields):
        return {"groups": {"all": {"em": em, "num": num}}, **fields}

    # p = 1/2, n = 100: 1.96 sqrt(1/400 + 1.96^2 / 40000) / (1 + 1.96^2 / 100) = 0.0962
    assert margin_of(result(50.0, 100)) == pytest.approx(9.617, abs=1e-3)
    assert margin_of(result(0.0, 100)) > 1.5  # the textbook interval would claim certainty
    assert margin_of(result(50.0, 100, intervals={"em": [41.0, 60.0]})) == 9.5
    assert margin_of({"groups": {}}) is None and margin_of(result(None, 0)) is None


def test_judged_accuracy_is_a_column_where_a_judge_was_asked():
    judged = copy.deepcopy(EVALS)
    judged[3]["groups"]["all"]["acc"] = 80.04
    header = printed(results_table(judged)).splitlines()[1].split()
    assert header == [title for _, title, *_ in COLUMNS if title not in ("full", "candidate EM")]
    at = header.index("ACC")
    assert [row.cells[at].text for row in result_rows(judged)] == ["—", "—", "—", "80.0"]
    assert ">ACC</th>" in results_html(judged) and ">ACC</th>" not in results_html(EVALS)


def test_several_samples_are_columns_of_their_own():
    sampled = copy.deepcopy(EVALS[3:])
    sampled[0]["groups"]["all"] |= {"pass@1": 73.0, "pass@4": 91.26, "majority@4": 77.0}
    [row] = result_rows(sampled)
    text = printed(results_table(sampled))
    assert "pass@4" in text and "91.3" in text and [cell.text for cell in row.cells][3:6] == ["73.0", "91.3", "77.0"]


def test_full_contexts_are_a_column_where_there_were_any():
    with_none, with_some = copy.deepcopy(EVALS), copy.deepcopy(EVALS)
    with_none[3]["groups"]["all"]["context_full"] = 0.0
    with_some[3]["groups"]["all"]["context_full"] = 12.5
    assert [row.cells[-2].text for row in result_rows(with_some)] == ["—", "—", "—", "12.5"]
    assert ">full</th>" in results_html(with_some) and "full" in printed(results_table(with_some))
    assert result_rows(with_none) == result_rows(EVALS)


def test_tables_in_a_terminal():
    text = printed(results_table(EVALS))
    header = text.splitlines()[1].split()
    assert header == [
        title for _, title, *_ in COLUMNS if title not in ("ACC", "candidate EM", "full")
    ]  # no judge was asked
    assert text.splitlines()[5].split() == [
        "R3-RAG",
        "73.0",
        "±6.1",
        "77.2",
        "76.0",
        "1.95",
        "79.0",
        "56",
        "200",
    ]
    groups = printed(groups_table(EVALS)).splitlines()
    assert groups[1].split() == [
        "all",
        "single",
        "bridge",
        "comparison",
        "bridge",
        "comparison",
        "unseen",
        "seen",
    ]
    assert groups[2].split() == ["200", *["50"] * 6]
    assert groups[6].split() == ["R3-RAG", "73.0", "81.0", "75.0", "72.0", "69.5", "71.0", "74.5"]


def test_groups_that_only_some_systems_have():
    other = EVALS[3] | {"groups": {"all": {"num": 7, "em": 10.0}}}
    lines = printed(groups_table([EVALS[2], other])).splitlines()
    assert lines[2].split()[0] == "7-200"
    assert lines[4].split() == ["R3-RAG", "10.0", *["—"] * 6]


def test_groups_start_with_all_and_end_with_unseen_and_seen():
    groups = {name: {"num": 1, "em": 0.0} for name in ("seen", "single", "all", "unseen", "bridge")}
    titles, _ = group_rows([EVALS[3] | {"groups": groups}])
    assert titles == ["all\n1", "single\n1", "bridge\n1", "unseen\n1", "seen\n1"]


def test_names_of_groups_and_results_are_no_markup():
    groups = {"all": {"num": 1, "em": 0.0}, "[/bold]": {"num": 1, "em": 0.0}, "[red]x\x1b": {"num": 2, "em": 50.0}}
    named = EVALS[3] | {"title": "[/dim] mine", "groups": groups, "fingerprint": {"questions": "q1"}}
    text = printed(groups_table([named]))
    assert "[/bold]" in text and "[red]x␛" in text and "[/dim] mine" in text
    assert "[/dim] mine is not comparable with Cold start" in "".join(map(printed, all_tables([EVALS[2], named])))


def test_different_questions_are_called_out():
    other = EVALS[3] | {"fingerprint": EVALS[3]["fingerprint"] | {"questions": "q1", "top_k": 5}}
    sentence = "R3-RAG is not comparable with Cold start: they differ in questions, top k (2, 5)."
    assert not_comparable([EVALS[2], other]) == [sentence]
    tables = list(map(printed, all_tables([*EVALS[:3], other])))
    assert len(tables) == 4 and "".join(tables).count(sentence) == 0  # it differs from the first, which is named
    assert "R3-RAG is not comparable with Closed book" in tables[0]
    assert ["R3-RAG" in table.split("EM ±")[0] for table in tables] == [False, False, True, True]
    html = results_html([EVALS[2], other])
    assert sentence in html and [tag for tag, _ in Tags(html).seen].count("table") == 4
    assert not_comparable(EVALS) == [] and comparable_sets(EVALS) == [EVALS]


def test_results_html_holds_both_tables():
    html = results_html(EVALS)
    assert [tag for tag, _ in Tags(html).seen].count("table") == 2
    assert '<td class="best">73.0 <span class="margin">±6.1</span>' in html


def test_templates_refuse_a_missing_name():
    with pytest.raises(Exception, match="'trajectory' is undefined"):
        environment().get_template("fragment.html.j2").render()


def test_rl_and_a_cold_start_that_it_did_not_begin_from_are_called_out():
    cold_starts = {"cold_start": {"cold_start": "a"}, "r3rag": {"cold_start": "b"}}
    evals = [e | {"fingerprint": e["fingerprint"] | cold_starts.get(e["system"], {})} for e in EVALS]
    assert not_comparable(evals) == ["R3-RAG is not comparable with Cold start: they differ in cold start."]
