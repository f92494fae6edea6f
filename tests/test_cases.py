"""Inputs that other systems get wrong, one folder a case, each with what is right.

The folder is not part of the repository: R3RAG_CASES names it, or it lies beside the checkout. Every case also has a
test of its kind, with inputs of its own, in the folder of its module.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3rag_jax import evaluate, train
from r3rag_jax.config import RewardConfig
from r3rag_jax.config.renamed import RENAMED
from r3rag_jax.data.questions import read_passages
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.rewards.answer import answer_scores, encode_answers
from r3rag_jax.rewards.base import Resources, RewardTerm
from r3rag_jax.rewards.scorer import Scorer
from r3rag_jax.rewards.terms import PROCESS_REWARDS
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.transcript import Codec, Transcript
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

CASES = Path(os.environ.get("R3RAG_CASES", Path(__file__).parents[2] / "shared" / "cases"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir(), reason=f"needs the folder of cases, $R3RAG_CASES; got {CASES}"),
]
Capture = pytest.CaptureFixture[str]


def recipe(out: Path, name: str) -> Path:
    """One of the cases' recipes, with the keys that replaced its own."""
    lines = (CASES / "_common" / f"{name}.yaml").read_text().replace("$CASES", str(CASES)).splitlines()
    values = dict(line.split(": ", 1) for line in lines if line)
    path = out / f"{name}.yaml"
    path.write_text("".join(f"{RENAMED.get(key, key)}: {value}\n" for key, value in values.items()))
    return path


def status_of(main: Any, argv: Sequence[str]) -> int:
    try:
        return main([str(word) for word in argv])
    except SystemExit as exit:
        return int(str(exit.code))


def trained(out: Path, recipe_name: str, run: str, *overrides: str) -> int:
    return status_of(train.main, ["--config", recipe(out, recipe_name), f"run_dir={out / run}", *overrides])


def evaluated(run: Path, *words: Any) -> int:
    return status_of(evaluate.main, ["--checkpoint", run, *words])


