"""Log-probabilities of forced texts: equal to one full forward pass a sample, on one device and on eight."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh
from tiny_training import VOCAB, modules, one_device

from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.shardings import device_put_global, tree_shardings
from r3rag_jax.training.likelihood import Likelihood
from r3rag_jax.types import Sample

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def forced(context: list[int], answer: list[int]) -> Sample:
    step_ids = np.asarray([-1] * len(context) + [0] * len(answer), np.int32)
    return Sample(np.asarray(context + answer, np.int32), step_ids >= 0, np.zeros(len(step_ids), np.float32), step_ids)


def groups() -> list[list[Sample]]:
    """Answers after growing contexts, as of a trajectory with two aliases; an empty group; one context of its own."""
    text = np.random.default_rng(3).integers(3, VOCAB, 60).tolist()
    growing = [forced(text[:end], answer) for end in (5, 12, 30) for answer in ([7, 8, 9], [7, 11])]
    return [growing, [], [forced(text[40:], [5])]]


def likelihood(mesh: Mesh, **shape: int) -> Likelihood:
    graphdef, params = modules()[0]["policy"], modules()[1]["policy"]
    params = device_put_global(params, tree_shardings(mesh, params, PARAM_AXES))
    no_codec: Any = None  # samples are made by hand
    return Likelihood(no_codec, mesh, graphdef, params, **({"row_length": 64, "batch_rows": 2} | shape))


def test_the_same_as_a_plain_loop() -> None:
    policy = tiny.decoder(VOCAB)
    for of_group, found in zip(groups(), likelihood(one_device())(groups()), strict=True):
        for sample, logprobs in zip(of_group, found, strict=True):
            ids = np.pad(sample.ids, (0, 64 - len(sample)))[None]  # one shape
            all_logprobs = jax.nn.log_softmax(tiny.logits(policy, ids, np.arange(64)[None])[0])
            plain = [all_logprobs[t - 1, sample.ids[t]] for t in np.flatnonzero(sample.loss_mask)]
            np.testing.assert_allclose(logprobs, plain, rtol=2e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_on_eight_devices_and_in_longer_rows_the_same(sizes: tuple[int, int, int]) -> None:
    expected = likelihood(one_device())(groups())
    found = likelihood(make_mesh(tiny.mesh_config(*sizes)), row_length=8, batch_rows=3)(groups())
    for of_group, wanted in zip(found, expected, strict=True):
        assert len(of_group) == len(wanted)
        for logprobs, want in zip(of_group, wanted, strict=True):
            np.testing.assert_allclose(logprobs, want, rtol=1e-5)
