"""The estimator with every algorithm: typed-out numbers, and what must not leak."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3rag_jax.config import CriticConfig, KLConfig, MeshConfig, RLConfig
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.rl.advantages import ends, whiten_rewards
from r3rag_jax.rl.estimator import estimate
from r3rag_jax.training.batch import minibatches, tabulate
from r3rag_jax.training.groups import has_zero_variance
from r3rag_jax.training.state import PreUpdate
from r3rag_jax.training.targets import make_targets
from r3rag_jax.types import Question, Sample, Status, Step, Trajectory, TrajectoryTable

# Question 0 has two trajectories: steps of 2 and 1 tokens that earned 1 and 2; one step of 1 token that earned -1.
# Question 1 has two of one token each, which earned 0 and 3.
TABLE = TrajectoryTable(
    indices=np.array([[0, 1, 2], [3, 9, 9], [4, 9, 9], [5, 9, 9]]),
    rewards=np.array([[0, 1, 2], [-1, 0, 0], [0, 0, 0], [3, 0, 0]], np.float32),
    step_ids=np.array([[0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]),
    mask=np.array([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]], bool),
    groups=np.array([0, 0, 1, 1]),
)
PLAIN = {"whiten_advantages": False}
HALF = 0.5**0.5


def _estimate(table=TABLE, values=0.0, penalties=0.0, **keys):
    config = RLConfig(**keys)
    full = lambda x: np.broadcast_to(np.asarray(x, np.float32), table.rewards.shape)  # noqa: E731
    jitted = jax.jit(lambda v, p, t: estimate(v, p, t.mask, t, config, 3))
    return [np.asarray(x) for x in jitted(full(values), full(penalties), table)]


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        # returns to go 3 3 2 | -1 | 0 | 3, of which each step less the other's; nobody else of question 0 has a second
        # step, and nobody at all
        ({"algorithm": "rloo"}, [[4, 4, 2], [-4, 0, 0], [-3, 0, 0], [3, 0, 0]]),
        ({"algorithm": "rloo", "step_discount": 0.5}, [[3, 3, 2], [-3, 0, 0], [-3, 0, 0], [3, 0, 0]]),
        ({"algorithm": "rloo", "step_discount": 0.0}, [[2, 2, 2], [-2, 0, 0], [-3, 0, 0], [3, 0, 0]]),
        ({"algorithm": "rloo", "returns": "total"}, [[4, 4, 4], [-4, 0, 0], [-3, 0, 0], [3, 0, 0]]),
        # the baseline is of the step's first token, where gamma 0.5 has left 0.5 + 0.5 of 1 and 2
        ({"algorithm": "rloo", "gamma": 0.5}, [[2, 3, 2], [-2, 0, 0], [-3, 0, 0], [3, 0, 0]]),
        ({"algorithm": "grpo"}, [[2, 2, 0], [-2, 0, 0], [-1.5, 0, 0], [1.5, 0, 0]]),
        # of two numbers the deviation over n - 1 is their distance over sqrt 2
        ({"algorithm": "grpo", "normalize_std": True}, [[HALF, HALF, 0], [-HALF, 0, 0], [-HALF, 0, 0], [HALF, 0, 0]]),
        ({"algorithm": "grpo", "normalize_std": True, "returns": "total"},
         [[HALF, HALF, HALF], [-HALF, 0, 0], [-HALF, 0, 0], [HALF, 0, 0]]),
        # of ppo with values of 1: td errors 0 + 1 - 1, 1 + 1 - 1, 2 - 1, and half of the next advantage
        ({"algorithm": "ppo", "critic": CriticConfig(gae_lambda=0.5), "values": 1.0},
         [[0.75, 1.5, 1], [-2, 0, 0], [-1, 0, 0], [2, 0, 0]]),
        ({"algorithm": "ppo", "critic": CriticConfig(gae_lambda=0.5), "values": 1.0, "step_discount": 0.0},
         [[0, 0, 1], [-2, 0, 0], [-1, 0, 0], [2, 0, 0]]),
        ({"algorithm": "rloo", "penalties": 0.25}, [[3.5, 3.75, 1.75], [-3.5, 0, 0], [-3, 0, 0], [3, 0, 0]]),
        ({"algorithm": "rloo", "negative_weight": 0.25}, [[4, 4, 2], [-1, 0, 0], [-0.75, 0, 0], [3, 0, 0]]),
    ],
)  # fmt: skip
def test_estimators_typed_out(keys, want):
    np.testing.assert_allclose(_estimate(**PLAIN | keys)[0], want, atol=1e-6)


def test_reinforce_plus_plus_counts_from_the_mean_of_the_batchs_tokens():
    # returns to go 3 3 2 -1 0 3: mean 10 / 6
    returns = np.array([3, 3, 2, -1, 0, 3])
    advantages, _ = _estimate(algorithm="reinforce++")
    np.testing.assert_allclose(advantages[TABLE.mask], (returns - returns.mean()) / returns.std(), rtol=1e-5)
    # with its penalty in the reward, token by token: 3 tokens of 0.5 before the first of the first trajectory ends
    penalised = np.array([1.5, 2, 1.5, -1.5, -0.5, 2.5])
    advantages, _ = _estimate(algorithm="reinforce++", penalties=0.5)
    np.testing.assert_allclose(advantages[TABLE.mask], (penalised - penalised.mean()) / penalised.std(), rtol=1e-5)


def test_returns_are_what_a_critic_learns():
    _, returns = _estimate(algorithm="ppo", values=[[0.5, -1, 2], [7, np.nan, np.nan], [0, 0, 0], [1, 1, 1]], **PLAIN)
    np.testing.assert_allclose(returns, [[3, 3, 2], [-1, 0, 0], [0, 0, 0], [3, 0, 0]], atol=1e-6)


def test_whitened_rewards_keep_their_mean():
    # step rewards 1 2 -1 0 3: mean 1, deviation sqrt 2
    table = jax.jit(whiten_rewards)(TABLE)
    want = 1 + (np.array([1, 2, -1, 0, 3]) - 1) / 2**0.5
    np.testing.assert_allclose(table.rewards, [[0, *want[:2]], *([x, 0, 0] for x in want[2:])], rtol=1e-6)
    equal = TrajectoryTable(TABLE.indices, TABLE.mask * np.float32(0.7), TABLE.step_ids * 0, TABLE.mask, TABLE.groups)
    np.testing.assert_allclose(whiten_rewards(equal).rewards, [[0, 0, 0.7], *[[0.7, 0, 0]] * 3], rtol=1e-6)


ALGORITHMS = (
    {"algorithm": "ppo", "critic": CriticConfig(gae_lambda=0.9), "gamma": 0.95},
    {"algorithm": "rloo", "step_discount": 0.5},
    {"algorithm": "grpo", "normalize_std": True},
    {"algorithm": "grpo", "returns": "total"},
    {"algorithm": "reinforce++"},
)


@st.composite
def _tables(draw):
    """Tables of one shape, so that each estimator is compiled once."""
    num, width, num_steps = 5, 8, 3
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = np.array(draw(st.lists(st.integers(0, width - 2), min_size=num, max_size=num)))
    mask = np.arange(width) < lengths[:, None]
    steps = np.sort(rng.integers(0, num_steps, (num, width)), axis=1) * mask
    rewards = np.where(jax.vmap(ends)(steps, mask), rng.normal(size=mask.shape), 0).astype(np.float32)
    table = TrajectoryTable(np.zeros_like(steps), rewards, steps, mask, np.sort(rng.integers(0, 3, num)))
    return table, rng.normal(size=(2, num, width)).astype(np.float32), rng


_CONFIGS = [RLConfig(**keys) for keys in ALGORITHMS]
_JITTED = [jax.jit(lambda v, p, t, config=config: estimate(v, p, t.mask, t, config, 3)) for config in _CONFIGS]


@settings(max_examples=25, deadline=None, database=None)
@given(_tables())
def test_padding_changes_nothing_and_lines_may_come_in_any_order(drawn):
    table, (values, penalties), rng = drawn
    nothing = lambda x: np.where(table.mask, x, np.nan).astype(np.float32)  # noqa: E731
    spoilt = dataclasses.replace(table, rewards=nothing(table.rewards))
    order = rng.permutation(len(table.groups))
    line = lambda tree: jax.tree.map(lambda x: x[order], tree)  # noqa: E731
    renamed = dataclasses.replace(line(table), groups=np.array([2, 0, 4, 1, 3])[table.groups[order]])
    for keys, jitted in zip(ALGORITHMS, _JITTED, strict=True):
        found = [np.asarray(x) for x in jitted(values, penalties, table)]
        for x in found:
            assert np.isfinite(x).all() and (x[~table.mask] == 0).all(), keys
        for x, y in zip(found, jitted(nothing(values), nothing(penalties), spoilt), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=str(keys))
        for x, y in zip(found, jitted(values[order], penalties[order], renamed), strict=True):
            np.testing.assert_allclose(x[order], y, atol=2e-5, err_msg=str(keys))


@settings(max_examples=25, deadline=None, database=None)
@given(_tables())
def test_what_a_group_shares_is_no_reason_to_move(drawn):
    """The same for all samples of a question, added to what they earned, leaves the advantages alone."""
    table, (values, _), rng = drawn
    jitted = _JITTED[3]  # grpo of totals, whitened: a shift and a scale after the baseline
    shift = rng.normal(size=5).astype(np.float32)[table.groups]
    is_last = table.mask & ~np.append(table.mask[:, 1:], np.zeros((5, 1), bool), axis=1)
    shifted = dataclasses.replace(table, rewards=table.rewards + is_last * shift[:, None])
    np.testing.assert_allclose(jitted(values, 0 * values, table)[0], jitted(values, 0 * values, shifted)[0], atol=1e-3)


# ------------------------------------------------------------------------------------- what was before


def _attempt(question, index, lengths, first):
    """Tokens count up from `first`; two tokens of prompt or passage before and behind each step."""
    steps = np.asarray([-1] * 2 + [i for k, n in enumerate(lengths) for i in [k] * n + [-1] * 2], np.int32)
    ids = np.arange(first, first + len(steps), dtype=np.int32)
    sample = Sample(ids, steps >= 0, np.where(steps >= 0, -0.5, 0).astype(np.float32), steps)
    taken = (Step("a", query="q"),) * (len(lengths) - 1) + (Step("a", answer="b"),)
    return Trajectory(Question(question, "?", ("b",)), taken, Status.ANSWERED, (sample,), index)


ATTEMPTS = [
    _attempt("x", 0, [2, 3, 1], 100), _attempt("x", 1, [1, 2], 200), _attempt("x", 2, [2, 2, 2], 300),
    _attempt("y", 0, [1, 1], 400), _attempt("y", 1, [2, 1], 500), _attempt("z", 0, [3], 600),
    _attempt("z", 1, [1, 4], 700),
]  # fmt: skip
EARNED = [[0.8, 1.6, 2.0], [1.6, 0.0], [0.0, 0.8, -0.5], [1.6, 2.0], [1.6, 2.0], [-1.0], [0.8, 2.0]]
# Token id -> advantage. `rl.baseline=group step_discount=0.5 critic=none negative_weight=0.3`: the bundled recipes'.
GROUP = {
    102: 0.7105, 103: 0.7105, 106: 1.33041, 107: 1.33041, 108: 1.33041, 111: 1.42373, 202: 0.31056, 205: -0.22478,
    206: -0.22478, 302: -0.22478, 303: -0.22478, 306: -0.0928, 307: -0.0928, 310: -0.37276, 311: -0.37276,
    602: -0.42076, 603: -0.42076, 604: -0.42076, 702: 1.58371, 705: 0.39455, 706: 0.39455, 707: 0.39455, 708: 0.39455,
}  # fmt: skip
# `credit=step lam=0.9` with a critic whose values are the sines of a tenth of the ids: the paper's recipes' (lam 1).
STEP = {
    102: 0.4274, 103: 0.64931, 106: 1.11089, 107: 1.37147, 108: 1.6505, 111: 2.0592, 202: -0.28298, 205: -1.78748,
    206: -1.87193, 302: -0.06196, 303: -0.0121, 306: 0.46655, 307: 0.53926, 310: -0.97585, 311: -1.08678, 402: 0.09059,
    405: 0.7463, 502: 0.59121, 503: 0.64713, 506: 0.75207, 602: -1.33248, 603: -1.28757, 604: -1.24395, 702: -0.98301,
    705: -0.16328, 706: -0.09632, 707: -0.01098, 708: 0.09481,
}  # fmt: skip
# `credit=trajectory`, the same.
TRAJECTORY = {
    102: 1.18336, 103: 1.46857, 106: 1.27145, 107: 1.54197, 108: 1.83565, 111: 1.00032, 202: -0.41608, 205: -1.52657,
    206: -1.58205, 302: -0.31557, 303: -0.27421, 306: -0.32243, 307: -0.30539, 310: -0.99341, 311: -1.06628,
    402: 0.89718, 405: 0.13787, 502: 1.10669, 503: 1.2624, 506: 0.14166, 602: -1.22768, 603: -1.19818, 604: -1.16953,
    702: 0.07519, 705: -0.45963, 706: -0.41564, 707: -0.35959, 708: -0.29009,
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({"algorithm": "rloo", "step_discount": 0.5, "negative_weight": 0.3, "kl": KLConfig(coef=0.0)}, GROUP),
        (
            {
                "algorithm": "ppo",
                "step_discount": 0.0,
                "critic": CriticConfig(gae_lambda=0.9),
                "kl": KLConfig(coef=0.0),
            },
            STEP,
        ),
        ({"algorithm": "ppo", "critic": CriticConfig(gae_lambda=0.9), "kl": KLConfig(coef=0.0)}, TRAJECTORY),
    ],
    ids=["group", "step", "trajectory"],
)
def test_recipes_make_the_advantages_that_their_measured_runs_had(keys, want):
    """Recorded from the code in which each of these had keys, and a way through the trainer, of its own."""
    groups = np.array([0, 0, 0, 1, 1, 2, 2])
    rewards = [np.asarray(r, np.float32) for r in EARNED]
    is_kept = np.ones(7, bool)
    if keys["algorithm"] == "rloo":
        is_kept = ~has_zero_variance(rewards, groups, totals=False)
    kept, rest = (np.flatnonzero(x).tolist() for x in (is_kept, ~is_kept))
    samples = [sample for i in kept for sample in ATTEMPTS[i].samples]
    batches, starts = minibatches(samples, row_length=24, batch_rows=2, rng=np.random.default_rng(0))
    rows = kept + rest
    table = tabulate([ATTEMPTS[i] for i in rows], [rewards[i] for i in rows], starts, groups[rows],
                     num_tokens=48 * len(batches))  # fmt: skip
    assert len(batches) > 1
    values = [np.where(b.loss_mask, np.sin(0.1 * b.tokens), np.nan).astype(np.float32) for b in batches]
    found = [PreUpdate(values=v if keys["algorithm"] == "ppo" else None) for v in values]
    make = make_targets(make_mesh(MeshConfig()), RLConfig(**keys), num_steps=5)
    targets, _ = make(found, table, 0.0, (2, 24))
    found = {
        int(token): float(advantage)
        for batch, target in zip(batches, targets, strict=True)
        for token, advantage in zip(batch.tokens[batch.loss_mask], np.asarray(target.advantages)[batch.loss_mask],
                                    strict=True)
    }  # fmt: skip
    assert found.keys() == want.keys()
    for token, advantage in want.items():
        assert found[token] == pytest.approx(advantage, abs=2e-5), token
