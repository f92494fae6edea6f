"""Topologies by libtpu's names and the cloud's, and the rates between their chips."""

import pytest

from r3rag_jax.compiling.chips import CHIPS, parse_topology
from r3rag_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "num", "accelerator_type"),
    [
        ("v5e:8x8", "v5e:8x8", 64, "v5litepod-64"),
        ("v5e-64", "v5e:8x8", 64, "v5litepod-64"),
        ("v5litepod-64", "v5e:8x8", 64, "v5litepod-64"),
        ("v6e-32", "v6e:4x8", 32, "v6e-32"),
        ("v5p-32", "v5p:2x2x4", 16, "v5p-32"),  # the cloud counts cores, two a chip
        ("v5p-128", "v5p:4x4x4", 64, "v5p-128"),
        ("V5P:2x2x1", "v5p:2x2x1", 4, "v5p-8"),
    ],
)
def test_names_of_tpu_slices(text: str, name: str, num: int, accelerator_type: str) -> None:
    topology = parse_topology(text)
    assert (topology.name, topology.num_devices, topology.accelerator_type) == (name, num, accelerator_type)


@pytest.mark.parametrize(("text", "dims"), [("h100:8", (1, 8)), ("h100:2x8", (2, 8)), ("h100-8", (1, 8))])
def test_gpus_are_hosts_times_gpus(text: str, dims: tuple[int, int]) -> None:
    assert parse_topology(text).dims == dims


@pytest.mark.parametrize("text", ["", "v5e", "v9x:2x2", "v5e:2x2x2", "v5p:8x8", "v5e-63", "v5p-33", "h100:0", "v5e:"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--topology"):
        parse_topology(text)


def test_links_of_a_group() -> None:
    """All chips use every dimension; its end has one link unless it is a ring. A smaller group has one dimension."""
    v5e, v5p, h100 = (CHIPS[name] for name in ("v5e", "v5p", "h100"))
    assert parse_topology("v5e:8x8").link_rate(64) == 2 * v5e.link_rate == 100e9
    assert parse_topology("v5e:8x8").link_rate(4) == v5e.link_rate
    assert parse_topology("v5e:16x16").link_rate(256) == 4 * v5e.link_rate  # both are rings
    assert parse_topology("v5p:2x2x4").link_rate(16) == 3 * v5p.link_rate
    assert parse_topology("v5p:4x4x4").link_rate(64) == 6 * v5p.link_rate
    assert parse_topology("h100:8").link_rate(8) == h100.link_rate
    assert parse_topology("h100:2x8").link_rate(8) == h100.link_rate
    assert parse_topology("h100:2x8").link_rate(16) == 8 * h100.host_rate
