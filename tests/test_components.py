"""The run directory's protection, and the parts that every entry point builds from a configuration."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import tiny_run
from flax import nnx

from r3rag_jax.components import Components
from r3rag_jax.config import (
    Config,
    ConfigError,
    DataConfig,
)
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import read_passages, read_questions
from r3rag_jax.data.records import Records
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.errors import UserError
from r3rag_jax.experiment import PHASES
from r3rag_jax.models.hf.decoder_files import load_decoder
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.run.directory import open_run
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.training.requests import QuestionDraws
from r3rag_jax.training.sft import make_batches
from r3rag_jax.types import Status

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def flat(params: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(params))]


def test_the_compile_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        use_compile_cache()
        assert jax.config.jax_compilation_cache_dir == before  # JAX_COMPILATION_CACHE_DIR wins
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        use_compile_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "r3rag_jax" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_cold_start_takes_steps_that_can_be_read_back(finished: Callable[[str], Path], monkeypatch: Any) -> None:
    components = tiny_run.open_components(finished("tags"))
    found = components.dataset.trajectories()
    components.sft_parts  # noqa: B018  # all can
    step = dataclasses.replace(found[1].steps[0], analysis="an answer is in <answer>")
    items = [found[0], dataclasses.replace(found[1], steps=(step, *found[1].steps[1:])), *found[2:]]
    broken = Records(found.path, zip(found.lines, items, strict=True))
    monkeypatch.setattr(components.dataset, "trajectories", lambda: broken)
    with pytest.raises(UserError, match=rf"{re.escape(str(found.path))}:2: step 1 must be read back"):
        components.sft_parts  # noqa: B018


# ------------------------------------------------------------------------------------------ model


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Config:
    return tiny_run.config(tmp_path, base)


def components(config: Config, *sizes: int, **model: str) -> Components:
    mesh = tiny.mesh_config(*sizes) if sizes else config.mesh
    changed = config.replace(mesh=mesh, model=config.model.replace(**model))
    return Components(changed, config.run_directory)


def test_the_base_is_what_the_file_holds_on_every_mesh(config: Config, base: Path) -> None:
    want = flat(nnx.split(load_decoder(base, dtype="float32"))[1])
    for sizes in ((8, 1, 1), (1, 4, 2)):
        params = components(config, *sizes).policy.base_params()
        for got, leaf in zip(flat(params), want, strict=True):
            np.testing.assert_array_equal(got, leaf)
    shapes = {shard.data.shape for shard in params["layers"]["q_proj"][...].addressable_shards}
    assert shapes == {(2, 8, 16)}  # [2, 32, 32] over fsdp 4 and tensor 2


def test_random_parameters_depend_on_the_seed_and_not_on_the_mesh(config: Config) -> None:
    one, other = (
        flat(components(config, *sizes, init="random").policy.base_params()) for sizes in ((8, 1, 1), (1, 4, 2))
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    reseeded = flat(components(config.replace(seed=1), init="random").policy.base_params())
    pretrained = flat(components(config).policy.base_params())
    for different in (one, pretrained):  # the tiny base may be what seed 0 draws
        assert any(not np.array_equal(a, b) for a, b in zip(reseeded, different, strict=True))


def test_a_phases_policy_is_exported_whole_and_read_back_on_another_mesh(config: Config) -> None:
    run_dir = open_run(config).path
    writer = components(config, 1, 4, 2)
    params = jax.tree.map(lambda x: x + 0.123456789, writer.policy.base_params())
    writer.policy.save(writer.run.policy("sft"), params)
    assert [path.name for path in (run_dir / "policy").iterdir()] == ["sft"]
    read = components(config, 8, 1, 1).policy.load(writer.run.policy("sft"))
    for a, b in zip(flat(read), flat(params), strict=True):
        np.testing.assert_array_equal(a, b)  # float32: nothing is rounded
    whole = tiny_run.files(run_dir / "policy" / "sft")
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert sorted(whole) == ["SHA256SUMS", *names]
    assert json.loads(whole["generation_config.json"]) == {"eos_token_id": 2, "pad_token_id": 0}


def test_what_generation_is_told_goes_with_the_policy(config: Config, base: Path, tmp_path: Path) -> None:
    source = shutil.copytree(base, tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.6}')
    writer = components(config, path=str(source))
    writer.policy.save(writer.run.policy("sft"), writer.policy.base_params())
    written = json.loads((writer.run.policy("sft") / "generation_config.json").read_text())
    assert written == {"pad_token_id": 0, "eos_token_id": [2, 0], "temperature": 0.6}


def test_a_tokenizer_without_the_tags_is_the_users_to_fix(config: Config, base: Path, tmp_path: Path) -> None:
    source = shutil.copytree(base, tmp_path / "source")
    tiny.tokenizer(source, (*tiny.SPECIALS[:3], "<think>"))
    with pytest.raises(UserError, match=r"source lacks </think> <query> .*convert .*/source OUT --add-tags$"):
        _ = components(config, path=str(source)).codec
    steps = config.replace(rollout=config.rollout.replace(protocol="steps"))
    assert components(steps, path=str(source)).codec.protocol.name == "steps"


def test_a_tokenizer_that_cannot_end_a_text_is_the_users_to_fix(config: Config, base: Path, tmp_path: Path) -> None:
    """Before anything is trained or a run directory exists, and with the file and the key in one sentence."""
    file = shutil.copytree(base, tmp_path / "source") / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for changes, rule in (
        ({"eos_token": None}, "tokenizer_config.json must name an eos_token"),
        ({"eos_token": "</s>"}, "eos_token of tokenizer_config.json must be a token of tokenizer.json; got '</s>'"),
        ({"pad_token": "<pad>"}, "pad_token of tokenizer_config.json must be a token of tokenizer.json; got '<pad>'"),
        ({"chat_template": None}, "it must have a chat template, .*: model.chat_template=chatml or llama3"),
    ):
        file.write_text(json.dumps(settings | changes))
        with pytest.raises(UserError, match=rf"the model at {file.parent} cannot be read: .*{rule}"):
            _ = components(config, path=str(file.parent)).memory_plans
    assert components(config, path=str(file.parent), chat_template="chatml").codec.turn_end_id == 2
    with pytest.raises(
        ConfigError, match=r"chat_template=llama3 needs a tokenizer with .* lacks <\|start_header_id\|>"
    ):
        _ = components(config, path=str(file.parent), chat_template="llama3").codec


def test_a_tokenizer_with_more_ids_than_the_table_has_rows_is_refused(
    config: Config, base: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(base, tmp_path / "source")
    tokenizer = Tokenizer(source)
    tokenizer.add_special_tokens(["[more]"])
    tokenizer.save(source)
    rule = "must have ids below 1024, the number of rows of the embedding table; it has ids up to 1024: .*--add-tags"
    with pytest.raises(UserError, match=rf"the model at {source} cannot be read: the tokenizer {rule}"):
        _ = components(config, path=str(source)).memory_plans


def test_a_model_path_without_a_model_is_the_users_to_fix(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path must be a Hugging Face directory .* got .*/nothing"):
        _ = components(config, path=str(tmp_path / "nothing")).policy.base_path


# ------------------------------------------------------------------------------------------- data


def test_the_worlds_files_fit_together(config: Config) -> None:
    writer = Components(config, open_run(config))
    PHASES["index"](writer)
    data = config.run_directory / "data"
    corpus = {passage.id: passage for passage in read_passages(data / "corpus.jsonl")}
    for split in ("rl", "dev", "test"):
        assert writer.dataset.questions(split) == read_questions(data / f"{split}.jsonl")
        assert len(writer.dataset.questions(split)) == getattr(config.world, f"num_{split}")
    trajectories = read_trajectories(data / "sft.jsonl", corpus, config.retrieval.top_k)
    assert len(trajectories) == config.world.num_sft
    for trajectory in trajectories:
        assert trajectory.status == Status.ANSWERED
        assert set(trajectory.question.supporting_ids) <= set(trajectory.retrieved_ids)
    reader = Components(config, config.run_directory)
    [hits] = reader.retriever.search([corpus["5"].contents], 3)
    assert hits[0].passage == corpus["5"] and len(hits) == 3
    assert reader.retriever.fingerprint == Components(config, config.run_directory).retriever.fingerprint


def test_files_need_not_be_given_for_what_is_only_watched(config: Config, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"id": 7, "question": "Who?", "golden_answers": ["x"]}\n')
    data = DataConfig(source="files", corpus="c.jsonl", test=str(tmp_path / "test.jsonl"))
    files = config.replace(phases=("eval",), data=data)
    assert Components(files, tmp_path).dataset.questions("dev") == []
    assert [question.id for question in Components(files, tmp_path).dataset.questions("test")] == ["7"]
    assert Components(files, tmp_path).dataset.path_of("corpus") == Path("c.jsonl")


def files_of_ones_own(config: Config, directory: Path, **keys: Any) -> Config:
    """Ten passages and questions, a trajectory for the first six, in one folder."""
    contents = [f'"Door {i}"\nDoor {i} was made by Person {i}.' for i in range(10)]
    questions = [{"id": f"q{i}", "question": f"Who made {i}?", "golden_answers": [f"Person {i}"]} for i in range(10)]

    def steps(i: int) -> list[dict[str, Any]]:
        query = {"analysis": "I need the maker.", "query": f"Who made door {i}?", "passage_ids": [str(i)]}
        return [query | {"retrieved_ids": [str(9 - i), str(i)]}, {"analysis": "Known.", "answer": f"Person {i}"}]

    write_jsonl(directory / "corpus.jsonl", [{"id": str(i), "contents": text} for i, text in enumerate(contents)])
    write_jsonl(directory / "train.jsonl", questions)
    write_jsonl(
        directory / "taught.jsonl", [question | {"steps": steps(i)} for i, question in enumerate(questions[:6])]
    )
    data = DataConfig(
        source="files", dir=str(directory), corpus="corpus.jsonl", sft="taught.jsonl", rl="train.jsonl", **keys
    )
    return config.replace(phases=("index", "sft", "rl"), data=data)


def test_rl_leaves_out_the_questions_that_the_cold_start_drew(config: Config, tmp_path: Path) -> None:
    few = files_of_ones_own(config, tmp_path / "data", num_sft=4)
    one = Components(few, open_run(few))
    PHASES["index"](one)
    used = [trajectory.question.id for trajectory in one.dataset.trajectories()]
    assert len(used) == 4 and set(used) < {f"q{i}" for i in range(6)}
    assert [question.id for question in one.dataset.questions("rl")] == [
        f"q{i}" for i in range(10) if f"q{i}" not in used
    ]
    reseeded = Components(few.replace(seed=3), one.run.path)
    assert [trajectory.question.id for trajectory in reseeded.dataset.trajectories()] != used
    shared = few.replace(data=few.data.replace(disjoint=False))
    assert len(Components(shared, one.run.path).dataset.questions("rl")) == 10
    later = few.replace(phases=("rl",))  # the cold start was a command of its own
    assert len(Components(later, one.run.path).dataset.questions("rl")) == 6
    alone = few.replace(phases=("index", "rl"), data=few.data.replace(sft=""))
    assert len(Components(alone, one.run.path).dataset.questions("rl")) == 10


def test_data_that_leaves_nothing_or_holds_too_little_is_the_users_to_fix(config: Config, tmp_path: Path) -> None:
    every = files_of_ones_own(config, tmp_path / "data")
    every = every.replace(data=every.data.replace(rl="taught.jsonl"))
    one = Components(every, open_run(every))
    PHASES["index"](one)
    with pytest.raises(UserError, match=r"data.disjoint leaves no question for RL: all of .*taught.jsonl"):
        one.dataset.questions("rl")
    many = every.replace(data=every.data.replace(num_sft=7))
    with pytest.raises(UserError, match=r"data.num_sft must be at most 6, what .*taught.jsonl holds; got 7"):
        Components(many, one.run.path).dataset.trajectories()


def test_array_record_files_hold_what_memory_holds(config: Config, tmp_path: Path) -> None:
    in_memory = files_of_ones_own(config, tmp_path / "data", num_sft=4)
    stored = in_memory.replace(data=in_memory.data.replace(storage="array_record"))
    one = Components(in_memory, open_run(in_memory))
    PHASES["index"](one)
    other = Components(stored, one.run.path)
    assert other.dataset.trajectories().is_stored and other.dataset.questions("rl").is_stored
    assert other.dataset.trajectories() == one.dataset.trajectories()
    assert other.dataset.questions("rl") == one.dataset.questions("rl")
    draws = [QuestionDraws(c.config, c.dataset.questions("rl")) for c in (one, other)]
    requests = [[found.requests(i) for i in range(4)] for found in draws]
    assert requests[0] == requests[1]
    replaced = [found.replacements(2, 1, 3, {"q1", "q7"}) for found in draws]
    assert replaced[0] == replaced[1] and len(replaced[0]) > 3
    for a, b in zip(make_batches(in_memory, one.sft_parts), make_batches(stored, other.sft_parts), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_is_left_out_is_in_the_provenance(config: Config, tmp_path: Path) -> None:
    skipping = files_of_ones_own(config, tmp_path / "data", on_error="skip", disjoint=False)
    path = tmp_path / "data" / "train.jsonl"
    path.write_text(path.read_text() + "{\n[]\n")
    one = Components(skipping, open_run(skipping))
    PHASES["index"](one)
    before = one.provenance("rl")
    assert "left_out" not in before and len(one.dataset.questions("rl")) == 10
    assert one.provenance("rl") == before | {"left_out": f"2 records of {path}"}


def test_rl_by_gold_passages_needs_questions_that_name_some(config: Config, tmp_path: Path) -> None:
    none = files_of_ones_own(config, tmp_path / "data", disjoint=False)
    one = Components(none, open_run(none))
    PHASES["index"](one)
    with pytest.raises(UserError, match=r"train\.jsonl: rewards\.process=gold needs .*; none of 10 questions has any"):
        _ = one.rl_parts


def test_refreshing_places_what_is_wrong_with_the_trajectories(config: Config, tmp_path: Path) -> None:
    again = files_of_ones_own(config, tmp_path / "data", refresh_retrieved=True)
    with (tmp_path / "data" / "taught.jsonl").open("a") as file:
        file.write('{"id": "q9", "question": "Who?", "golden_answers": ["x"]}\n')
    with pytest.raises(UserError, match=r"taught.jsonl:7: expected a field 'steps'"):
        PHASES["index"](Components(again, open_run(again)))


def test_refreshing_brings_this_runs_passages_and_keeps_what_a_step_needs(config: Config, tmp_path: Path) -> None:
    again = files_of_ones_own(config, tmp_path / "data", refresh_retrieved=True)
    one = Components(again, open_run(again))
    PHASES["index"](one)
    assert one.dataset.path_of("sft") == one.run.path / "data" / "sft.jsonl"
    for number, trajectory in enumerate(one.dataset.trajectories()):
        [found] = one.retriever.search([trajectory.steps[0].query or ""], again.retrieval.top_k)
        shown = [passage.id for passage in trajectory.steps[0].passages]
        assert str(number) in shown and len(shown) == again.retrieval.top_k
        assert set(shown) <= {str(number), *(hit.passage.id for hit in found)}


def test_an_evaluation_takes_the_first_questions(finished: Callable[[str], Path]) -> None:
    every, first = (
        tiny_run.open_components(finished("tags"), f"eval.max_questions={count}").eval_questions() for count in (0, 1)
    )
    assert len(every) == 4 and list(first) == every[:1]
