"""The README and the pages in docs/: every key, path, link, command and message exists, and every example works."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from fake_backend import FakeBackend
from test_layers import ENTRY_POINTS, FOLDER_ENTRY_POINTS, FOLDERS, PACKAGE

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.config import Config, RetrievalConfig, RewardConfig, RLConfig, RolloutConfig, load_config
from r3rag_jax.config.presets import PRESETS, SOURCES
from r3rag_jax.config.schema import schema, section_names
from r3rag_jax.config.values import convert, override_node
from r3rag_jax.evaluate import ACTIONS
from r3rag_jax.evaluation.answer_texts import contains_characters, hotpot_overlap
from r3rag_jax.evaluation.metrics import METRICS, RATIOS, metric_of
from r3rag_jax.retrieval.factory import RETRIEVERS, build_index, open_retriever
from r3rag_jax.rewards.answer import answer_scores, encode_answers
from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.scorer import Scorer
from r3rag_jax.rewards.terms import PROCESS_REWARDS
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.rl.estimator import estimate
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.run.metrics import MetricsLog
from r3rag_jax.run.trackers.factory import TRACKERS, make_trackers
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory, TrajectoryTable

ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
EXAMPLES = ROOT / "docs" / "extending.md"
MAX_EXAMPLE_LINES = 29
TOP_FOLDERS = "benchmarks configs docs launch notebooks r3rag_jax tests".split()
RunExample = Callable[[str], None]
ON_PAGES = pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
OVERRIDE = re.compile(r"(?:^|(?<=[\s`]))([a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*)=(\S*)")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(TOP_FOLDERS)})/[\w./-]*")
PLACEHOLDER = re.compile(r"[A-Z_]{2,}|N|…|\*")  # FOLDER, MODEL, N


# ------------------------------------------------------------------------------------ what a page holds


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced code blocks in these languages."""
    return [code for language, code in FENCE.findall(page.read_text("utf-8")) if language in languages]


def spans(page: Path) -> list[str]:
    """The inline code, each on one line."""
    prose = FENCE.sub("", page.read_text("utf-8"))
    return [" ".join(span.split()) for span in SPAN.findall(prose)]


