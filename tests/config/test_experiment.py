"""Relations between keys: each is refused with one line that names its keys."""

from collections.abc import Callable
from pathlib import Path

import pytest

from r3rag_jax.config import (
    SYSTEMS,
    Config,
    ConfigError,
    DataConfig,
    EndpointConfig,
    EvalConfig,
    JudgeConfig,
    LocalJudgeConfig,
    MeshConfig,
    RewardConfig,
    RLConfig,
    RolloutConfig,
    ServerConfig,
    loader,
)
from r3rag_jax.config.evaluation import BASE_SYSTEMS
from r3rag_jax.config.redact import redact_override

Write = Callable[[str], Path]
ErrorOf = Callable[..., str]  # the fixture: message of the error that loading raises


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["rl.max_grad_norm=0"], "rl.max_grad_norm must be above 0; got 0.0"),
        (["rl.clip=0", "rl.clip_high=0.3"], "rl.clip_high must be 0 when rl.clip is 0, which clips no ratio; got 0.3"),
        (["rl.batch_rows=0"], "rl.batch_rows must be at least 1; got 0"),
        (["rl.gamma=1.1"], "rl.gamma must be in [0, 1]; got 1.1"),
        (["rl.returns=total"], "rl.returns must be to_go with rl.algorithm=ppo and unless rl.gamma and"
         " rl.step_discount are 1; got total with ppo, 1.0 and 1.0"),
        (["rl.algorithm=grpo", "rl.step_discount=0.5", "rl.returns=total"], "rl.returns must be to_go with"
         " rl.algorithm=ppo and unless rl.gamma and rl.step_discount are 1; got total with grpo, 1.0 and 0.5"),
        (["rl.algorithm=reinforce++", "rl.whiten_advantages=false"], "rl.whiten_advantages must be true when"
         " rl.algorithm is reinforce++, whose baseline it is; got false"),
        (["rl.algorithm=rloo", "rl.normalize_std=true"], "rl.normalize_std must be false unless rl.algorithm is"
         " grpo; got true with rloo"),
        (["rl.max_resamples=2"], "rl.max_resamples must be 0 unless rl.algorithm is grpo or rloo and"
         " rl.drop_zero_variance true; got 2 with ppo and true"),
        (["rl.kl.placement=loss"], "rl.kl.estimator must be k2 or k3 when rl.kl.placement is loss, for the gradient"
         " of k1 is 0 on average; got k1"),
        (["rl.kl.target=0.1", "rl.kl.coef=0"], "rl.kl.coef must be above 0, for rl.kl.target=0.1 adapts it; got 0.0"),
        (["rl.algorithm=grpo", "rollout.samples=1"], "rollout.samples must be at least 2 when rl.algorithm is grpo;"
         " got 1"),
        (["sft.lr=-1"], "sft.lr must be at least 0; got -1.0"),
        (["world.needless_retrievals=2"], "world.needless_retrievals must be in [0, 1]; got 2.0"),
        (["seed=-1"], "seed must be in [0, 4294967295]; got -1"),
        (["name=a/b"], "name must be one directory name of letters, digits and _.+-, not led by a sign; got 'a/b'"),
        (["model.path="], "model.path must be a directory or bundled; got none"),
        (["retrieval.max_passages=1"], "retrieval.max_passages must be at least retrieval.top_k=2; got 1"),
        (["rollout.max_new_tokens=512"], "rollout.max_new_tokens must be less than rollout.max_length=512; got 512"),
        (["rollout.temperatures=1,-0.1"], "rollout.temperatures must be one or more numbers of at least 0; got 1.0,"
         " -0.1"),
        (["rollout.temperatures=[]"], "rollout.temperatures must be one or more numbers of at least 0; got none"),
        (["rl.row_length=511"], "rl.row_length must be at least rollout.max_length=512, for a trajectory fills one"
         " row; got 511"),
        (["rewards.use_process=no", "rewards.use_outcome=no"], "rewards.use_outcome or rewards.use_process must be"
         " true; got false for both"),
        (["phases=rl,sft"], "phases must come in the order index, sft, rl, eval; got rl, sft"),
        (["phases=eval,eval"], "phases must name nothing twice; got eval, eval"),
        (["phases=[]"], "phases must name at least one of index, sft, rl, eval; got none"),
        (["phases=train"], "phases must be among index, sft, rl, eval; got 'train'"),
        (["eval.systems=gpt"], f"eval.systems must be among {', '.join(SYSTEMS)}; got"
         " 'gpt'"),
        (["mesh.data=0"], "mesh.data must be at least 1, or -1 for what is left; got 0"),
        (["mesh.process_id=0"], "mesh.process_id must stay -1 without a mesh.coordinator; got 0"),
        (["mesh.coordinator=a:1"], "mesh.coordinator must be empty unless mesh.distributed is true; got 'a:1'"),
        (["data.source=files"], "data.corpus must be given when data.source is files; got none"),
        (["rollout.server.url=localhost:8000"], "rollout.server.url must be an http(s) URL without user, query or"
         " fragment, e.g. http://localhost:8000/v1; got 'localhost:8000'"),
        (["rollout.server.url=http://me:secret@h/v1"], "rollout.server.url must be an http(s) URL without user,"
         " query or fragment, e.g. http://localhost:8000/v1; got 'http://…@h/v1'"),
        (["rollout.server.url=http://h/v1"], "phases must not have rl when rollout.server.url is given: RL samples"
         " with the policy that it trains; got index, sft, rl, eval"),
        (["phases=eval", "rollout.server.url=http://h/v1"], "eval.systems must be of one policy, the served one,"
         f" when rollout.server.url is given: {', '.join(BASE_SYSTEMS)}, or cold_start, or r3rag; got"
         " closed_book, naive_rag, cold_start, r3rag"),
        (["phases=index", "rollout.server.url=http://h", "mesh.distributed=true"], "mesh.distributed must be false"
         " when rollout.server.url is given; got true"),
        (["phases=index", "rollout.server.url=http://h", "rollout.server.extra_fields=false", "rollout.min_p=0.1"], ""
         "rollout.min_p and rollout.top_k_tokens must be 0 when rollout.server.extra_fields is false; got 0.1 and 0"),
        (["phases=index", "rollout.server.url=http://h", "rollout.stop_strings=a"], "rollout.stop_strings must be"
         " none when rollout.server.url is given; got a"),
        (["rollout.server.retries=-1"], "rollout.server.retries must be at least 0; got -1"),
        (["rollout.server.timeout_s=0"], "rollout.server.timeout_s must be above 0; got 0.0"),
        (["rewards.process=judge"], "judge.endpoint.url must be given when rewards.process is judge (and judge.kind"
         " is server); got none"),
        (["judge.kind=local", "rewards.outcome=judge"], "judge.local.path must be given when rewards.outcome is"
         " judge (and judge.kind is local); got none"),
        (["phases=index", "eval.judge=true"], "judge.endpoint.url must be given when eval.judge is true (and"
         " judge.kind is server); got none"),
        (["judge.endpoint.url=http://me:secret@h/v1"], "judge.endpoint.url must be an http(s) URL without user,"
         " query or fragment, e.g. http://localhost:8000/v1; got 'http://…@h/v1'"),
        (["judge.kind=local", "judge.endpoint.url=http://h"], "judge.endpoint.url must be empty when judge.kind is"
         " local; got 'http://h'"),
        (["judge.kind=local", "judge.endpoint.key_env=K"], "judge.endpoint.key_env must be empty when judge.kind is"
         " local; got one"),
        (["judge.endpoint.key_env=sk-secret.1"], "judge.endpoint.key_env must be the name of an environment variable,"
         " not a key itself; got something else"),
        (["judge.kind=local", "judge.local.max_length=256"], "judge.max_tokens must be less than"
         " judge.local.max_length=256; got 256"),
        (["judge.local.path=package:x"], "judge.local.path must be empty unless judge.kind is local; got 'package:x'"),
        (["retrieval.kind=http"], "retrieval.endpoint.url must be given when retrieval.kind is http; got none"),
        (["retrieval.encoder.kind=bert"], "retrieval.encoder.path must be given when retrieval.encoder.kind is bert;"
         " got none"),
        (["rollout.top_p=0"], "rollout.top_p must be in (0, 1]; got 0.0"),
        (["guards.length_drift=0.5"], "guards.length_drift must be a factor above 1, or 0 for none; got 0.5"),
        (["judge.max_failure_share=1.5"], "judge.max_failure_share must be in [0, 1]; got 1.5"),
        (["judge.endpoint.max_in_flight=0"], "judge.endpoint.max_in_flight must be at least 1; got 0"),
        (["rewards.process_weight=-1"], "rewards.process_weight must be at least 0; got -1.0"),
    ],
)  # fmt: skip
def test_broken_relations_name_the_key_and_the_override(
    write: Write, overrides: list[str], rule: str, error_of: ErrorOf
) -> None:
    # An override is blamed before a line of the file, even where both have a part in the relation.
    path = write("rollout: {max_length: 512}\nretrieval: {top_k: 2}\n")
    assert error_of(path, *overrides) == f"override '{redact_override(overrides[-1])}': {rule}"


