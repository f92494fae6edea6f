"""Reward shaping: every status typed out, and bugs not to repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3rag_jax.rewards.shaping import shape_rewards
from r3rag_jax.types import Status

# One trajectory per row, three steps unless said otherwise; relevance 0.5 on the first, 1 on the
# second.
NAMES = ("correct", "wrong", "no answer", "format error", "two steps, correct", "malformed inside")
INPUTS = {
    "process_BK": [
        [0.5, 1.0, 0.0],
        [0.5, 1.0, 0.0],
        [0.5, 1.0, 0.7],
        [0.5, 1.0, 0.0],
        [0.5, 0.0, 9.9],
        [0.5, 0.3, 0.0],
    ],
    "correct_B": [1.0, 0.0, 0.0, 0.0, 1.0, 1.0],
    "status_B": [
        Status.ANSWERED,
        Status.ANSWERED,
        Status.NO_ANSWER,
        Status.FORMAT_ERROR,
        Status.ANSWERED,
        Status.ANSWERED,
    ],
    "step_mask_BK": [[True] * 3] * 4 + [[True, True, False], [True] * 3],
    "malformed_BK": [[False] * 3] * 3 + [[False, False, True], [False, False, True], [False, True, False]],
}
TABLE = {
    "r3": [
        [0.8, 1.6, 2.0],
        [0.4, 0.8, 0.0],
        [0.4, 0.8, -0.5],
        [0.0, 0.0, -1.0],
        [0.8, 2.0, 0.0],
        [0.8, -1.0, 2.0],
    ],
    "paper": [
        [0.8, 1.6, 2.0],
        [0.4, 0.8, 0.0],
        [0.45, 0.9, 0.63],
        [0.5, 1.0, -0.9],
        [0.8, 2.0, 0.0],
        [0.8, -0.9, 2.0],
    ],
    "r3, outcome only": [
        [0.0, 0.0, 2.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, -0.5],
        [0.0, 0.0, -1.0],
        [0.0, 2.0, 0.0],
        [0.0, -1.0, 2.0],
    ],
    "paper, outcome only": [
        [2.0, 2.0, 2.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, -0.9],
        [2.0, 2.0, 0.0],
        [2.0, -0.9, 2.0],
    ],
    "r3, process only": [
        [0.5, 1.0, 0.0],
        [0.5, 1.0, 0.0],
        [0.5, 1.0, 0.7],
        [0.5, 1.0, -1.0],
        [0.5, 0.0, 0.0],
        [0.5, -1.0, 0.0],
    ],
    "paper, process only": [
        [0.5, 1.0, 0.0],
        [0.5, 1.0, 0.0],
        [0.45, 0.9, 0.63],
        [0.5, 1.0, -0.9],
        [0.5, 0.0, 0.0],
        [0.5, -0.9, 0.0],
    ],
    "r3, bounded": [
        [0.8, 0.5, 2.0],
        [0.4, 0.8, 0.0],
        [0.4, 0.8, -0.5],
        [0.0, 0.0, -1.0],
        [0.8, 2.0, 0.0],
        [0.8, -1.0, 2.0],
    ],
}
OPTIONS = {
    "r3": {},
    "paper": {"compat": "paper"},
    "r3, outcome only": {"use_process": False},
    "paper, outcome only": {"compat": "paper", "use_process": False},
    "r3, process only": {"use_outcome": False},
    "paper, process only": {"compat": "paper", "use_outcome": False},
    "r3, bounded": {"max_process": 1.3},
}


def _inputs(**changes):
    return {name: jnp.asarray(value) for name, value in (INPUTS | changes).items()}


def _no_answer_and_wrong(process_BK, step_mask_BK, malformed_BK, **options):
    """Total the same steps ended by a search that leads nowhere, and by a wrong answer: 2 x [B]."""
    num_rows = len(process_BK)
    shaped = shape_rewards(
        np.concatenate([process_BK] * 2),
        np.zeros(2 * num_rows, np.float32),
        np.repeat([Status.NO_ANSWER, Status.ANSWERED], num_rows),
        np.concatenate([step_mask_BK] * 2),
        np.concatenate([malformed_BK] * 2),
        **options,
    )
    return np.asarray(shaped.rewards_BK).sum(axis=1).reshape(2, num_rows)


@pytest.mark.parametrize("variant", TABLE)
def test_shape_rewards_typed_out_jitted_eager_vmapped(variant):
    def shape(**inputs):
        return shape_rewards(**inputs, **OPTIONS[variant]).rewards_BK

    rewards_BK = shape(**_inputs())
    for name, row, expected in zip(NAMES, rewards_BK, TABLE[variant], strict=True):
        np.testing.assert_allclose(row, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    with jax.disable_jit():
        np.testing.assert_allclose(shape(**_inputs()), rewards_BK, rtol=1e-6)
    stacked = {name: jnp.stack([value, value[::-1]]) for name, value in _inputs().items()}
    twice = jax.vmap(lambda kwargs: shape(**kwargs))(stacked)
    np.testing.assert_allclose(twice, [rewards_BK, rewards_BK[::-1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("variant", "parts"),
    [
        ("r3", {
            "outcome": [[0, 0, 2.0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]],
            "process": [[0.8, 1.6, 0], [0.4, 0.8, 0], [0.4, 0.8, 0], [0, 0, 0], [0.8, 0, 0], [0.8, 0, 0]],
            "format": [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, -1.0], [0, 0, 0], [0, -1.0, 0]],
            "no_answer": [[0, 0, 0], [0, 0, 0], [0, 0, -0.5], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        }),
        ("paper", {
            "outcome": [[0, 0, 2.0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]],
            "process": [[0.8, 1.6, 0], [0.4, 0.8, 0], [0.45, 0.9, 0.63], [0.5, 1.0, 0], [0.8, 0, 0], [0.8, 0, 0]],
            "format": [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, -0.9], [0, 0, 0], [0, -0.9, 0]],
            "no_answer": np.zeros((6, 3)),
        }),
    ],
)  # fmt: skip
def test_parts_typed_out(variant, parts):
    found = shape_rewards(**_inputs(), **OPTIONS[variant]).parts_BK
    assert found.keys() == parts.keys()
    for name, part_BK in parts.items():
        np.testing.assert_allclose(found[name], part_BK, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("variant", TABLE)
def test_each_step_is_in_one_part(variant):
    unknown = np.array([[np.nan, 1.0, 0.0], *INPUTS["process_BK"][1:]])
    shaped = shape_rewards(**_inputs(process_BK=unknown), **OPTIONS[variant])
    np.testing.assert_array_equal(sum(shaped.parts_BK.values()), shaped.rewards_BK)
    num_parts_BK = sum((np.asarray(part_BK) != 0).astype(int) for part_BK in shaped.parts_BK.values())  # NaN != 0 too
    np.testing.assert_array_equal(num_parts_BK, np.asarray(shaped.rewards_BK) != 0)


@pytest.mark.parametrize("variant", TABLE)
def test_a_full_context_is_rewarded_as_no_answer(variant):
    status_B = np.asarray(INPUTS["status_B"])
    full = shape_rewards(**_inputs(status_B=np.where(status_B == Status.NO_ANSWER, Status.CONTEXT_FULL, status_B)),
                         **OPTIONS[variant])  # fmt: skip
    missing = shape_rewards(**_inputs(), **OPTIONS[variant])
    np.testing.assert_array_equal(full.rewards_BK, missing.rewards_BK)
    for name, part_BK in missing.parts_BK.items():
        np.testing.assert_array_equal(full.parts_BK[name], part_BK)


def test_a_malformed_step_has_the_reward_of_the_format_whatever_it_retrieved():
    rewards_BK = shape_rewards(
        jnp.array([[0.1, 5.0, 0.0]]),
        jnp.zeros(1),
        jnp.array([Status.ANSWERED]),
        jnp.ones((1, 3), bool),
        jnp.array([[False, True, True]]),
        factor_wrong=1.0,
        malformed_reward=-0.9,
    ).rewards_BK
    np.testing.assert_allclose(rewards_BK, [[0.1, -0.9, -0.9]])


def test_a_tenth_stays_a_tenth():
    # A peer collected rewards in an int32 array, where 0.7 became 0: the model learnt nothing from
    # most of them.
    inputs = _inputs(process_BK=[[0.1] * 3] * 6)
    rewards_BK = shape_rewards(**inputs, factor_wrong=1.0).rewards_BK
    assert rewards_BK.dtype == jnp.float32
    assert rewards_BK[NAMES.index("wrong"), 0] == np.float32(0.1)
    # Even whole-number relevances and matches, given as integers, are scaled as floats.
    integers = _inputs(process_BK=[[1] * 3] * 6, correct_B=[1, 0, 0, 0, 1, 1])
    assert shape_rewards(**integers).rewards_BK[NAMES.index("correct"), 0] == np.float32(1.6)


def test_f1_as_outcome():
    inputs = _inputs(correct_B=[0.75, 0.25, 1.0, 1.0, 0.5, 0.0])
    rewards_BK = shape_rewards(**inputs).rewards_BK
    np.testing.assert_allclose(rewards_BK[0], [0.8, 1.6, 1.5], rtol=1e-6)
    np.testing.assert_allclose(rewards_BK[1], [0.4, 0.8, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rewards_BK[2], [0.4, 0.8, -0.5], rtol=1e-6)  # no answer, no outcome
    np.testing.assert_allclose(rewards_BK[4], [0.8, 1.0, 0.0], rtol=1e-6)


def test_rewards_are_clipped():
    options = {"outcome_weight": 50.0, "malformed_reward": -30.0, "no_answer_penalty": 20.0}
    rewards_BK = shape_rewards(**_inputs(), **options).rewards_BK
    assert rewards_BK[0, 2] == 10.0 and rewards_BK[3, 2] == -10.0 and rewards_BK[2, 2] == -10.0
    assert shape_rewards(**_inputs(), clip=0.25).rewards_BK[0, 0] == 0.25


@pytest.mark.parametrize("options", [{}, {"use_process": False}, {"factor_wrong": 0.95}])
def test_never_answering_totals_less_than_answering_wrongly(options):
    rng = np.random.default_rng(0)
    num_rows, num_steps = 2000, 10
    process_BK = rng.integers(0, 11, (num_rows, num_steps)).astype(np.float32) / 10
    steps_B = rng.integers(1, num_steps + 1, num_rows)
    step_mask_BK = np.arange(num_steps) < steps_B[:, None]
    malformed_BK = rng.random((num_rows, num_steps)) < 0.2
    malformed_BK[np.arange(num_rows), steps_B - 1] = False  # the searches and answers compared
    never, wrong = _no_answer_and_wrong(process_BK, step_mask_BK, malformed_BK, **options)
    assert np.all(never < wrong)


def test_paper_shaping_prefers_never_answering():
    # In the paper a wrong answer scales the process rewards by 0.8 and adds nothing, no answer by
    # 0.9, and its last search is rewarded too: 0.9 * (0.5 + 1 + 0.7) = 1.98 against 0.8 * (0.5 + 1)
    # = 1.2. A policy unsure of its answer learns to search until the budget is gone.
    steps = np.array([[0.5, 1.0, 0.7]], np.float32), np.ones((1, 3), bool), np.zeros((1, 3), bool)
    never, wrong = _no_answer_and_wrong(*steps, compat="paper")
    np.testing.assert_allclose(never, [1.98], rtol=1e-6)
    np.testing.assert_allclose(wrong, [1.2], rtol=1e-6)
    never, wrong = _no_answer_and_wrong(*steps)
    np.testing.assert_allclose(never, [0.7], rtol=1e-6)
    np.testing.assert_allclose(wrong, [1.2], rtol=1e-6)


def test_malformed_reward_can_be_set_in_either_compat():
    for compat in ("r3", "paper"):
        rewards_BK = shape_rewards(**_inputs(), compat=compat, malformed_reward=-0.3).rewards_BK
        np.testing.assert_allclose(rewards_BK[3, 2], -0.3, rtol=1e-6)


def test_the_bound_cuts_off_the_running_sum_of_either_sign():
    process_BK = jnp.array([[1.0, 0.7, 0.7, -0.5, 0.3], [-2.0, -2.0, 0.5, 0.0, 1.0], [1.0, np.nan, 1.0, 1.0, 0.0]])
    shaped = shape_rewards(
        process_BK, jnp.zeros(3), jnp.zeros(3, int), jnp.ones((3, 5), bool), jnp.zeros((3, 5), bool),
        use_outcome=False, max_process=2.0,
    )  # fmt: skip
    expected = [[1, 0.7, 0.3, -0.1, 0], [-2, 0, 0, 0, 0], [1, np.nan, 1, 0, 0]]  # the last step holds the answer
    np.testing.assert_allclose(shaped.rewards_BK, expected, rtol=1e-6, atol=1e-6)


def test_relevance_above_one_counts_in_r3_alone():
    inputs = _inputs(process_BK=[[2.0, 0.5, 0.0]] * 6)
    np.testing.assert_allclose(shape_rewards(**inputs).rewards_BK[1], [1.6, 0.4, 0], rtol=1e-6)
    np.testing.assert_allclose(shape_rewards(**inputs, compat="paper").rewards_BK[1], [0.8, 0.4, 0], rtol=1e-6)


def test_unknown_compat():
    with pytest.raises(ValueError, match=r"rewards.compat must be r3 or paper; got 'r2'"):
        shape_rewards(**_inputs(), compat="r2")