def error_of(capsys: Capture) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of RL from a tiny cold start; tests that add to it take a copy."""
    out = tmp_path_factory.mktemp("same_name")
    assert trained(out, "rl", "same_name", "phases=index,rl") == 0
    return out / "same_name"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "same_name")


QUICKSTART = Path(os.environ.get("R3RAG_QUICKSTART", Path(__file__).parents[1] / "runs" / "quickstart"))


@pytest.mark.skipif(not QUICKSTART.is_dir(), reason=f"needs a finished quickstart, $R3RAG_QUICKSTART; got {QUICKSTART}")
def test_context_full_is_format_error(tmp_path: Path, capsys: Capture) -> None:
    """A step that a short context cuts off is none that is malformed, and the limits are warned of."""
    run = shutil.copytree(QUICKSTART, tmp_path / "qs")
    words = ["--questions", CASES / "context_full_is_format_error" / "q60.jsonl", "retrieval.top_k=8"]
    counts = {}
    for length in (480, 2048):
        settings = ["retrieval.max_passages=40", f"rollout.max_length={length}", "--name", f"L{length}"]
        assert evaluated(run, *words, *settings) == 0
        rows = rows_of(run / "trajectories" / f"L{length}.jsonl")
        counts[length] = [sum(row["status"] == name for row in rows) for name in ("CONTEXT_FULL", "FORMAT_ERROR")]
        assert ("rollout.max_length" in capsys.readouterr().out) == (length == 480)
    assert counts[480][0] > 20 > counts[480][1] and counts[2048][0] == 0


def test_corpus_changed(tmp_path: Path, capsys: Capture) -> None:
    data = shutil.copytree(CASES / "_common" / "data", tmp_path / "d")
    for file in data.iterdir():
        file.chmod(0o644)
    settings = [f"data.dir={data}", "phases=index,rl,eval", "eval.systems=r3rag"]
    assert trained(tmp_path, "rl", "run", *settings) == 0
    shutil.copy(CASES / "corpus_changed" / "corpus.jsonl", data / "corpus.jsonl")
    capsys.readouterr()
    assert trained(tmp_path, "rl", "run", *settings) == 2
    assert "corpus" in error_of(capsys)


def test_disjoint_by_id(tmp_path: Path, capsys: Capture) -> None:
    folder = CASES / "disjoint_by_id"
    settings = [f"data.sft={folder / 'sft_2wiki.jsonl'}", f"data.rl={folder / 'rl_hotpotqa.jsonl'}"]
    assert trained(tmp_path, "files", "run", *settings, "data.disjoint=true", "phases=index,rl", "rl.iterations=1",
                   "sft.epochs=1", "rewards.use_process=false") == 0  # fmt: skip
    import tiny_run

    components = tiny_run.open_components(tmp_path / "run")
    assert len(components.dataset.questions("rl")) == 12


def test_eval_prompt_stale(tmp_path: Path, capsys: Capture) -> None:
    settings = ["phases=index,eval", "eval.systems=closed_book"]
    assert trained(tmp_path, "rl", "run", *settings) == 0
    capsys.readouterr()
    assert trained(tmp_path, "rl", "run", *settings, "eval.prompt=chat") == 0
    assert "done before" not in capsys.readouterr().out.split("eval")[-1]
    fingerprint = json.loads((tmp_path / "run" / "eval" / "closed_book.json").read_text())["fingerprint"]
    assert fingerprint["eval.prompt"] == "chat"


def test_evaluate_rl_jsonl(run: Path, tmp_path: Path) -> None:
    before = (run / "trajectories" / "rl.jsonl").read_bytes()
    questions = CASES / "evaluate_rl_jsonl" / "rl.jsonl"
    assert evaluated(run, "--questions", questions) == 0
    assert (run / "trajectories" / "rl.jsonl").read_bytes() == before
    assert (run / "eval" / "evaluate_rl_jsonl-rl.json").exists()
    (run / "trajectories" / "rl.jsonl").unlink()
    shutil.rmtree(run / "policy" / "rl")
    assert trained(tmp_path, "rl", "same_name", "phases=index,rl") == 0


def test_f1_yes_no() -> None:
    """As the README of the metrics says: SQuAD's F1, which HotpotQA's sets to 0 where one side is yes or no."""
    scores = answer_scores(encode_answers(["yes it is", "no, he was not"], [("yes",), ("no",)]))
    np.testing.assert_allclose(scores["f1"], [0.5, 0.4], atol=1e-3)
    docs = Path(__file__).parents[1] / "docs"
    assert any("yes" in (text := page.read_text()) and "HotpotQA" in text for page in docs.glob("*.md"))


@pytest.mark.parametrize(
    ("name", "is_read"),
    [("answer", True), ("array", True), ("bom", True), ("gz", True), ("metadata_list", True), ("number", True),
     ("string", True)],
)  # fmt: skip
def test_file_forms(name: str, is_read: bool, run: Path, tmp_path: Path, capsys: Capture) -> None:
    [path] = (CASES / "file_forms").glob(f"{name}.*")
    if name == "gz" and path.read_bytes()[:2] != b"\x1f\x8b":
        path = tmp_path / "gz.jsonl"
        path.write_bytes(gzip.compress((CASES / "file_forms" / "string.jsonl").read_bytes()))
    status = evaluated(run, "--questions", path)
    if status == 0:
        assert is_read
        return
    assert not is_read
    assert f"{path.name}:1: " in error_of(capsys)


def test_gold_without_ids(tmp_path: Path, capsys: Capture) -> None:
    assert trained(tmp_path, "rl", "run", "phases=index,rl", f"data.rl={CASES / 'gold_without_ids' / 'rl.jsonl'}") == 2
    error = error_of(capsys)
    assert "supporting_ids" in error and "rewards.process=" in error and "rewards.use_process=false" in error


def test_hf_directory(tmp_path: Path, capsys: Capture) -> None:
    common = CASES / "_common"
    words = ["--questions", common / "data" / "test.jsonl", "--corpus", common / "data" / "corpus.jsonl"]
    settings = ["rollout.protocol=tags", f"run_dir={tmp_path / 'published'}", "retrieval.encoder.dim=256"]
    assert evaluated(common / "policy_tags", *words, *settings) == 0
    assert "EM" in capsys.readouterr().out


def test_long_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a passage of nearly two million characters a few thousand are encoded, for the same ids."""
    codec, lengths = Codec(Tokenizer(CASES / "_common" / "base"), make_protocol("tags"), 12), []

    def count(name: str) -> None:
        method = getattr(Tokenizer, name)

        def counted(self: Tokenizer, text: str, *args: Any, **options: Any) -> Any:
            lengths.append(len(text))
            return method(self, text, *args, **options)

        monkeypatch.setattr(Tokenizer, name, counted)

    count("encode")
    count("encoding")
    text = "The river runs past the old mill and then on. "
    ids = [codec.passage_ids([Passage("1", '"Big"\n' + text * count)]) for count in (100, 40_000)]
    assert ids[0] == ids[1]
    assert 0 < max(lengths) < 10_000


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_overlong_question(on_error: str, tmp_path: Path, run: Path, capsys: Capture) -> None:
    path = CASES / "overlong_question" / "rl.jsonl"
    settings = [f"data.rl={path}", "rl.iterations=3", f"data.on_error={on_error}"]
    status = trained(tmp_path, "rl", "run", "phases=index,rl", *settings)
    captured = capsys.readouterr()
    said = captured.err if on_error == "stop" else captured.out
    assert status == (2 if on_error == "stop" else 0)
    assert "rl.jsonl:" in said and "rollout.max_length" in said
    if on_error == "stop":
        assert evaluated(run, "--questions", path) == 2
        assert "rollout.max_length" in error_of(capsys)


