"""MFU and memory bandwidth, in numbers that can be followed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from r3rag_jax.compiling.peaks import chip_of, utilization_of
from r3rag_jax.config import Config, LoraConfig, RLConfig
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.training.utilization import Peaks, Utilization, Work
from r3rag_jax.types import SFTBatch

DECODER = DecoderConfig(vocab_size=10, hidden_size=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, ffn_size=8)
WEIGHTS = 2 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8) + 10 * 4  # q; k and v; o; gate, up, down; the output matrix
PEAKS = Peaks(flops=1000.0, hbm_rate=500.0)
CONFIG = Config(rl=RLConfig(algorithm="rloo", kl=RLConfig().kl.replace(coef=0.0)))


def of(config: Config, decoder: DecoderConfig = DECODER) -> Utilization:
    return Utilization(PEAKS, config, decoder, devices=4)


def test_flops_of_tokens_and_of_what_they_attend_to() -> None:
    use = of(CONFIG)
    assert use.forward_flops(Work(tokens=3, attended=6)) == 2 * WEIGHTS * 3 + 4 * 2 * 2 * 2 * 6
    assert use.update_flops(Work(1, 0)) == 6 * WEIGHTS
    assert of(CONFIG.replace(lora=LoraConfig(rank=2))).update_flops(Work(1, 0)) == 4 * WEIGHTS
    tied = dataclasses.replace(DECODER, tie_embeddings=True)
    assert of(CONFIG, tied).update_flops(Work(1, 0)) == 6 * WEIGHTS  # the embedding is the output matrix


def test_mfu_counts_the_passes_that_the_configuration_makes() -> None:
    seconds, unit = 2.0, 2 * WEIGHTS / (2.0 * 4 * 1000)  # a forward pass of a token
    assert of(CONFIG).sft(Work(1, 0), seconds) == {"mfu": pytest.approx(3 * unit)}
    assert of(CONFIG).rl(Work(1, 0), seconds) == {"mfu": pytest.approx(3 * unit)}
    with_kl = CONFIG.replace(rl=CONFIG.rl.replace(epochs=2, kl=CONFIG.rl.kl.replace(coef=0.1)))
    assert of(with_kl).rl(Work(1, 0), seconds) == {"mfu": pytest.approx((1 + 2 * 3) * unit)}
    ppo = CONFIG.replace(rl=CONFIG.rl.replace(algorithm="ppo"))  # a separate critic: hidden states, values, its update
    assert of(ppo).rl(Work(1, 0), seconds) == {"mfu": pytest.approx((2 + 2 * 3) * unit)}


def test_memory_bandwidth() -> None:
    assert of(CONFIG).decoding(100.0, 2.0) == {"memory_bandwidth": 100 / (2 * 500)}
    assert of(CONFIG).decoding(0.0, 0.0) == {}


def test_work_leaves_out_padding() -> None:
    segment_ids, positions = np.array([[1, 1, 1, 2, 2, 0]]), np.array([[0, 1, 2, 0, 1, 0]])
    batch = SFTBatch(segment_ids, positions, segment_ids, None, segment_ids > 0)  # type: ignore[arg-type]
    assert Work.of([batch, batch]) == Work(tokens=10, attended=2 * (1 + 2 + 3 + 1 + 2))


def test_only_known_chips_have_peaks() -> None:
    assert chip_of("TPU v5 lite").name == chip_of("TPU v5e").name == "v5e"  # type: ignore[union-attr]
    assert chip_of("NVIDIA H100 80GB HBM3").flops == 989e12  # type: ignore[union-attr]
    assert chip_of("NVIDIA H100 PCIe") is None and chip_of("cpu") is None
    assert utilization_of(CONFIG, DECODER, make_mesh(CONFIG.mesh)) is None
