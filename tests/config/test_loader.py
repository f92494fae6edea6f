"""Recipes and overrides: strict in, equal out, one line per error that names where the mistake stands."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3rag_jax.config import (
    Config,
    CriticConfig,
    EndpointConfig,
    JudgeConfig,
    KLConfig,
    RemoteRetrieverConfig,
    RetrievalConfig,
    RewardConfig,
    RLConfig,
    RolloutConfig,
    load_config,
    to_yaml,
)
from r3rag_jax.config.presets import PRESETS, SOURCES
from r3rag_jax.config.renamed import RENAMED
from r3rag_jax.config.schema import help_text, schema, section_names, value_of

Write = Callable[[str], Path]
ErrorOf = Callable[..., str]  # the fixture: message of the error that loading raises


# ---------------------------------------------------------------- values


def test_a_file_sets_its_keys_and_leaves_the_rest_at_the_defaults(write: Write) -> None:
    path = write("name: small\nphases: [index, eval]\nrl:\n  clip: 0.3\n  critic: {kind: head}\n")
    config = load_config(path)
    rl = RLConfig(clip=0.3, critic=CriticConfig(kind="head"))
    assert config == Config(name="small", phases=("index", "eval"), rl=rl)
    assert hash(config) == hash(load_config(path))


def test_dotted_keys_stand_for_nested_ones(write: Write) -> None:
    assert load_config(write("rl.clip: 0.3\n")) == load_config(write("rl: {clip: 0.3}\n"))
    spellings = ("rl.kl.coef: 0.3\n", "rl: {kl.coef: 0.3}\n", "rl.kl: {coef: 0.3}\n", "rl: {kl: {coef: 0.3}}\n")
    assert {load_config(write(text)).rl.kl.coef for text in spellings} == {0.3}


def test_a_key_of_an_endpoint_leaves_the_defaults_of_that_endpoint(write: Write) -> None:
    overrides = [f"{name}.url=http://h" for name in ("retrieval.endpoint", "judge.endpoint", "rollout.server")]
    config = load_config(write("phases: index\n"), overrides)
    endpoints = (config.retrieval.endpoint, config.judge.endpoint, config.rollout.server)
    assert [endpoint.timeout_s for endpoint in endpoints] == [60.0, 120.0, 600.0]
    assert [endpoint.max_in_flight for endpoint in endpoints] == [16, 16, 0]


def test_a_malformed_step_costs_less_in_the_papers_shaping_unless_a_key_says_otherwise(write: Write) -> None:
    assert load_config(None).rewards.malformed == -1.0
    paper = load_config(None, ["rewards.compat=paper"])
    assert paper.rewards.malformed == -0.9
    assert load_config(write(to_yaml(paper))) == paper
    recipe = write("rewards:\n  compat: paper\n  malformed: -1.0\n")
    assert load_config(recipe).rewards.malformed == -1.0
    assert load_config(recipe, ["rewards.malformed=0"]).rewards.malformed == 0
    assert RewardConfig(compat="paper").malformed == RewardConfig().replace(compat="paper").malformed == -0.9
    assert RewardConfig(compat="paper", malformed=-1.0).replace(clip=5.0).malformed == -1.0


def test_a_preset_sets_what_was_not_given_in_the_same_place(write: Write) -> None:
    recipe = write("rl:\n  preset: grpo\n  clip: 0.1\n  kl:\n    coef: 0.001\n  lr: 1.0e-3\n")
    of_file = load_config(recipe).rl
    assert of_file == RLConfig(preset="grpo", clip=0.1, lr=1e-3, kl=KLConfig(coef=0.001))
    assert (of_file.normalize_std, of_file.drop_zero_variance, of_file.kl.placement) == (True, False, "loss")
    # An override wins over the file, also a preset over the keys in it; the other overrides win over the preset.
    override = load_config(recipe, ["rl.clip_high=0.5", "rl.preset=dapo"]).rl
    assert override == RLConfig(preset="dapo", clip_high=0.5, lr=1e-3, kl=override.kl)
    assert (override.clip, override.kl.coef, override.kl.estimator) == (0.2, 0.0, "k1")
    assert load_config(recipe, ["rl.preset=none"]).rl.replace(preset="grpo") == of_file
    kept = load_config(recipe, ["rl.preset=reinforce++"])
    assert load_config(write(to_yaml(kept))) == kept
    sized = "budgets:\n  small:\n    rl.preset: dr_grpo\n    rl.loss_length: 7\n"
    small = load_config(write("rl:\n  clip: 0.1\n" + sized), ["budget=small"]).rl
    assert (small.preset, small.clip, small.loss_length, small.loss_aggregation) == ("dr_grpo", 0.2, 7, "constant")


def test_an_error_in_what_a_preset_sets_names_the_preset(write: Write, error_of: ErrorOf) -> None:
    message = error_of(write("rl:\n  preset: reinforce++\n"), "rl.whiten_advantages=false")
    assert "rl.whiten_advantages must be true when rl.algorithm is reinforce++" in message
    assert "must be one of none, ppo_paper, grpo, dr_grpo, dapo, rloo, reinforce++; got 'gspo'" in error_of(
        write("name: x\n"), "rl.preset=gspo"
    )
    message = error_of(write("rollout:\n  samples: 1\nrl:\n  preset: grpo\n"))
    assert "rollout.samples must be at least 2 when rl.algorithm is grpo" in message


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_sets_keys_of_the_section_and_names_its_source(preset: str) -> None:
    assert all(f"rl.{name}" in schema() for name in PRESETS[preset])
    config = load_config(None, [f"rl.preset={preset}"])
    assert {name: value_of(config, f"rl.{name}") for name in PRESETS[preset]} == PRESETS[preset]
    assert f"`{preset}`: {SOURCES[preset]}" in help_text() and "arXiv" in SOURCES[preset]


def test_overrides_win_over_the_file_and_the_last_wins_over_the_first(write: Write) -> None:
    path = write("seed: 1\nrl: {clip: 0.3}\n")
    config = load_config(path, ["rl.clip=0.4", "rl.critic.gae_lambda=0.9", "rl.clip=0.5"])
    assert (config.seed, config.rl.clip, config.rl.critic.gae_lambda) == (1, 0.5, 0.9)


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
        (["budget=big,cpu"], 0.4, 1, 2),
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
def test_a_wrong_budget_is_named_with_its_line(
    write: Write, text: str, overrides: list[str], message: str, error_of: ErrorOf
) -> None:
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
        ("rl: {lr: 1}\nrl: {clip: 1}\n", "x.yaml:2: repeated key 'rl'; first at x.yaml:1"),
        ("rl: {lr: 1}\nrl.lr: 2\n", "x.yaml:2: repeated key 'rl.lr'; first at x.yaml:1"),
        ("rl: {kl: {coef: 1}}\nrl.kl.coef: 2\n", "x.yaml:2: repeated key 'rl.kl.coef'; first at x.yaml:1"),
        ("rl:\n  kl:\n    ceof: 1\n", "unknown key 'rl.kl.ceof' (x.yaml:3); did you mean 'rl.kl.coef'?"),
        ("rl: {kl: {coef: [1]}}\n", "x.yaml:1: rl.kl.coef must be a finite number; got a list"),
        ("judge: {local: 3}\n", "x.yaml:1: judge.local is a section and takes keys and values; got 3"),
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
def test_errors_in_a_file_name_line_key_rule_and_what_came(
    write: Write, text: str, message: str, error_of: ErrorOf
) -> None:
    assert error_of(write(text)) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.lr=abc", "override 'rl.lr=abc': rl.lr must be a finite number; got 'abc'"),
        ("rl.lr=", "override 'rl.lr=': rl.lr must be a finite number; got nothing"),
        ("rl.lr=1\n2", "override 'rl.lr=1\\n2': rl.lr must be a finite number; got '1 2'"),
        ("seed=1.5", "override 'seed=1.5': seed must be an integer; got 1.5"),
        ("rl.baseline=group", "unknown key 'rl.baseline' (override 'rl.baseline=group')"
         "; its new name is rl.algorithm=rloo"),
        ("rl.clp=1", "unknown key 'rl.clp' (override 'rl.clp=1'); did you mean 'rl.clip'?"),
        ("rl.lr", "override 'rl.lr': expected key=value; did you mean 'rl.lr=…'?"),
        ("rl=1", "override 'rl=1': rl is a section; expected one of its keys, rl.…=value"),
        ("judge.local=1", "override 'judge.local=1': judge.local is a section; expected one of its keys"
         ", judge.local.…=value"),
        ("judge.endpoint.retries=x", "override 'judge.endpoint.retries=x': judge.endpoint.retries must be an integer"
         "; got 'x'"),
        ("rl.lr=[1", "override 'rl.lr=[1':1: expected YAML; expected ',' or ']'"
         ", but got '<stream end>'"),
        ("phases=eval,", "override 'phases=eval,': expected a value after the last comma"
         "; got none"),
        ("phases=", "override 'phases=': phases must be a list of names; got nothing"),
        ("model.init=no", "override 'model.init=no': model.init must be one of pretrained, random"
         "; got 'no'"),
    ],
)  # fmt: skip
def test_errors_in_an_override_name_it(write: Write, override: str, message: str, error_of: ErrorOf) -> None:
    assert error_of(write("seed: 0\n"), override) == message


def test_files_that_cannot_be_read(write: Write, error_of: ErrorOf) -> None:
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


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('name: "\\U00110000"\n', "chr() arg not in range(0x110000)"),
        ('name: "\\UFFFFFFFF"\n', "Python int too large to convert to C int"),
        ("a: &a [1]\nb: [" + "*a," * 101 + "]\n", "at most 100 aliases"),
        ("name: " + "x" * (1 << 20), "of at most 1048576 characters; got 1048582"),
        ("name: " + "[" * 21, "of little depth; got too many levels"),
    ],
    ids=["no character", "no number", "aliases", "size", "depth"],
)
def test_yaml_has_limits(write: Write, text: str, rule: str, error_of: ErrorOf) -> None:
    assert rule in error_of(write(text))


def test_no_tag_is_constructed(write: Write, error_of: ErrorOf) -> None:
    write("x: !!python/object/apply:os.system [touch escaped]\n")
    assert "unknown key 'x'" in error_of("x.yaml")
    write("name: !!python/object/apply:os.system [touch escaped]\n")
    assert "name must be text" in error_of("x.yaml")
    assert not Path("escaped").exists()


# ---------------------------------------------------------------- renamed keys


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_a_renamed_key_is_refused_with_its_new_name(write: Write, error_of: ErrorOf, old: str) -> None:
    words = f"; its new name is {RENAMED[old]}"
    section, _, name = old.rpartition(".")
    assert error_of(write(f"seed: 1\n{section}:\n  {name}: 0\n")) == f"unknown key {old!r} (x.yaml:3){words}"
    assert error_of(write(f"{old}: 0\n")) == f"unknown key {old!r} (x.yaml:1){words}"
    assert error_of(write("seed: 1\n"), f"{old}=N") == f"unknown key {old!r} (override '{old}=N'){words}"


def test_new_names_are_keys_and_old_names_are_none() -> None:
    assert {new.partition(" ")[0].partition("=")[0] for new in RENAMED.values()} <= set(schema())
    assert RENAMED.keys().isdisjoint(schema())
    assert RENAMED.keys() & set(section_names()) == {"rl.kl", "rl.critic", "rollout.server", "retrieval.encoder"}


# ---------------------------------------------------------------- out again


def test_to_yaml_round_trips_every_kind_of_value(write: Write) -> None:
    config = Config(
        name="1e-4",  # text that looks like a number
        run_dir="no",  # text that YAML 1.1 reads as false
        rl=RLConfig(lr=5e-7, critic=CriticConfig(kind="head")),
        retrieval=RetrievalConfig(kind="http", endpoint=RemoteRetrieverConfig(url="http://h", retries=0)),
        judge=JudgeConfig(endpoint=EndpointConfig(url="https://h/v1", model="m")),
        rollout=RolloutConfig(temperatures=(0.1, 1.0)),
    )
    assert load_config(write(to_yaml(config))) == config
    assert "temperatures: [0.1, 1.0]\n" in to_yaml(config)


@settings(max_examples=30, deadline=None)
@given(
    run_dir=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20),
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
