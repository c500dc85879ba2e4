"""Names of slices, and figures of chips against JAX's own."""

import jax
import pytest
from jax.experimental.pallas import tpu

from l2m_jax import chips
from l2m_jax.chips import CHIPS, Topology, open_topology, parse_topology
from l2m_jax.config import UserError


@pytest.mark.parametrize(
    "name, names",
    [
        ("v5e", "v5e: give a kind of chip and a shape, v5e:4x8 or cpu:8; kinds: v5e, v5p, v6e, cpu"),
        ("h100:8", "kinds: v5e, v5p, v6e, cpu"),
        ("v5e:8by8", "give a kind of chip and a shape"),
        ("v5e:4x4x4", "a slice of v5e has 2 dimensions, as in v5e:4x4"),
        ("v5p:4x4", "a slice of v5p has 3 dimensions, as in v5p:4x4x4"),
        ("v5e:3x4", "the first two sizes must be even"),
        ("v5e:1x2", "the first two sizes must be even"),
        ("v5e:1000x1000", "1000000 chips; allowed: 1 to 256"),
        ("cpu:0", "0 chips; allowed: 1 to 8960"),
        ("cpu:2x4", "cpu takes a number of devices, as in cpu:8"),
        ("cpu:4096", "cpu:4096: JAX has started with"),
    ],
)
def test_slices_that_do_not_exist(name: str, names: str):
    jax.devices()
    with pytest.raises(UserError) as caught:
        open_topology(name)
    assert names in str(caught.value) and f"--topology {name}" in str(caught.value)


def test_slices():
    assert parse_topology("v5e:4x8") == (CHIPS["v5e"], (4, 8))
    assert parse_topology("v5p:2x2x4")[1] == (2, 2, 4)
    assert parse_topology("v6e:1x1")[1] == (1, 1)
    assert len(open_topology("cpu:1").devices) == 1


def test_without_libtpu_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"v5e:2x2 needs libtpu.*pip install -e '.\[tpu\]'"):
        open_topology("v5e:2x2")


@pytest.mark.parametrize("name, version", [("v5e", "TPU_V5E"), ("v5p", "TPU_V5P"), ("v6e", "TPU_V6E")])
def test_figures_are_those_of_jax(name: str, version: str):
    """Published twice, with rounding: the bandwidth of v5p differs by an eighth."""
    kind = getattr(tpu.ChipVersion, version)
    theirs, cores = tpu.get_tpu_info_for_chip(kind, 1), kind.num_physical_tensor_cores_per_chip
    for ours, jaxs in (
        (CHIPS[name].flops, theirs.bf16_ops_per_second * cores),
        (CHIPS[name].memory, theirs.hbm_capacity_bytes * cores),
        (CHIPS[name].bandwidth, theirs.mem_bw_bytes_per_second * cores),
    ):
        assert abs(ours / jaxs - 1) < 0.13, (ours, jaxs)


def test_links_and_rings():
    assert {name: chip.link for name, chip in CHIPS.items()} == {"v5e": 50e9, "v5p": 100e9, "v6e": 100e9}
    for name, rings in (
        ("v5e:8x16", [False, True]),
        ("v5e:16x16", [True, True]),
        ("v5p:4x4x8", [True, True, True]),
        ("v5p:2x4x4", [False, False, False]),  # less than a cube of 4 x 4 x 4
    ):
        topology = Topology(name, *parse_topology(name), devices=[])
        assert [topology.closes(i) for i in range(len(rings))] == rings
