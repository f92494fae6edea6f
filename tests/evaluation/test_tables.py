"""The paper's tables: which cells each has, what is measured again, what is refused, and what stands beside them."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console
from test_evaluator import QUESTIONS, evaluator_of

from r3rag_jax.config import load_config
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.flags import parse_table, question_sets, read_values
from r3rag_jax.evaluation.tables.cells import Cell, OpenedCell, QuestionSet
from r3rag_jax.evaluation.tables.paper import MODELS, NUM_PASSAGES, Setting, dataset_of, model_of, paper_rows
from r3rag_jax.evaluation.tables.plans import PLANS, plan_table
from r3rag_jax.evaluation.tables.table import MEAN, Table, make_table
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.text.tokenizer import Tokenizer

SMALL = DecoderConfig(256, 16, 1, 2, 1, 8, 32)
RECIPE = "phases: [index]\nrollout: {max_length: 2000, max_new_tokens: 500}\nretrieval: {top_k: 2, max_passages: 4}\n"
Make = Callable[..., Table]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run_at(path: Path, *policies: str, recipe: str = RECIPE) -> str:
    for policy in policies:
        (path / "policy" / policy).mkdir(parents=True)
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(recipe)
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return run_at(tmp_path / "run", "sft", "rl")


@pytest.fixture
def make(tokenizer: Tokenizer) -> Make:
    """Makes the table of a command line, with systems that answer "Shrewsbury"; `opened` gets the policies played."""

    def make_it(*words: str, opened: list[str] | None = None, numbers: int = 2) -> Table:
        plan = plan_table(parse_table([*words, "retrieval.passage_tokens=100"]))

        def open_cell(cell: Cell) -> OpenedCell:
            evaluator = evaluator_of(cell.checkpoint.run.path, tokenizer, cell.checkpoint.config, opened)
            return OpenedCell(evaluator, QUESTIONS[:numbers], SMALL, 2)

        return make_table(plan, open_cell, Console(file=io.StringIO()))

    return make_it


# -------------------------------------------------------------------------------------------- cells


def test_the_main_table_resumes_and_takes_what_the_eval_phase_has(make: Make, run: str, tokenizer: Tokenizer) -> None:
    words = ["main", "--checkpoint", run, "--systems", "closed_book", "cold_start", "r3rag"]
    config = load_config(Path(run) / "config.yaml", [f"run_dir={run}", "retrieval.passage_tokens=100"])
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"systems": ("closed_book",)})})
    assert evaluator_of(Path(run), tokenizer, config).run(QUESTIONS)  # the eval phase
    opened: list[str] = []
    table = make(*words, opened=opened)
    assert opened == ["sft", "rl"]
    assert [row.title for row in table.rows] == ["Closed book", "Cold start", "R3-RAG"]
    assert (table.columns, table.metrics) == ({"test": 2}, ("f1", "em"))
    assert [row.numbers["test"]["em"] for row in table.rows] == [50.0] * 3
    assert table.rows[0].intervals["test"]["em"] == pytest.approx([9.45, 90.55], abs=0.01)  # Wilson's, of 1 in 2
    assert [row.p_values for row in table.rows] == [{"test": 1.0}, {"test": 1.0}, {}]
    assert [Path(row.results["test"]).name for row in table.rows] == [
        "closed_book.json", "cold_start-sft-test.json", "r3rag-rl-test.json",
    ]  # fmt: skip
    assert table.facts["retrieval.top_k"] == 2 and "policy" not in table.facts
    assert make(*words, opened=opened) == table and len(opened) == 2
    make("tokens", *words[1:], opened=opened)
    assert len(opened) == 2  # the same cells
    make(*words, "retrieval.top_k=1", opened=opened)
    assert opened[2:] == ["base", "sft", "rl"]
    make(*words, "retrieval.top_k=1", opened=opened, numbers=1)
    assert len(opened) == 8
    make("top_k", "--checkpoint", run, "--values", "1", "retrieval.max_passages=4", opened=opened, numbers=1)
    assert len(opened) == 8  # a cell of the main table


def test_columns_are_sets_of_questions_and_their_mean(make: Make, run: str) -> None:
    table = make("main", "--checkpoint", run, "--systems", "r3rag", "--questions", "dev/x.jsonl", "hotpotqa=y.jsonl")
    assert list(table.columns) == ["dev-x", "hotpotqa", MEAN] and table.columns[MEAN] is None
    assert table.rows[0].numbers[MEAN] == table.rows[0].numbers["dev-x"]


def test_a_sweep_raises_the_budget_of_passages_and_nothing_else(run: str) -> None:
    plan = plan_table(parse_table(["top_k", "--checkpoint", run, "--values", "1,2,5"]))
    configs = [cell.checkpoint.config for cell in plan.cells]
    assert [(c.retrieval.top_k, c.retrieval.max_passages) for c in configs] == [(1, 5), (2, 10), (5, 25)]
    assert {cell.name for cell in plan.cells} == {f"tables/r3rag-rl-test-top_k={k}" for k in (1, 2, 5)}
    given = plan_table(parse_table(["top_k", "--checkpoint", run, "--values", "1-4", "retrieval.max_passages=6"]))
    assert [c.checkpoint.config.retrieval.max_passages for c in given.cells] == [6] * 4
    steps = plan_table(parse_table(["max_steps", "--checkpoint", run, "rollout.max_steps=3"]))
    assert [cell.checkpoint.config.rollout.max_steps for cell in steps.cells] == list(range(1, 11))
    assert [cell.checkpoint.config.retrieval.max_passages for cell in steps.cells][::3] == [4, 8, 14, 20]


def test_sweeps_are_tables(make: Make, run: str) -> None:
    table = make("max_steps", "--checkpoint", run, "--values", "1,3")
    assert [row.title for row in table.rows] == ["1", "3"] and table.row_title == "rollout.max_steps"
    assert "rollout.max_steps" not in table.facts and table.facts["retrieval.top_k"] == 2
    assert table.notes == ["The paper shows max_steps as a figure, without numbers."]
    assert {*table.metrics} >= {"em", "retrievals", "output_tokens", "context_full"}


def test_retrievers_have_indexes_of_their_own_beside_the_runs(run: str) -> None:
    words = ["retrievers", "--checkpoint", run]
    plan = plan_table(parse_table(words))
    assert [(c.row, c.checkpoint.config.retrieval.kind) for c in plan.cells] == [("faiss", "faiss"), ("bm25", "bm25")]
    assert [c.checkpoint.config.retrieval.index_dir for c in plan.cells] == ["", f"{run}/indexes/bm25"]
    chosen = ["--retriever", "E5 base", "retrieval.encoder.query_prefix=query: ", "--retriever", "web"]
    plan = plan_table(
        parse_table([*words, *chosen, "retrieval.kind=http", "retrieval.endpoint.url=http://localhost:1"])
    )
    assert [c.checkpoint.config.retrieval.index_dir for c in plan.cells] == [f"{run}/indexes/E5_base", ""]
    assert plan.cells[1].checkpoint.config.retrieval.endpoint.url == "http://localhost:1"


def test_rewards_are_a_row_per_run(make: Make, run: str, tmp_path: Path) -> None:
    outcome = run_at(tmp_path / "outcome", "rl", recipe=f"{RECIPE}rewards: {{use_process: false}}\n")
    table = make("rewards", "--checkpoint", run, outcome)
    assert [row.title for row in table.rows] == [
        "outcome (em) and process (gold)", "outcome (em)", "cold start, no RL",
    ]  # fmt: skip
    assert any("No run without the outcome reward" in note for note in table.notes)
    assert not any("without the process reward" in note for note in table.notes)
    alone = make("rewards", "--checkpoint", run)
    assert any("run_dir=" in note and "rewards.use_process=false" in note for note in alone.notes)
    with pytest.raises(UserError, match=r"runs with different rewards; .* has those of"):
        make("rewards", "--checkpoint", run, run_at(tmp_path / "twin", "rl"))


def test_rows_that_are_not_comparable_are_refused_with_the_difference(make: Make, run: str, tmp_path: Path) -> None:
    recipe = f"{RECIPE.replace('top_k: 2', 'top_k: 3')}rewards: {{use_process: false}}\n"
    words = ["rewards", "--checkpoint", run, run_at(tmp_path / "other", "rl", recipe=recipe)]
    with pytest.raises(UserError, match=r"rows of one table .* differ in retrieval\.top_k \(2, 3\)"):
        make(*words)
    assert len(make(*words, "--varied", "retrieval.top_k").rows) == 3


def test_what_a_checkpoint_does_not_have(tmp_path: Path, run: str) -> None:
    only_sft = run_at(tmp_path / "sft", "sft")
    plan = plan_table(parse_table(["main", "--checkpoint", only_sft]))
    assert {cell.system for cell in plan.cells} >= {"closed_book", "cold_start"}
    assert "r3rag" not in {cell.system for cell in plan.cells}
    with pytest.raises(UserError, match=r"--systems must be of policies that .* has; r3rag needs phase rl"):
        plan_table(parse_table(["main", "--checkpoint", only_sft, "--systems", "r3rag"]))
    with pytest.raises(UserError, match="--checkpoint must name one run or model for main; got 2"):
        plan_table(parse_table(["main", "--checkpoint", run, only_sft]))
    for table, system in (("max_steps", "ircot"), ("top_k", "closed_book")):
        with pytest.raises(UserError, match=rf"--system must be of those that .* changes: .*; got {system}"):
            plan_table(parse_table([table, "--checkpoint", run, "--system", system]))
    sweep = plan_table(parse_table(["top_k", "--checkpoint", only_sft, "--values", "1"]))
    assert sweep.cells[0].policy == "sft"  # the last that there is


# -------------------------------------------------------------------------------------------- flags


def test_keys_are_told_from_the_values_of_flags(run: str) -> None:
    words = ["main", "retrieval.top_k=3", "--checkpoint", run, "rollout.max_steps=2"]
    words += ["--questions", "a=b.jsonl", "seed=1"]
    request = parse_table(words)
    assert request.overrides == ("retrieval.top_k=3", "rollout.max_steps=2", "seed=1")
    assert (request.places, request.questions) == ((run,), (QuestionSet("a", Path("b.jsonl")),))
    assert parse_table(["main", "--checkpoint", run]).questions == (QuestionSet("test"),)
    named = [plan_table(parse_table(["main", "--checkpoint", run, *flags])).file for flags in ([], ["--name", "mine"])]
    assert named == ["main", "mine"]
    with pytest.raises(UserError, match=r"--name must be letters"):
        parse_table(["main", "--checkpoint", run, "--name", "../x"])


@pytest.mark.parametrize("text", ["", "0-3", "3-1", "1,1", "a", "1-", "0", "1-200", "1.5"])
def test_values_of_a_sweep(text: str) -> None:
    assert read_values("1-4") == (1, 2, 3, 4) and read_values("2,8,4") == (2, 8, 4)
    with pytest.raises(UserError, match="--values must be like 1-10 or 1,2,5"):
        read_values(text)


def test_question_sets_have_names() -> None:
    sets = question_sets(["hotpotqa/dev.jsonl", "musique=x/dev.jsonl"])
    assert [one.name for one in sets] == ["hotpotqa-dev", "musique"]
    with pytest.raises(UserError, match="--questions must have different names, NAME=FILE gives one; got a-dev twice"):
        question_sets(["a/dev.jsonl", "/b/a/dev.jsonl"])


# -------------------------------------------------------------------------------------------- paper


def setting(**changes: Any) -> Setting:
    keys = ["retrieval.top_k=5", "retrieval.max_passages=25", "rollout.max_steps=5", "eval.judge=true", "phases=index"]
    keys += ["judge.endpoint.url=http://x", "retrieval.encoder.kind=bert", "retrieval.encoder.path=/m/e5-base-v2"]
    config = load_config(None, [*keys, *changes.pop("keys", [])])
    kind, width, layers = MODELS["Qwen2.5-7B"]
    decoder = dataclasses.replace(SMALL, model_type=kind, hidden_size=width, num_layers=layers)
    columns = {"hotpotqa-dev": 7405, "musique": 2417}
    return dataclasses.replace(Setting(config, decoder, columns, NUM_PASSAGES), **changes)


def test_the_papers_rows_stand_beside_its_setting() -> None:
    rows, notes = paper_rows("main", setting())
    assert notes == [] and rows["R3-RAG (paper, Qwen2.5-7B)"] == {
        "hotpotqa-dev": {"acc": 65.5, "f1": 59.7, "em": 46.4}, "musique": {"acc": 33.6, "f1": 34.0, "em": 21.4},
    }  # fmt: skip
    rows, _ = paper_rows("tokens", setting())
    assert rows["R3-RAG (paper, Qwen2.5-7B)"] == {"musique": {"tokens_per_acc": 430}}
    assert set(paper_rows("retrievers", setting(keys=["retrieval.kind=bm25"]))[0]) == {
        f"{name} (paper, Qwen2.5-7B)" for name in ("BM25", "E5", "BGE")
    }
    assert (dataset_of("2wiki-dev"), dataset_of("test"), model_of(SMALL)) == ("2wiki", None, None)


@pytest.mark.parametrize(
    ("table", "changes", "why"),
    [
        ("main", {"keys": ["retrieval.top_k=3"]}, "retrieval.top_k must be 5, is 3"),
        ("main", {"keys": ["rollout.max_steps=4"]}, "rollout.max_steps must be 5, is 4"),
        ("main", {"keys": ["retrieval.kind=bm25"]}, "the retriever must be E5-base-v2"),
        ("main", {"keys": ["eval.judge=false"]}, "eval.judge must be true"),
        ("main", {"keys": ["eval.temperature=0.5"]}, "decoding must be greedy"),
        ("main", {"decoder": SMALL}, "the model must be Llama-3.1-8B or Qwen2.5-7B"),
        ("rewards", {}, "the model must be Llama-3.1-8B"),
        ("main", {"num_passages": 400}, "21,015,324 passages of Wikipedia 2018, is of 400"),
        ("main", {"num_passages": None}, "is of an unknown number"),
        ("main", {"columns": {"hotpotqa-dev": 500}}, "hotpotqa-dev must be all 7,405 dev questions, is 500"),
        ("main", {"columns": {"test": 7405}}, "the questions must be of hotpotqa, 2wiki, musique, named so"),
    ],
)
def test_and_beside_no_other(table: str, changes: dict[str, Any], why: str) -> None:
    rows, notes = paper_rows(table, setting(**changes))
    assert rows == {} and len(notes) == 1 and why in notes[0]
    assert notes[0].count(";") == 0  # nothing else differs


def test_every_table_is_json(make: Make, run: str) -> None:
    for name in PLANS:
        words = ["--values", "1"] if name in ("max_steps", "top_k") else []
        words += ["--systems", "cold_start", "r3rag"] if name in ("main", "tokens") else []
        table = make(name, "--checkpoint", run, *words)
        assert json.loads(json.dumps(dataclasses.asdict(table)))["name"] == name and table.rows