def command_lines(page: Path) -> Iterator[str]:
    """The lines of shell blocks, continued ones joined, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith("#"):
                yield line.partition(" #")[0]


def overrides(page: Path) -> list[tuple[str, str]]:
    """Every key=value of commands and inline code; a variable that a shell line begins with is none."""
    words = [line for line in command_lines(page) if not re.match(r"\w+=", line)] + spans(page)
    return [pair for text in words for pair in OVERRIDE.findall(text.replace("'\"", "").replace('"', ""))]


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ------------------------------------------------------------------------------------ what is named exists


def test_there_is_something_to_check() -> None:
    found = {pair for page in PAGES for pair in overrides(page)}
    assert {("rl.algorithm", "rloo"), ("budget", "cpu"), ("model.path", ""), ("mesh.tensor", "2")} <= found
    assert len(found) > 80
    assert next(command_lines(ROOT / "README.md")).endswith("--config configs/quickstart.yaml")


@ON_PAGES
def test_every_key_exists_and_takes_its_value(page: Path) -> None:
    for name, value in overrides(page):
        assert name in schema(), f"{name}={value}"
        if value and not PLACEHOLDER.search(value):
            place = f"{page.name}: {name}={value}"
            convert(schema()[name], override_node(schema()[name].type, value.strip("'"), place), place)


@ON_PAGES
def test_every_dotted_name_is_a_key(page: Path) -> None:
    sections = {name for name in section_names() if "." not in name}
    for span in spans(page):
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span) and span.split(".")[0] in sections:
            assert span in schema() or span in section_names(), span


@ON_PAGES
def test_recipes_in_a_page_are_recipes(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(block)
        for budget in ["", *yaml.safe_load(block).get("budgets", {})]:
            assert load_config(path, [f"budget={budget}"] if budget else []).budget == budget, block


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=[*PAGE_IDS, *(recipe.name for recipe in RECIPES)])
def test_every_path_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    if page in RECIPES:
        text = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    for found in PATH.findall(text):
        assert (ROOT / found.rstrip(".")).exists(), found


@ON_PAGES
def test_every_relative_link_resolves(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_folders_stand_in_the_order_of_imports() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text("utf-8")
    table = text.partition("| in `r3rag_jax/` |")[2].partition("\n\n")[0]
    listed = [name.rstrip("/").removesuffix(".py") for name in re.findall(r"^\| `([\w./]+)` \|", table, re.MULTILINE)]
    assert listed == [name for name in FOLDERS if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()]
    commands = re.search(r"Entry points.*?: (.*?)\.\n", text)
    assert commands is not None
    named = set(re.findall(r"`(\w+)`", commands[1]))
    assert named == {name for name in ENTRY_POINTS if (PACKAGE / f"{name}.py").is_file()} | {*FOLDER_ENTRY_POINTS}


def test_every_dependency_has_its_reason() -> None:
    core = (ROOT / "setup.py").read_text("utf-8").partition("CORE = [")[2].partition("\n]")[0]
    table = (ROOT / "docs" / "concepts.md").read_text("utf-8").partition("| dependency |")[2]
    named = {name.strip() for cell in re.findall(r"^\| ([\w, -]+) \|", table, re.MULTILINE) for name in cell.split(",")}
    required = set(re.findall(r'^ +"([\w-]+)', core, re.MULTILINE))
    assert required and named - {"---"} == required


def test_the_examples_of_metrics_are_what_the_metrics_say() -> None:
    section = (ROOT / "docs" / "evaluation.md").read_text("utf-8").partition("| prediction | gold answer |")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.partition("\n\n")[0].splitlines()[2:]]
    assert len(rows) == 8
    scores = answer_scores(encode_answers([row[0] for row in rows], [(row[1],) for row in rows]))
    for column, name in enumerate(("em", "f1", "cover_em"), 2):
        np.testing.assert_allclose(scores[name], [float(row[column]) for row in rows], atol=5e-4)
    for prediction, gold, *_, f1_hotpot, sub_em in rows:
        assert hotpot_overlap(prediction, [gold]).f1 == pytest.approx(float(f1_hotpot), abs=5e-4)
        assert contains_characters(prediction, [gold]) == float(sub_em)


def test_every_metric_stands_in_the_table_with_its_definition_and_source() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w@]+)` \| (.*) \| (.*) \| (.*) \|$", text.partition("## Metrics")[2], re.MULTILINE)
    listed = {name: (definition, unit, source) for name, definition, unit, source in rows}
    names = [*METRICS, *RATIOS, "answer_recall@k", "pass@k", "majority@k"]
    assert listed == {name: (m.definition, m.unit, m.source) for name in names for m in [metric_of(name)]}


# ------------------------------------------------------------------------------------ commands and their flags


def commands() -> list[str]:
    """Every call of an entry point or a benchmark, from its name to the end of the command."""
    calls = (
        re.findall(r"(?:-m r3rag_jax\.|(?=benchmarks/\w+\.py))(.+?)(?=$| &&)", text)
        for page in PAGES
        for text in [*command_lines(page), *spans(page)]
    )
    return sorted({call.strip() for found in calls for call in found} - {"<name>"})


def configurations() -> list[tuple[str, tuple[str, ...]]]:
    """Recipe and overrides of every training command, and of keys of algorithms and presets, for any recipe."""
    quickstart = "configs/quickstart.yaml"
    found = []
    for command in commands():
        words = shlex.split(command)
        if words[0] == "train" and "--config" in words:
            recipe = words[words.index("--config") + 1]
            given = tuple(word for word in words[1:] if "=" in word and not word.startswith("-"))
            found.append((quickstart if recipe in ("RECIPE", "FILE") else recipe, given))
    keys = (span.split() for page in PAGES for span in spans(page) if span.startswith("rl.algorithm="))
    found += [(quickstart, tuple(words)) for words in keys if len(words) > 1]
    return found + [(quickstart, (f"rl.preset={name}",)) for name in PRESETS]


@pytest.mark.parametrize(("recipe", "given"), configurations())
def test_every_training_command_is_a_configuration(recipe: str, given: tuple[str, ...]) -> None:
    config = load_config(ROOT / recipe, given)
    assert config.name and not {word.partition("=")[0] for word in given} - {*schema(), "budget"}


def test_every_preset_stands_in_the_table_with_its_source() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([\w+]+)` \|.*?(arXiv [\d.]+)", text, re.MULTILINE))
    for name, source in SOURCES.items():
        arxiv = re.search(r"arXiv [\d.]+", source)
        assert arxiv is not None and rows[name] == arxiv[0]


@functools.cache
def help_of(program: tuple[str, ...]) -> str:
    """What `--help` of an entry point, or of a benchmark and its subcommand, prints."""
    output, before = io.StringIO(), sys.argv
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as exit:
        if program[0].startswith("benchmarks/"):
            sys.argv = [*program, "--help"]
            try:
                runpy.run_path(str(ROOT / program[0]), run_name="__main__")
            finally:
                sys.argv = before
        else:
            main = ".__main__" if program[0] in FOLDER_ENTRY_POINTS else ""
            importlib.import_module(f"r3rag_jax.{program[0]}{main}").main([*program[1:], "--help"])
    assert exit.value.code == 0
    return output.getvalue()


@pytest.mark.parametrize("command", commands())
def test_every_command_has_its_flags(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    words = [word.strip("[]…\\") for word in shlex.split(command)]
    is_action = words[0] == "evaluate" and words[1] in ACTIONS
    help = help_of((words[0], words[1]) if is_action else (words[0],))
    if (choices := re.search(r"\{([\w,]+)\} \.\.\.", help)) and len(words) > 1:
        assert words[1] in choices[1].split(","), command
        help = help_of((words[0], words[1]))
    for flag in (word.partition("=")[0] for word in words if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help), f"{command}: {flag}"


# ------------------------------------------------------------------------------------ messages


@functools.cache
def messages() -> tuple[str, ...]:
    """Every string of the package, with … for what is filled in."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def quoted_messages() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE) + re.findall(r"^\*\*`([^`]+)`", text, re.MULTILINE)


@pytest.mark.parametrize("message", quoted_messages())
def test_every_message_is_one_of_the_package(message: str) -> None:
    """The fixed parts stand in one string of the source, in this order; a hint may be a string of its own."""
    parts = [part.strip() for part in message.split("…") if part.strip(" .:;,")]
    assert sum(map(len, parts)) >= 8, "too little to be recognised by"
    in_order = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    is_there = any(in_order.search(text) for text in messages())
    assert is_there or all(any(part in text for text in messages()) for part in parts), message


# ------------------------------------------------------------------------------------ the examples of extending.md


def example(title: str) -> str:
    """The code under a heading of extending.md."""
    section = EXAMPLES.read_text("utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    [(_, code)] = [block for block in FENCE.findall(section) if block[0] == "python"]
    return code


@pytest.fixture
def run_example() -> Iterator[RunExample]:
    """Executes the example under a heading; what it adds to its table is taken out again afterwards."""
    tables: tuple[dict[str, Any], ...] = (RETRIEVERS, PROCESS_REWARDS, BASELINES, ALGORITHMS, TRACKERS)
    before = [dict(table) for table in tables]

    def run(title: str) -> None:
        exec(compile(example(title), f"{EXAMPLES.name}: {title}", "exec"), {"__name__": "example"})
        assert sum(map(len, tables)) == sum(map(len, before)) + 1

    yield run
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_every_example_is_short_and_is_tested() -> None:
    titles = re.findall(r"^## (.+)$", EXAMPLES.read_text("utf-8"), re.MULTILINE)
    assert titles == ["A retriever", "A reward", "A baseline", "An algorithm", "A tracker"]
    for title in titles:
        lines = [line for line in example(title).splitlines() if line.strip()]
        assert len(lines) <= MAX_EXAMPLE_LINES, title
    assert len(blocks(EXAMPLES, "python")) == len(titles)


PASSAGES = [
    Passage("a", '"Origin"\nOrigin was written by Charles Darwin.'),
    Passage("b", '"Charles Darwin"\nCharles Darwin was born in Shrewsbury.'),
    Passage("c", '"Genesis"\nGenesis is a band.'),
]
QUESTION = Question("q", "Where was the author of Origin born?", ("Shrewsbury",))


def test_the_retriever_answers_through_the_factory(run_example: RunExample, tmp_path: Path) -> None:
    run_example("A retriever")
    config = RetrievalConfig().model_copy(update={"kind": "title"})
    build_index(config, PASSAGES, tmp_path / "index")
    retriever = open_retriever(config, tmp_path / "index")
    found = retriever.search(["Did Charles Darwin write Origin?", "Who wrote Origin?", "who?"], 1)
    assert [[hit.passage for hit in hits] for hits in found] == [[PASSAGES[1]], [PASSAGES[0]], []]
    [both] = retriever.search(["charles darwin and origin"], 5)
    assert [(hit.passage.id, hit.score) for hit in both] == [("b", 14), ("a", 6)]
    build_index(config, PASSAGES[:2], tmp_path / "other")
    assert open_retriever(config, tmp_path / "other").fingerprint != retriever.fingerprint


def test_the_reward_scores_trajectories(run_example: RunExample) -> None:
    run_example("A reward")
    a, b, _ = PASSAGES
    steps = [Step("", query="x", passages=shown) for shown in [(a,), (a, b), (b,), ()]]
    trajectory = Trajectory(QUESTION, (*steps, Step("", answer="Shrewsbury")), Status.ANSWERED)
    config = RewardConfig().model_copy(update={"process": "novelty"})
    scores = Scorer(config, Resources(max_steps=6)).score([trajectory])
    np.testing.assert_array_equal(scores.process, [[1, 0.5, 0, 0, 0, 0]])
    np.testing.assert_allclose(scores.rewards[0], [1.6, 0.8, 0, 0, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("lines", "answer", "num_retrievals"), [([" London"], "London", 0), ([" unknown", " Shrewsbury"], "Shrewsbury", 1)]
)
def test_the_baseline_is_rolled_out(
    run_example: RunExample, tmp_path: Path, lines: list[str], answer: str, num_retrievals: int
) -> None:
    run_example("A baseline")
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer")
    config = Config(
        phases=("index",), rollout=RolloutConfig(max_length=2000, max_new_tokens=8), retrieval=RetrievalConfig(top_k=1)
    )
    waiting = iter(lines)
    backend = FakeBackend(lambda slot, context: tokenizer.encode(next(waiting)))
    retriever: Any = tiny.DictRetriever(PASSAGES)
    [trajectory] = rollout(backend, BASELINES["adaptive"](config, tokenizer), retriever, [RolloutRequest(QUESTION)])
    assert next(waiting, None) is None
    assert (trajectory.status, trajectory.answer) == (Status.ANSWERED, answer)
    assert trajectory.num_retrievals == num_retrievals
    assert trajectory.num_policy_tokens == sum(len(tokenizer.encode(line)) for line in lines)
    prompts = [tokenizer.decode(context.ids) for context in backend.contexts]
    assert [PASSAGES[0].contents in prompt for prompt in prompts] == [False, True][: len(prompts)]


def test_the_algorithm_computes_advantages(run_example: RunExample) -> None:
    """Returns 2 of two tokens, -1 of one; 3 of another question: baselines (4 - 1) / 3 = 1, and 3."""
    run_example("An algorithm")
    table: Any = TrajectoryTable(
        indices=np.array([[0, 1], [2, 9], [3, 9]]),
        rewards=np.array([[0, 2], [-1, 0], [3, 0]], np.float32),
        step_ids=np.zeros((3, 2), np.int32),
        mask=np.array([[1, 1], [1, 0], [1, 0]], bool),
        groups=np.array([0, 0, 1]),
    )
    config = RLConfig(algorithm="rloo", whiten_advantages=False).model_copy(update={"algorithm": "opo"})
    zeros: Any = np.zeros((3, 2), np.float32)
    advantages, _ = estimate(zeros, zeros, table.mask, table, config, 1)
    np.testing.assert_allclose(advantages, [[1, 1], [-2, 0], [0, 0]])
    assert ALGORITHMS["opo"].is_grouped and not ALGORITHMS["opo"].needs_critic


def test_the_tracker_receives_the_metrics_of_a_run(run_example: RunExample, tmp_path: Path) -> None:
    run_example("A tracker")
    trackers = make_trackers(["csv"], tmp_path, {"seed": 3})
    assert list(tmp_path.iterdir()) == []
    with MetricsLog(tmp_path / "metrics.jsonl", trackers) as log:
        log.write("rl", 0, {"reward": 0.5})
        log.write("rl", 1, {"reward": 0.75})
    trackers[0].trajectories(1, [{"id": "q"}, {"id": "r"}])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [line for line in lines if "time_s" not in line] == [
        "0,rl/reward,0.5",
        "1,rl/reward,0.75",
        "1,trajectories,2",
    ]