@pytest.mark.parametrize("override", ["rollout.slots=4", "model.micro_tokens=512"])
def test_resume_fewer_slots(override: str, run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert trained(tmp_path, "rl", "same_name", "phases=index,rl", override) == 0
    assert "All is done" in capsys.readouterr().out


def test_same_file_name(run: Path) -> None:
    for folder in ("hotpotqa", "2wiki"):
        assert evaluated(run, "--questions", CASES / "same_file_name" / folder / "dev.jsonl") == 0
    assert (run / "eval" / "hotpotqa-dev.json").exists() and (run / "eval" / "2wiki-dev.json").exists()


def test_same_question_twice(tmp_path: Path) -> None:
    settings = [f"data.rl={CASES / 'same_question_twice' / 'rl.jsonl'}", "rollout.temperatures=[1.0]"]
    assert trained(tmp_path, "rl", "run", "phases=index,rl", *settings, "log.trajectories=8") == 0
    rows = rows_of(tmp_path / "run" / "trajectories" / "rl.jsonl")
    texts = [json.dumps(row["steps"]) for row in rows]
    assert len(rows) == 8 and len(set(texts)) > 6


def test_several_eos(tmp_path: Path, capsys: Capture) -> None:
    folder = CASES / "several_eos"
    words = ["--questions", folder / "questions.jsonl", "--corpus", folder / "run" / "index" / "passages.jsonl"]
    settings = {"rollout.protocol": "steps", "rollout.max_steps": 3, "rollout.max_new_tokens": 96,
                "rollout.max_length": 320, "retrieval.encoder.dim": 256, "retrieval.top_k": 1,
                "retrieval.passage_tokens": 12, "run_dir": tmp_path / "out"}  # fmt: skip
    words += [f"{key}={value}" for key, value in settings.items()]
    assert evaluated(folder / "run" / "policy" / "sft", *words, "--name", "x") == 0
    assert json.loads((tmp_path / "out" / "eval" / "x.json").read_text())["groups"]["all"]["em"] == 100


@pytest.mark.parametrize("protocol", ["tags", "steps"])
def test_sft_steps_not_readable(protocol: str, tmp_path: Path, capsys: Capture) -> None:
    path = CASES / "sft_steps_not_readable" / "sft.jsonl"
    corpus = {passage.id: passage for passage in read_passages(CASES / "_common" / "data" / "corpus.jsonl")}
    codec = Codec(Tokenizer(CASES / "_common" / "base"), make_protocol(protocol), 12)
    unreadable = [
        trajectory
        for trajectory in read_trajectories(path, corpus, 2)
        if (step := trajectory.steps[0]) and codec.parse_step(codec.step_ids(step, 1), 1).query != step.query
    ]
    assert unreadable
    settings = [f"data.sft={path}", f"rollout.protocol={protocol}", "phases=index,sft", "sft.epochs=1"]
    assert trained(tmp_path, "files", "run", *settings) == 2
    assert "sft.jsonl:" in (error := error_of(capsys)) and "step 1" in error


@pytest.mark.parametrize("name", ["rl_null", "test_int", "test_str"])
def test_supporting_ids_types(name: str, run: Path, tmp_path: Path, capsys: Capture) -> None:
    path = CASES / "supporting_ids_types" / f"{name}.jsonl"
    if name == "rl_null":  # null is missing, and then no question has evidence
        assert trained(tmp_path, "rl", "run", "phases=index,rl", f"data.rl={path}") == 2
        assert "supporting_ids" in error_of(capsys)
        return
    assert evaluated(run, "--questions", path) == 2
    assert f"{name}.jsonl:1: metadata.supporting_ids must be a list of ids" in error_of(capsys)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer_eos_notin", ("eos_token",)),
        ("tokenizer_no_eos", ("eos_token",)),
        ("tokenizer_no_template", ("model.chat_template", "chatml", "llama3")),
        ("vocab_overflow", ("1023", "1000", "--add-tags")),
    ],
)
def test_tokenizers(name: str, words: tuple[str, ...], tmp_path: Path, capsys: Capture) -> None:
    settings = [f"model.path={CASES / name / 'model'}", "phases=index,sft", "sft.epochs=1"]
    assert trained(tmp_path, "files", "run", *settings) == 2
    error = error_of(capsys).replace(",", "")
    assert all(word in error for word in words), error


