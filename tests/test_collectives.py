"""Collectives in the text of compiled programs: every way in which XLA writes them, as found in its programs."""

import jax
import pytest

from l2m_jax.collectives import collectives

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %p = (s32[], bf16[4,16]) parameter(0)
  %all-gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%w), replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
}

%cond (p: (s32[], bf16[4,16])) -> pred[] {
  %p = (s32[], bf16[4,16]) parameter(0)
}

%outer (p: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %p = (s32[], bf16[4,16]) parameter(0)
  %while.1 = (s32[]) while(%p), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %while.2 = (s32[]) while(%t), condition=%cond, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  LINES
}
"""


def read(line: str):
    """The collectives of a program whose entry holds this line."""
    return collectives(PROGRAM.replace("LINES", line))[1:]


def test_loops_in_loops_are_multiplied():
    (gather,) = collectives(PROGRAM)
    assert (gather.kind, gather.dtype, gather.shape, gather.times) == ("all-gather", "bf16", (8, 16), 15)
    assert gather.bytes == 256 and gather.sent == 128
    assert gather.axes(MESH) == ("fsdp",)


def test_loops_of_tpus_are_counted_by_their_condition():
    """TPU programs do not say how often a loop runs."""
    known = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"3"}}', "").replace(
        "%cond (p: (s32[], bf16[4,16])) -> pred[] {",
        "%cond (p: (s32[], bf16[4,16])) -> pred[] {\n  %n = s32[]{:T(128)} constant(7)\n"
        "  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT",
    )
    assert [c.times for c in collectives(known)] == [35]
    assert [c.times for c in collectives(known.replace("direction=LT", "direction=GT"))] == [5]


def test_one_collective_in_several_fusions_is_one():
    line = "%ag = f32[8]{0} all-gather(%a), channel_id=4, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}"
    assert len(read(f"{line}\n  {line}")) == 1
    assert len(read(f"{line}\n  {line.replace('=4', '=5')}")) == 2


def test_a_sum_of_which_each_keeps_a_part_is_a_scatter():
    fused = """\
%all-reduce-scatter.1 (i: f32[8]) -> f32[2] {
  %all-reduce.1 = f32[8]{0} all-reduce(%i), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%cond"""
    (found,) = collectives(
        PROGRAM.replace("%cond", fused, 1)
        .replace("LINES", "%fusion = f32[2] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1")
        .replace("all-gather(%w)", "copy(%w)")
    )
    assert (found.kind, found.shape, found.bytes, found.sent) == ("reduce-scatter", (8,), 32, 24.0)


@pytest.mark.parametrize(
    "groups, pairs, axes",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", {(0, 1), (2, 3), (4, 5), (6, 7)}, ("tensor",)),
        ("{}", {tuple(range(8))}, ("data", "fsdp", "tensor")),
        ("[2,4]<=[8]", {(0, 1, 2, 3), (4, 5, 6, 7)}, ("fsdp", "tensor")),
        ("[4,2]<=[2,4]T(1,0)", {(0, 4), (1, 5), (2, 6), (3, 7)}, ("data",)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", {(0, 4), (1, 5), (2, 6), (3, 7)}, ("data",)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", {(0, 1, 4, 5), (2, 3, 6, 7)}, ("data", "tensor")),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", {(0, 4), (1, 5), (2, 6), (3, 7)}, ("data",)),
        ("mesh['a'=8] {'a':(2)2}", {(0, 2), (1, 3), (4, 6), (5, 7)}, ("fsdp",)),
        ("mesh['a'=8] {'a':(1)2}", {(0, 4), (1, 5), (2, 6), (3, 7)}, ("data",)),
    ],
)
def test_groups_in_every_notation(groups, pairs, axes):
    (found,) = read(f'%ar = f32[] all-reduce(%a), replica_groups={groups}, to_apply=%add, metadata={{op_name="a/b"}}')
    assert set(found.groups) == pairs
    assert found.axes(MESH) == axes
    assert (found.shape, found.bytes, found.times, found.source) == ((), 4, 1, "a/b")


def test_kinds():
    groups = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    two = read(f"%ar = (f32[2,3]{{1,0}}, /*index=1*/pred[5]{{0}}) all-reduce-start(%a, %b), {groups}, to_apply=%add")
    assert [(c.kind, c.shape, c.bytes, c.sent) for c in two] == [
        ("all-reduce", (2, 3), 24, 24.0),
        ("all-reduce", (5,), 5, 5.0),
    ]
    (scatter,) = read(f"ROOT %rs = f32[2,3]{{1,0}} reduce-scatter(%a), {groups}, dimensions={{1}}, to_apply=%add")
    assert (scatter.kind, scatter.shape, scatter.bytes) == ("reduce-scatter", (2, 6), 48)
    (gather,) = read(f"%g = (f32[2,3]{{1,0}}, f32[4,3]{{1,0}}) all-gather-start(%a), {groups}, dimensions={{0}}")
    assert gather.shape == (4, 3)
    (swap,) = read(f"%s = (f32[1,3], f32[1,3]) all-to-all(%a, %b), {groups}")
    assert (swap.kind, swap.shape) == ("all-to-all", (2, 1, 3))
    start = "(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a)"
    (permute,) = read(f"%p = {start}, source_target_pairs={{{{0,0}},{{1,4}},{{4,1}},{{5,5}}}}")
    assert permute.groups == ((1, 4), (4, 1)) and permute.axes(MESH) == ("data", "tensor")
    assert permute.sent == permute.bytes == 16


def test_what_stays_on_a_device_is_not_told():
    assert not read("%ar = f32[] all-reduce(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add")
    assert not read('%done = f32[] all-reduce-done(%ar), metadata={op_name="x"}')
    assert not collectives(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text())


def test_another_notation_is_an_error_and_not_silence():
    with pytest.raises(ValueError, match="no groups of devices in: %ar"):
        read("%ar = f32[] all-reduce(%a), replica_groups=@somewhere, to_apply=%add")