def test_broken_relations_name_the_line_of_the_file_or_else_the_file(write: Write, error_of: ErrorOf) -> None:
    path = write("seed: 0\nrollout:\n  max_steps: 2\n  max_length: 64\n")
    assert error_of(path).startswith("x.yaml:4: rollout.max_new_tokens must be less than")
    assert error_of(write("seed: 0\nrl: {clip: -1}\n")).startswith("x.yaml:2: rl.clip must be")
    error = ConfigError("a rule over keys that nobody gave", ["rl.lr"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "_build", lambda values: (_ for _ in ()).throw(error))
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


@pytest.mark.parametrize("systems", [("closed_book", "naive_rag", "ircot"), ("cold_start",), ("r3rag",)])
def test_a_server_evaluates_the_systems_of_one_policy(systems: tuple[str, ...]) -> None:
    rollout = RolloutConfig(server=ServerConfig(url="https://host:8000/v1"))
    config = Config(phases=("index", "eval"), rollout=rollout, eval=EvalConfig(systems=systems))
    assert config.eval.systems == systems


def test_a_judge_is_needed_by_whoever_asks_it() -> None:
    by_judge = RewardConfig(process="judge", outcome="judge")
    assert Config(phases=("sft", "eval"), rewards=by_judge).rewards.needs_judge
    assert Config(rewards=by_judge.replace(use_process=False, outcome="em")).judge.endpoint.url == ""
    assert Config(rewards=by_judge, judge=JudgeConfig(endpoint=EndpointConfig(url="http://h/v1"))).judge.is_given
    assert Config(
        rewards=by_judge, judge=JudgeConfig(kind="local", local=LocalJudgeConfig(path="package:x"))
    ).judge.is_given
    assert not RewardConfig().needs_judge and not JudgeConfig(endpoint=EndpointConfig(model="m")).is_given


def test_an_explicit_coordinator_needs_its_rank_and_size() -> None:
    good = MeshConfig(distributed=True, coordinator="h:1", num_processes=2, process_id=1)
    assert good.process_id == 1
    with pytest.raises(ConfigError, match=r"mesh\.process_id must be in \[0, 2\)"):
        good.replace(process_id=2)
    with pytest.raises(ConfigError, match=r"mesh\.num_processes must be at least 1"):
        good.replace(num_processes=0)
    with pytest.raises(ConfigError, match="must be host:port"):
        good.replace(coordinator="h")
