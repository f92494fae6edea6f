"""Configuration and user errors: strict in, equal out, one line per error."""

import ast
import dataclasses
import pathlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3rag_jax.config import loader as configio
from r3rag_jax.config.loader import help_text, load_config, parse_args, to_yaml
from r3rag_jax.config.schema import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    JudgeConfig,
    MeshConfig,
    RewardConfig,
    RLConfig,
    RolloutConfig,
)
from r3rag_jax.errors import UserError, main_guard

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes `x.yaml` into a fresh working directory and returns its relative path."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str) -> Path:
        Path("x.yaml").write_text(text, encoding="utf-8")
        return Path("x.yaml")

    return write_text


def error_of(path: str | Path, *overrides: str) -> str:
    """The message of the ConfigError that loading raises; always one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- values


def test_a_file_sets_its_keys_and_leaves_the_rest_at_the_defaults(write: Write) -> None:
    path = write("name: small\nphases: [index, eval]\nrl:\n  clip: 0.3\n  critic: head\n")
    config = load_config(path)
    assert config == dataclasses.replace(
        Config(), name="small", phases=("index", "eval"), rl=RLConfig(clip=0.3, critic="head")
    )
    assert hash(config) == hash(load_config(path))


def test_dotted_keys_stand_for_nested_ones(write: Write) -> None:
    assert load_config(write("rl.clip: 0.3\n")) == load_config(write("rl: {clip: 0.3}\n"))


def test_overrides_win_over_the_file_and_the_last_wins_over_the_first(write: Write) -> None:
    path = write("seed: 1\nrl: {clip: 0.3}\n")
    config = load_config(path, ["rl.clip=0.4", "rl.lam=0.9", "rl.clip=0.5"])
    assert (config.seed, config.rl.clip, config.rl.lam) == (1, 0.5, 0.9)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E+2", 100.0), ("3", 3.0), (".5", 0.5), ("-0.0", 0.0), ("2.", 2.0)],
)
def test_numbers_read_as_they_look_in_files_and_overrides(write: Write, text: str, value: float) -> None:
    # YAML 1.1 reads 1e-4, without a dot, as text; a learning rate must not need the dot.
    from_file = load_config(write(f"rl: {{lr: {text}}}\n")).rl.lr
    from_override = load_config(write("seed: 0\n"), [f"rl.lr={text}"]).rl.lr
    assert (from_file, from_override) == (value, value)
    assert type(from_file) is type(from_override) is float


@pytest.mark.parametrize("text", ["[0.1,0.4]", "0.1,0.4", "[0.1, 0.4]", "0.1, 4e-1"])
def test_list_overrides_with_and_without_brackets(write: Write, text: str) -> None:
    config = load_config(write("seed: 0\n"), [f"rollout.temperatures={text}"])
    assert config.rollout.temperatures == (0.1, 0.4)


def test_one_word_is_a_list_of_one(write: Write) -> None:
    assert load_config(write("phases: eval\n")).phases == ("eval",)
    assert load_config(write("seed: 0\n"), ["phases=eval"]).phases == ("eval",)
    assert load_config(write("seed: 0\n"), ["rollout.temperatures=1"]).rollout.temperatures == (1,)


def test_text_overrides_are_taken_as_they_stand_for_the_shell_eats_quotes(write: Write) -> None:
    overrides = ["name=2024", "run_dir=out/a: b=c #1", 'data.dev="no"', "data.test="]
    config = load_config(write("data: {test: t.jsonl}\n"), overrides)
    assert (config.name, config.run_dir) == ("2024", "out/a: b=c #1")
    assert (config.data.dev, config.data.test) == ("no", "")


SIZED = "rl: {clip: 0.3}\nseed: 1\nbudgets:\n  cpu: {rl.clip: 0.4, sft: {epochs: 1}}\n  big: {seed: 2}\n"


@pytest.mark.parametrize(
    ("overrides", "clip", "epochs", "seed"),
    [
        ([], 0.3, 3, 1),
        (["budget="], 0.3, 3, 1),
        (["budget=cpu"], 0.4, 1, 1),
        (["budget=big"], 0.3, 3, 2),
        (["rl.clip=0.5", "budget=cpu"], 0.5, 1, 1),
    ],
)
def test_a_budget_changes_its_keys_and_overrides_change_it(
    write: Write, overrides: list[str], clip: float, epochs: int, seed: int
) -> None:
    config = load_config(write(SIZED), overrides)
    assert (config.rl.clip, config.sft.epochs, config.seed) == (clip, epochs, seed)
    assert load_config(write(to_yaml(config))) == config  # the name stays, as a record


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (SIZED, ["budget=tpu"], "override 'budget=tpu': budget must be one of cpu, big; got 'tpu'"),
        (SIZED + "budget: tpu", [], "x.yaml:6: budget must be one of cpu, big; got 'tpu'"),
        (
            "seed: 1",
            ["budget=cpu"],
            "override 'budget=cpu': budget must be empty, for x.yaml has no budgets; got 'cpu'",
        ),
        ("budgets: cpu", [], "x.yaml:1: budgets is one section of named sizes; got 'cpu'"),
        ("budgets: {cpu: 3}", [], "x.yaml:1: a budget is a name with keys and values; got 3"),
        ("budgets: {a: {seed: 1}}\nbudgets: {b: {seed: 1}}", [], "x.yaml:2: budgets is one section of named sizes"),
        ("budgets:\n  a: {seed: 1}\n  a: {seed: 2}", [], "x.yaml:3: repeated budget 'a'"),
        ("budgets:\n  a: {sed: 1}", [], "unknown key 'sed' (x.yaml:2); did you mean 'seed'?"),
        ("budgets:\n  a: {budget: b}", [], "x.yaml:2: a budget must not name a budget; got 'a'"),
        ("budgets:\n  a: {seed: x}", ["budget=a"], "x.yaml:2: seed must be an integer; got 'x'"),
    ],
)
def test_a_wrong_budget_is_named_with_its_line(write: Write, text: str, overrides: list[str], message: str) -> None:
    assert error_of(write(text), *overrides).startswith(message)


def test_run_directory() -> None:
    assert Config(name="a").run_directory == Path("runs/a")
    assert Config(name="a", run_dir="/scratch/b").run_directory == Path("/scratch/b")


# ---------------------------------------------------------------- errors of shape and type


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rl:\n  clp: 1\n", "unknown key 'rl.clp' (x.yaml:2); did you mean 'rl.clip'?"),
        ("rll: {lr: 1}\n", "unknown key 'rll' (x.yaml:1); did you mean 'rl'?"),
        ("rollout: {top_k: 1}\n", "unknown key 'rollout.top_k' (x.yaml:1)"
         "; did you mean 'retrieval.top_k'?"),
        ("qqqqqq: 1\n", "unknown key 'qqqqqq' (x.yaml:1); --help lists all keys"),
        ("seed: 1\nseed: 2\n", "x.yaml:2: repeated key 'seed'; first at x.yaml:1"),
        ("rl:\n  lr: 1\n  lr: 2\n", "x.yaml:3: repeated key 'rl.lr'; first at x.yaml:2"),
        ("rl: {lr: 1}\nrl: {kl: 1}\n", "x.yaml:2: repeated key 'rl'; first at x.yaml:1"),
        ("rl: {lr: 1}\nrl.lr: 2\n", "x.yaml:2: repeated key 'rl.lr'; first at x.yaml:1"),
        ("rl: 3\n", "x.yaml:1: rl is a section and takes keys and values; got 3"),
        ("rl:\n", "x.yaml:1: rl is a section and takes keys and values; got nothing"),
        ("[a]: 3\n", "x.yaml:1: a key must be a name; got a list"),
        ("seed: 1.0\n", "x.yaml:1: seed must be an integer; got 1.0"),
        ("seed: true\n", "x.yaml:1: seed must be an integer; got true"),
        ("seed: 010\n", "x.yaml:1: seed must be an integer; got 010"),
        ("seed: '1'\n", "x.yaml:1: seed must be an integer; got '1'"),
        ("seed:\n", "x.yaml:1: seed must be an integer; got nothing"),
        ("rl: {lr: true}\n", "x.yaml:1: rl.lr must be a finite number; got true"),
        ("rl: {lr: .inf}\n", "x.yaml:1: rl.lr must be a finite number; got .inf"),
        ("rl: {lr: 1e999}\n", "x.yaml:1: rl.lr must be a finite number; got '1e999'"),
        ("rl: {lr: [1]}\n", "x.yaml:1: rl.lr must be a finite number; got a list"),
        ("log: {progress: 1}\n", "x.yaml:1: log.progress must be true or false; got 1"),
        ("name: no\n", "x.yaml:1: name must be text; got no (not text in YAML; quote it)"),
        ("model: {init: q}\n", "x.yaml:1: model.init must be one of pretrained, random; got 'q'"),
        ("model: {remat: ful}\n", "x.yaml:1: model.remat must be one of none, full, dots; got 'ful'"
         "; did you mean 'full'?"),
        ("phases: {a: 1}\n", "x.yaml:1: phases must be a list of names; got keys and values"),
        ("phases: [eval, 3]\n", "x.yaml:1: phases[1] must be text; got 3 (not text in YAML"
         "; quote it)"),
        ("rollout: {temperatures: [1, hot]}\n", "x.yaml:1: rollout.temperatures[1] must be a finite"
         " number; got 'hot'"),
        ("", "x.yaml: expected keys and values; got an empty file"),
        ("# only a comment\n", "x.yaml: expected keys and values; got an empty file"),
        ("- 1\n", "x.yaml:1: expected keys and values; got a list"),
        ("words\n", "x.yaml:1: expected keys and values; got 'words'"),
        ("seed: 1\n---\nseed: 2\n", "x.yaml:2: expected YAML; but found another document"),
        ("seed: 1\nrl: {lr: 1\n", "x.yaml:3: expected YAML; expected ',' or '}'"
         ", but got '<stream end>'"),
        ("seed: *a\n", "x.yaml:1: expected YAML; found undefined alias 'a'"),
    ],
)  # fmt: skip
def test_errors_in_a_file_name_line_key_rule_and_what_came(write: Write, text: str, message: str) -> None:
    assert error_of(write(text)) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.lr=abc", "override 'rl.lr=abc': rl.lr must be a finite number; got 'abc'"),
        ("rl.lr=", "override 'rl.lr=': rl.lr must be a finite number; got nothing"),
        ("rl.lr=1\n2", "override 'rl.lr=1\\n2': rl.lr must be a finite number; got '1 2'"),
        ("seed=1.5", "override 'seed=1.5': seed must be an integer; got 1.5"),
        ("rl.baseline=group", "unknown key 'rl.baseline' (override 'rl.baseline=group'); it is rl.algorithm=rloo now"),
        ("rl.clp=1", "unknown key 'rl.clp' (override 'rl.clp=1'); did you mean 'rl.clip'?"),
        ("rl.lr", "override 'rl.lr': expected key=value; did you mean 'rl.lr=…'?"),
        ("rl=1", "override 'rl=1': rl is a section; expected one of its keys, rl.…=value"),
        ("rl.lr=[1", "override 'rl.lr=[1':1: expected YAML; expected ',' or ']'"
         ", but got '<stream end>'"),
        ("phases=eval,", "override 'phases=eval,': expected a value after the last comma"
         "; got none"),
        ("phases=", "override 'phases=': phases must be a list of names; got nothing"),
        ("model.init=no", "override 'model.init=no': model.init must be one of pretrained, random"
         "; got 'no'"),
    ],
)  # fmt: skip
def test_errors_in_an_override_name_it(write: Write, override: str, message: str) -> None:
    assert error_of(write("seed: 0\n"), override) == message


def test_files_that_cannot_be_read(write: Write) -> None:
    write("seed: 0\n").with_name("deep.yaml").write_text("a: " + "[" * 500)
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    Path("control.yaml").write_bytes(b"name: \x07\n")
    Path("folder").mkdir()
    assert error_of("y.yaml") == "y.yaml: no such file; did you mean x.yaml?"
    assert error_of("none/q") == "none/q: no such file"
    assert error_of("x.yaml/q") == "x.yaml/q: cannot be read: Not a directory"
    assert error_of("folder") == "folder: expected a YAML file; got a directory"
    assert error_of("latin.yaml") == "latin.yaml: expected UTF-8 text; byte 9 is not"
    assert error_of("control.yaml").startswith("control.yaml: expected YAML; ")
    assert error_of("deep.yaml").startswith("deep.yaml: expected YAML of little depth")


# ---------------------------------------------------------------- relations


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["rl.clip=0"], "rl.clip must be above 0; got 0.0"),
        (["rl.batch_rows=0"], "rl.batch_rows must be at least 1; got 0"),
        (["rl.gamma=1.1"], "rl.gamma must be in [0, 1]; got 1.1"),
        (["rl.returns=total"], "rl.returns must be to_go with rl.algorithm=ppo and unless rl.gamma and"
         " rl.step_discount are 1; got total with ppo, 1.0 and 1.0"),
        (["rl.algorithm=grpo", "rl.step_discount=0.5", "rl.returns=total"], "rl.returns must be to_go with"
         " rl.algorithm=ppo and unless rl.gamma and rl.step_discount are 1; got total with grpo, 1.0 and 0.5"),
        (["rl.algorithm=reinforce++", "rl.whiten_advantages=false"], "rl.whiten_advantages must be true when"
         " rl.algorithm is reinforce++, whose baseline it is; got false"),
        (["rl.algorithm=rloo", "rl.std=true"], "rl.std must be false unless rl.algorithm is grpo; got true with rloo"),
        (["rl.draws=2"], "rl.draws must be 1 unless rl.algorithm is grpo or rloo and rl.drop_equal true; got 2 with"
         " ppo and true"),
        (["rl.kl_in=loss"], "rl.kl_estimator must be k2 or k3 when rl.kl_in is loss, for the gradient of k1 is 0 on"
         " average; got k1"),
        (["rl.kl_target=0.1", "rl.kl=0"], "rl.kl must be above 0, what rl.kl_target=0.1 adapts; got 0.0"),
        (["rl.algorithm=grpo", "rollout.samples=1"], "rollout.samples must be at least 2 when rl.algorithm is grpo;"
         " got 1"),
        (["sft.lr=-1"], "sft.lr must be at least 0; got -1.0"),
        (["world.waste=2"], "world.waste must be in [0, 1]; got 2.0"),
        (["seed=-1"], "seed must be in [0, 4294967295]; got -1"),
        (["name=a/b"], "name must be one directory name of letters, digits and _.+-, not led by"
         " a sign; got 'a/b'"),
        (["model.path="], "model.path must be a directory or bundled; got none"),
        (["retrieval.max_passages=1"], "retrieval.max_passages must be at least"
         " retrieval.top_k=2; got 1"),
        (["rollout.max_new_tokens=512"], "rollout.max_new_tokens must be less than"
         " rollout.max_length=512; got 512"),
        (["rollout.temperatures=1,-0.1"], "rollout.temperatures must be one or more numbers of at"
         " least 0; got 1.0, -0.1"),
        (["rollout.temperatures=[]"], "rollout.temperatures must be one or more numbers of at"
         " least 0; got none"),
        (["rl.row_length=511"], "rl.row_length must be at least rollout.max_length=512, for a"
         " trajectory fills one row; got 511"),
        (["rewards.use_process=no", "rewards.use_outcome=no"], "rewards.use_outcome or"
         " rewards.use_process must be true; got false for both"),
        (["phases=rl,sft"], "phases must come in the order index, sft, rl, eval; got rl, sft"),
        (["phases=eval,eval"], "phases must name nothing twice; got eval, eval"),
        (["phases=[]"], "phases must name at least one of index, sft, rl, eval; got none"),
        (["phases=train"], "phases must be among index, sft, rl, eval; got 'train'"),
        (["eval.systems=gpt"], "eval.systems must be among closed_book, oneshot_rag, cold_start,"
         " r3rag; got 'gpt'"),
        (["mesh.data=0"], "mesh.data must be at least 1, or -1 for what is left; got 0"),
        (["mesh.process_id=0"], "mesh.process_id must stay -1 without a mesh.coordinator; got 0"),
        (["mesh.coordinator=a:1"], "mesh.coordinator must be empty unless mesh.distributed is"
         " true; got 'a:1'"),
        (["data.source=files"], "data.corpus must be given when data.source is files; got none"),
        (["rollout.server=localhost:8000"], "rollout.server must be an http(s) URL without user, query"
         " or fragment, e.g. http://localhost:8000/v1; got 'localhost:8000'"),
        (["rollout.server=http://me:secret@h/v1"], "rollout.server must be an http(s) URL without user,"
         " query or fragment, e.g. http://localhost:8000/v1; got 'h/v1'"),
        (["rollout.server=http://h/v1"], "phases must not have rl when rollout.server is given: RL samples"
         " with the policy that it trains; got index, sft, rl, eval"),
        (["phases=eval", "rollout.server=http://h/v1"], "eval.systems must be of one policy, the served"
         " one, when rollout.server is given: closed_book and oneshot_rag, or cold_start, or r3rag; got"
         " closed_book, oneshot_rag, cold_start, r3rag"),
        (["phases=index", "rollout.server=http://h", "mesh.distributed=true"], "mesh.distributed must be"
         " false when rollout.server is given; got true"),
        (["phases=index", "rollout.server=http://h", "rollout.server_extras=false", "rollout.min_p=0.1"],
         "rollout.min_p and rollout.top_k_tokens must be 0 when rollout.server_extras is false; got 0.1 and 0"),
        (["phases=index", "rollout.server=http://h", "rollout.stop_strings=a"],
         "rollout.stop_strings must be none when rollout.server is given; got a"),
        (["rollout.server_retries=-1"], "rollout.server_retries must be at least 0; got -1"),
        (["rollout.server_timeout_s=0"], "rollout.server_timeout_s must be above 0; got 0.0"),
        (["rewards.process=judge"], "judge.url must be given when rewards.process is judge (and judge.kind is"
         " server); got none"),
        (["judge.kind=local", "rewards.outcome=judge"], "judge.model must be given when rewards.outcome is judge"
         " (and judge.kind is local); got none"),
        (["phases=index", "eval.judge=true"], "judge.url must be given when eval.judge is true (and judge.kind is"
         " server); got none"),
        (["judge.url=http://me:secret@h/v1"], "judge.url must be an http(s) URL without user, query or fragment,"
         " e.g. http://localhost:8000/v1; got 'h/v1'"),
        (["judge.kind=local", "judge.url=http://h"], "judge.url must be empty when judge.kind is local; got"
         " 'http://h'"),
        (["judge.kind=local", "judge.key_env=K"], "judge.key_env must be empty when judge.kind is local; got 'K'"),
        (["judge.kind=local", "judge.max_length=256"], "judge.max_tokens must be less than judge.max_length=256;"
         " got 256"),
        (["judge.max_failure_share=1.5"], "judge.max_failure_share must be in [0, 1]; got 1.5"),
        (["judge.max_in_flight=0"], "judge.max_in_flight must be at least 1; got 0"),
        (["rewards.process_weight=-1"], "rewards.process_weight must be at least 0; got -1.0"),
    ],
)  # fmt: skip
def test_broken_relations_name_the_key_and_the_override(write: Write, overrides: list[str], rule: str) -> None:
    # An override is blamed before a line of the file, even where both have a part in the relation.
    path = write("rollout: {max_length: 512}\nretrieval: {top_k: 2}\n")
    assert error_of(path, *overrides) == f"override '{overrides[-1]}': {rule}"


def test_broken_relations_name_the_line_of_the_file_or_else_the_file(write: Write) -> None:
    path = write("seed: 0\nrollout:\n  max_steps: 2\n  max_length: 64\n")
    assert error_of(path).startswith("x.yaml:4: rollout.max_new_tokens must be less than")
    assert error_of(write("seed: 0\nrl: {clip: -1}\n")).startswith("x.yaml:2: rl.clip must be")
    error = ConfigError("a rule over keys that nobody gave", ["rl.lr"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configio, "_build", lambda values: (_ for _ in ()).throw(error))
        assert error_of(write("seed: 0\n")) == "x.yaml: a rule over keys that nobody gave"


def test_a_packed_row_need_not_fit_a_trajectory_when_nothing_packs_it() -> None:
    short = RLConfig(row_length=100)
    assert Config(phases=("sft", "eval"), rl=short).rl.row_length == 100
    with pytest.raises(ConfigError, match=r"rl\.row_length must be at least"):
        Config(phases=("rl",), rl=short)
    assert Config(rl=short, rollout=RolloutConfig(max_length=100)).rl.row_length == 100


@pytest.mark.parametrize(("phase", "name"), [("sft", "sft"), ("rl", "rl"), ("eval", "test")])
def test_files_need_the_paths_of_their_phases_only(phase: str, name: str) -> None:
    data = DataConfig(source="files", corpus="c.jsonl")
    with pytest.raises(ConfigError, match=rf"data\.{name} must be given .* phases has {phase}"):
        Config(data=data, phases=(phase,))
    full = DataConfig(source="files", corpus="c.jsonl", **{name: "q.jsonl"})
    assert Config(data=full, phases=(phase,)).data == full
    assert Config(data=data, phases=("index",)).data == data


@pytest.mark.parametrize("systems", [("closed_book", "oneshot_rag"), ("cold_start",), ("r3rag",)])
def test_a_server_evaluates_the_systems_of_one_policy(systems: tuple[str, ...]) -> None:
    rollout = RolloutConfig(server="https://host:8000/v1")
    config = Config(phases=("index", "eval"), rollout=rollout, eval=EvalConfig(systems=systems))
    assert config.eval.systems == systems


def test_a_judge_is_needed_by_whoever_asks_it() -> None:
    by_judge = RewardConfig(process="judge", outcome="judge")
    assert Config(phases=("sft", "eval"), rewards=by_judge).rewards.needs_judge
    assert Config(rewards=dataclasses.replace(by_judge, use_process=False, outcome="em")).judge.url == ""
    assert Config(rewards=by_judge, judge=JudgeConfig(url="http://h/v1")).judge.is_given
    assert Config(rewards=by_judge, judge=JudgeConfig(kind="local", model="package:x")).judge.is_given
    assert not RewardConfig().needs_judge and not JudgeConfig(model="m").is_given


def test_an_explicit_coordinator_needs_its_rank_and_size() -> None:
    good = MeshConfig(distributed=True, coordinator="h:1", num_processes=2, process_id=1)
    assert good.process_id == 1
    with pytest.raises(ConfigError, match=r"mesh\.process_id must be in \[0, 2\)"):
        dataclasses.replace(good, process_id=2)
    with pytest.raises(ConfigError, match=r"mesh\.num_processes must be at least 1"):
        dataclasses.replace(good, num_processes=0)
    with pytest.raises(ConfigError, match="must be host:port"):
        dataclasses.replace(good, coordinator="h")


# ---------------------------------------------------------------- out again


def test_to_yaml_round_trips_every_kind_of_value(write: Write) -> None:
    config = dataclasses.replace(
        Config(),
        name="1e-4",  # text that looks like a number
        run_dir="no",  # text that YAML 1.1 reads as false
        rl=RLConfig(lr=5e-7, critic="head"),
        rollout=RolloutConfig(temperatures=(0.1, 1.0)),
    )
    assert load_config(write(to_yaml(config))) == config
    assert "temperatures: [0.1, 1.0]\n" in to_yaml(config)


@settings(max_examples=30, deadline=None)
@given(
    run_dir=st.text(st.characters(blacklist_categories=["Cs"]), max_size=20),
    lr=st.floats(0, 1e300, allow_nan=False),
    temperatures=st.lists(st.floats(0, 10), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_values_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    run_dir: str,
    lr: float,
    temperatures: tuple[float, ...],
    seed: int,
) -> None:
    config = Config(
        run_dir=run_dir,
        seed=seed,
        rl=RLConfig(lr=lr),
        rollout=RolloutConfig(temperatures=temperatures),
    )
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_bytes(to_yaml(config).encode())
    assert load_config(path) == config


def test_every_key_has_help_and_stands_in_the_help_text() -> None:
    lines = help_text().splitlines()
    for name, field in configio.schema().items():
        assert field.help and "\n" not in field.help
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(field.help)
    (line,) = [line for line in lines if line.startswith("  rl.value_clip ")]
    assert line.split(maxsplit=4) == ["rl.value_clip", "float", "-", "0.2", "value clip"]
    assert "rl: Policy gradients against the live retriever." in lines


def test_columns_of_a_section_are_aligned() -> None:
    for block in help_text().split("\n\n"):
        _, header, *rows = block.splitlines()
        for column in ("type", "unit", "default"):
            at = header.index(column)
            assert all(row[at - 1] == " " and row[at] != " " for row in rows)


# ---------------------------------------------------------------- command line


def call(argv: list[str]) -> Config:
    return parse_args(argv, prog="python -m r3rag_jax.train", description="Trains.")[0]


def test_parse_args_reads_the_file_and_overrides_around_flags(write: Write) -> None:
    path = write("seed: 1\n")
    config, options = parse_args(
        ["rl.lr=1e-4", "--port", "80", "--config", str(path), "mesh.data=-1", "rl.kl=0"],
        prog="serve",
        description="Serves.",
        extra=lambda parser: parser.add_argument("--port", type=int),
    )
    assert (config.seed, config.rl.lr, config.rl.kl) == (1, 1e-4, 0.0)
    assert (options.port, options.config) == (80, "x.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: the following arguments are required: --config"),
        (["--config"], "error: argument --config: expected one argument"),
        (["--config", "x.yaml", "--confg=a"], "error: unknown flag '--confg=a'"
         "; did you mean '--config'?"),
        (["--config", "x.yaml", "--rl.lr=3"], "error: unknown flag '--rl.lr=3'"
         "; did you mean 'rl.lr=…'?"),
        (["--config", "x.yaml", "-z"], "error: unknown flag '-z'; --help lists all flags and keys"),
        (["--config", "x.yaml", "rl.lr"], "error: override 'rl.lr': expected key=value"
         "; did you mean 'rl.lr=…'?"),
        (["--config", "y.yaml"], "error: y.yaml: no such file; did you mean x.yaml?"),
        (["--config", "x.yaml", "seed=a"], "error: override 'seed=a': seed must be an integer"
         "; got 'a'"),
    ],
)  # fmt: skip
def test_wrong_words_end_with_one_line_and_status_2(
    write: Write, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    write("seed: 0\n")
    with pytest.raises(SystemExit) as caught:
        call(argv)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", message + "\n")


def test_help_prints_usage_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert out.startswith("usage: python -m r3rag_jax.train --config FILE [flags] [key=value ...]")
    assert out.endswith(help_text())
    assert "cosine to 10 %" in out  # a % stands as it is


def test_main_guard_turns_user_errors_alone_into_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class DataError(UserError):
        """Bad input of another layer."""

    @main_guard
    def main(error: Exception | None, status: int | None = None) -> int | None:
        if error is not None:
            raise error
        return status

    assert main(DataError("q.jsonl:3: expected JSON;\n got '{'")) == 2
    assert capsys.readouterr() == ("", "error: q.jsonl:3: expected JSON; got '{'\n")
    assert (main(None), main(None, 3)) == (0, 3)
    with pytest.raises(ValueError, match="a bug"):
        main(ValueError("a bug"))
    assert isinstance(ConfigError("x"), UserError) and main.__name__ == "main"


def test_layer_0_imports_no_accelerator_library() -> None:
    # `--help` and a wrong key must answer at once, not after seconds of importing JAX.
    allowed = {*sys.stdlib_module_names, "yaml", "r3rag_jax"}
    for module in ("config/schema.py", "config/loader.py", "errors.py"):
        source = (pathlib.Path(configio.__file__).parents[1] / module).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in allowed