def test_template_hides_question() -> None:
    """Its template goes through the parts of a message; the question stands where the user's message does."""
    codec = Codec(Tokenizer(CASES / "template_hides_question" / "model"), make_protocol("tags"), 12)
    prompt = codec.tokenizer.decode(Transcript(codec, "Who wrote Origin?").context)
    assert prompt == "<|im_start|>user\nThe question: Who wrote Origin?<|im_end|>\n<|im_start|>assistant"


def test_parity_of_prompts_and_parser() -> None:
    protocol = make_protocol("steps")
    for case in json.loads((CASES / "parity" / "steps_parser.json").read_text()):
        number = next((int(text) for text in ("12", "11", "2") if f"Step {text}:" in case["text"][:9]), 1)
        step = protocol.parse_step(case["text"], 1 if case["case"] == "step 11 parsed as 1" else number)
        kind = "bad" if not step.is_well_formed else "query" if step.query is not None else "answer"
        if case["released_rl"][0] == case["released_eval"][0] == "bad":
            assert kind in ("bad", case["ours"][0]), case["case"]
        if case["case"] in ("empty query then answer", "header same line"):
            assert kind == "bad", case["case"]


def test_parity_of_rewards() -> None:
    """`compat: paper` against the rewards of the released code, which each row ends with."""
    question = Question("q", "?", ("x",))
    for name, (process, _, _, released) in json.loads((CASES / "parity" / "reward_paper.json").read_text()).items():
        steps = [Step("", query=f"{k}") for k in range(len(process))] or [Step("", is_well_formed=False)]
        status = Status.NO_ANSWER if process else Status.FORMAT_ERROR
        config = RewardConfig(compat="paper", use_process="'orm'" not in name, use_outcome="'prm'" not in name)
        relevance = np.asarray([process or [0.0]], np.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PROCESS_REWARDS, "gold", RewardTerm(lambda *_, found=relevance: found))
            trajectory = Trajectory(question, tuple(steps), status)
            [rewards] = Scorer(config, Resources(len(steps))).score([trajectory]).rewards
        np.testing.assert_allclose(rewards, released, rtol=1e-6, err_msg=name)
