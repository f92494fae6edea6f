"""Reading compiled programs: shortened texts as XLA writes them for TPU, CPU and GPU, and one that is compiled here."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from r3rag_jax.compiling import hlo, traffic, work

# A scan of 6 layers on a TPU: no known_trip_count; an asynchronous gather, which three fusions name; a reduce-scatter,
# which is an all-reduce in a fusion; a prefetch into VMEM (S(1)).
TPU = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[6,128,512]{2,1,0:T(8,128)})->f32[]}, num_partitions=4

%start.1 (param_0: bf16[128,512]) -> (bf16[128,512], bf16[512,512], u32[]) {
  %param_0 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.19 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=8, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}, metadata={op_name="jit(f)/while/body/dot_general" stack_frame_id=10}
  ROOT %custom-call.8 = (bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[512,512]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%all-gather.19), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.5 (param_0.1: bf16[128,512]) -> bf16[512,512] {
  %param_0.1 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.20 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.1), channel_id=8, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%product (param_0.2: bf16[2,256,512], param_1.2: bf16[512,512]) -> bf16[2,256,512] {
  %param_0.2 = bf16[2,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %bitcast.1 = bf16[512,512,1]{1,0,2:T(8,128)(2,1)S(1)} bitcast(%param_1.2)
  ROOT %convolution.3 = bf16[2,256,512]{2,1,0:T(8,128)(2,1)S(1)} convolution(%param_0.2, %bitcast.1), window={size=1}, dim_labels=0bf_io0->0bf
}

%all-reduce-scatter.1 (input.2: bf16[512,512]) -> bf16[128,512] {
  %input.2 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.5 = bf16[512,512]{1,0:T(8,128)(2,1)} all-reduce(%input.2), channel_id=6, replica_groups={{0,1,2,3}}, to_apply=%add.1
  %constant.9 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.38 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.5, %constant.9, %constant.9), dynamic_slice_sizes={128,512}
}

%add.1 (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %add.2 = bf16[]{:T(256)} add(%x, %y)
}

%body (arg: (s32[], bf16[128,512], bf16[2,256,512])) -> (s32[], bf16[128,512], bf16[2,256,512]) {
  %arg = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[2,256,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %copy.22 = s32[]{:T(128)S(6)} copy(%gte.0)
  %gte.1 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %gte.2 = bf16[2,256,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %async-start = (bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[512,512]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%gte.1), kind=kCustom, calls=%start.1
  %beside = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} fusion(%gte.1), kind=kCustom, calls=%async_collective_fusion.5
  %fusion.41 = bf16[2,256,512]{2,1,0:T(8,128)(2,1)S(1)} fusion(%gte.2, %beside), kind=kOutput, calls=%product
  %fusion.51 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} fusion(%beside), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/transpose/while/body/dot_general" stack_frame_id=10}
  %constant.1 = s32[]{:T(128)} constant(1)
  %add.62 = s32[]{:T(128)} add(%copy.22, %constant.1)
  ROOT %tuple.64 = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/bf16[2,256,512]{2,1,0:T(8,128)(2,1)}) tuple(%add.62, %gte.1, %gte.2)
}

%condition (arg.1: (s32[], bf16[128,512], bf16[2,256,512])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[2,256,512]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %gte.7 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %constant.103 = s32[]{:T(128)} constant(6)
  ROOT %lt.10 = pred[]{:T(512)} compare(%gte.7, %constant.103), direction=LT
}

ENTRY %main (w: bf16[128,512], h: bf16[2,256,512]) -> f32[] {
  %w = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  %h = bf16[2,256,512]{2,1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[128,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %copy.9 = bf16[2,256,512]{2,1,0:T(8,128)(2,1)} copy(%h)
  %constant.5 = s32[]{:T(128)} constant(0)
  %tuple.70 = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[2,256,512]{2,1,0:T(8,128)(2,1)}) tuple(%constant.5, %copy-done, %copy.9)
  %while.38 = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[2,256,512]{2,1,0:T(8,128)(2,1)}) while(%tuple.70), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  %constant.6 = f32[]{:T(128)} constant(0)
  ROOT %all-reduce.1 = f32[]{:T(128)} all-reduce(%constant.6), channel_id=7, replica_groups=[1,4]<=[4], to_apply=%add.1
}
"""  # noqa: E501

# A loop of 3 with a dot and an all-to-all, which other work overlaps, in the text of GPU and CPU.
GPU = """\
HloModule jit_g, num_partitions=8

%body (p: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %p = (s32[], f32[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[64,32]{1,0} get-tuple-element(%p), index=1
  %dot.1 = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %all-to-all-start = ((f32[64,32]), f32[64,32]{1,0}) async-start(%x), calls=%async_computation
  %all-to-all-done = f32[64,32]{1,0} async-done(%all-to-all-start)
  %next = s32[] fusion(%i), kind=kLoop, calls=%increment
  ROOT %tuple = (s32[], f32[64,32]{1,0}) tuple(%next, %all-to-all-done)
}

%async_computation (p.1: f32[64,32]) -> f32[64,32] {
  %p.1 = f32[64,32]{1,0} parameter(0)
  ROOT %all-to-all = f32[64,32]{1,0} all-to-all(%p.1), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%increment (p.2: s32[]) -> s32[] {
  %p.2 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %add = s32[] add(%p.2, %one)
}

%condition (p.3: (s32[], f32[64,32])) -> pred[] {
  %p.3 = (s32[], f32[64,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.3), index=0
  ROOT %done = pred[] fusion(%i.1), kind=kLoop, calls=%compare
}

%compare (p.4: s32[]) -> pred[] {
  %p.4 = s32[] parameter(0)
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%p.4, %three), direction=LT
}

ENTRY %main (x.1: f32[64,32]) -> f32[64,32] {
  %x.1 = f32[64,32]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %tuple.1 = (s32[], f32[64,32]{1,0}) tuple(%zero, %x.1)
  %while = (s32[], f32[64,32]{1,0}) while(%tuple.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %transpose = f32[32,64]{1,0} fusion(%x.1), kind=kLoop, calls=%transposed
  ROOT %out = f32[64,32]{1,0} get-tuple-element(%while), index=1
}

%transposed (p.5: f32[64,32]) -> f32[32,64] {
  %p.5 = f32[64,32]{1,0} parameter(0)
  ROOT %transpose.1 = f32[32,64]{1,0} transpose(%p.5), dimensions={1,0}
}
"""  # noqa: E501


def test_a_loop_of_a_tpu_text_runs_as_often_as_its_condition_says() -> None:
    program = hlo.read(TPU)
    entry = program.computations["main"]
    assert program.entry == "main" and program.num_partitions == 4
    assert hlo.trip_count(program, entry, entry.instructions["while.38"]) == 6
    assert program.places["body"] == (hlo.Place(6.0, ("while.38",)),)
    assert "add.1" not in program.places  # a reduction's function is no work of its own


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("constant.5 = s32[]{:T(128)} constant(0)", "constant.5 = s32[]{:T(128)} constant(2)", 4),
        ("constant.1 = s32[]{:T(128)} constant(1)", "constant.1 = s32[]{:T(128)} constant(4)", 2),
        ("direction=LT", "direction=NE", None),  # not a count
        ("add(%copy.22, %constant.1)", "multiply(%copy.22, %constant.1)", None),
    ],
)
def test_first_value_and_step_count_too(old: str, new: str, trips: int | None) -> None:
    assert old in TPU
    program = hlo.read(TPU.replace(old, new))
    entry = program.computations["main"]
    assert hlo.trip_count(program, entry, entry.instructions["while.38"]) == trips
    place = program.places["body"][0]
    assert (place.times, place.has_unknown_trips) == ((1.0, True) if trips is None else (trips, False))


def test_collectives_of_a_tpu_text() -> None:
    """An asynchronous gather counts once; an all-reduce of which each device keeps its slice is a reduce-scatter."""
    found = {item.kind: item for item in traffic.collectives(hlo.read(TPU))}
    assert found.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert len(traffic.collectives(hlo.read(TPU))) == 3
    gather, scatter, reduce = found["all-gather"], found["reduce-scatter"], found["all-reduce"]
    assert (gather.num_bytes, gather.group_size, gather.times, gather.loops) == (512 * 512 * 2, 4, 6, ("while.38",))
    assert gather.is_async and gather.op_name == "jit(f)/while/body/dot_general"
    assert (scatter.num_bytes, scatter.group_size, scatter.times, scatter.is_async) == (512 * 512 * 2, 4, 6, False)
    assert scatter.op_name == "jit(f)/transpose/while/body/dot_general"  # of the fusion
    assert (reduce.num_bytes, reduce.group_size, reduce.times, reduce.loops) == (4, 4, 1, ())
    assert gather.wire_bytes == 6 * 512 * 512 * 2 * 3 / 4 and reduce.wire_bytes == 4 * 2 * 3 / 4
    totals = traffic.totals(found.values())
    assert totals["all-gather"] == traffic.Total(6, 6 * 2**19, 6 * 2**19 * 3 / 4, 6, 6 * 2**19)
    assert totals["all-reduce"].count_in_loops == 0 and list(totals) == ["all-gather", "reduce-scatter", "all-reduce"]


def test_collectives_of_a_gpu_text() -> None:
    [found] = traffic.collectives(hlo.read(GPU))
    assert (found.kind, found.num_bytes, found.group_size, found.times) == ("all-to-all", 64 * 32 * 4, 2, 3)
    assert found.is_async and found.wire_bytes == 3 * 64 * 32 * 4 / 2


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", 3),
        ("replica_groups={}", 0),
    ],
)
def test_group_sizes(attributes: str, size: int) -> None:
    assert traffic.group_size(f", channel_id=1, {attributes}, use_global_device_ids=true") == size


def test_copies_between_memories_are_prefetches_and_do_not_count() -> None:
    [copy] = traffic.copies(hlo.read(TPU), min_bytes=1024)
    assert (copy.name, copy.num_bytes, copy.times, copy.loops) == ("copy.9", 2 * 256 * 512 * 2, 1, ())
    [transpose] = traffic.copies(hlo.read(GPU), min_bytes=1)
    assert (transpose.name, transpose.total_bytes) == ("transpose", 64 * 32 * 4)
    assert traffic.copies(hlo.read(GPU), min_bytes=64 * 32 * 4 + 1) == []


def test_operations_and_hbm_traffic_count_with_their_loop() -> None:
    assert work.flops(hlo.read(TPU)) == 6 * 2 * 512 * 512 * 512
    assert work.flops(hlo.read(GPU)) == 3 * 2 * 64 * 64 * 32
    # Entry: the prefetch reads w, the copy reads and writes h, the sum a number; a turn of the loop reads h from HBM,
    # and three numbers of its counter.
    w, h = 128 * 512 * 2, 2 * 256 * 512 * 2
    assert work.hbm_bytes(hlo.read(TPU)) == w + 2 * h + 2 * 4 + 6 * (h + 3 * 4)


def test_a_sum_that_runs_beside_a_fusion_is_none_of_its_traffic() -> None:
    """The fusion reads %a and writes its double; %g, and the sum of it over devices, it hands on."""
    text = """\
HloModule jit_s, num_partitions=4

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%start (p.0: f32[256,512]) -> (f32[256,512], f32[256,512]) {
  %p.0 = f32[256,512]{1,0} parameter(0)
  %reduce.0 = f32[256,512]{1,0} all-reduce(%p.0), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %call.0 = (f32[256,512]{1,0}, f32[256,512]{1,0}) custom-call(%p.0, %reduce.0), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: f32[256,512], p.2: f32[256,512], p.3: f32[64,64]) -> (f32[256,512], f32[256,512], f32[64,64]) {
  %p.1 = f32[256,512]{1,0} parameter(0)
  %p.2 = f32[256,512]{1,0} parameter(1)
  %reduce.1 = f32[256,512]{1,0} all-reduce(%p.1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
  %p.3 = f32[64,64]{1,0} parameter(2)
  %double = f32[64,64]{1,0} add(%p.3, %p.3)
  ROOT %tuple = (f32[256,512]{1,0}, f32[256,512]{1,0}, f32[64,64]{1,0}) tuple(%p.1, %reduce.1, %double)
}

ENTRY %main (g: f32[256,512], a: f32[64,64]) -> f32[64,64] {
  %g = f32[256,512]{1,0} parameter(0)
  %a = f32[64,64]{1,0} parameter(1)
  %begun = (f32[256,512]{1,0}, f32[256,512]{1,0}) fusion(%g), kind=kCustom, calls=%start
  %g.0 = f32[256,512]{1,0} get-tuple-element(%begun), index=0
  %g.1 = f32[256,512]{1,0} get-tuple-element(%begun), index=1
  %both = (f32[256,512]{1,0}, f32[256,512]{1,0}, f32[64,64]{1,0}) fusion(%g.0, %g.1, %a), kind=kCustom, calls=%beside
  ROOT %result = f32[64,64]{1,0} get-tuple-element(%both), index=2
}
"""  # noqa: E501
    program = hlo.read(text)
    assert work.hbm_bytes(program) == 2 * 64 * 64 * 4
    [found] = traffic.collectives(program)
    assert found.is_async and found.num_bytes == 256 * 512 * 4
    # libtpu gives one channel to all collectives of a shard_map: another of them is no part of the asynchronous one.
    line = "  %all = f32[256,512]{1,0} all-gather(%part), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}\n"
    more = text.replace("ENTRY %main (g:", "ENTRY %main (part: f32[64,512], g:")
    more = more.replace("  %begun =", "  %part = f32[64,512]{1,0} parameter(2)\n" + line + "  %begun =")
    gather, found = sorted(traffic.collectives(hlo.read(more)), key=lambda item: item.kind)
    assert (gather.kind, gather.is_async) == ("all-gather", False)
    assert (found.kind, found.is_async) == ("all-reduce", True)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # A batch of 8 products [256, 64] x [64, 512] as one convolution over a dilated dimension.
        (
            "convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            2 * 8 * 256 * 64 * 512,
        ),
        ("dot(%a, %b), lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}",
         2 * 8 * 256 * 64 * 512),
        ('custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"12"}}', 12),
    ],
)  # fmt: skip
def test_batched_products_and_kernels(line: str, flops: float) -> None:
    text = f"""\
HloModule jit_h

ENTRY %main (a: f32[8,256,64], b: f32[8,64,512]) -> f32[8,256,512] {{
  %a = f32[8,256,64]{{2,1,0}} parameter(0)
  %b = f32[8,64,512]{{2,1,0}} parameter(1)
  ROOT %c = f32[8,256,512]{{2,1,0}} {line}
}}
"""
    assert work.flops(hlo.read(text)) == flops


def test_a_fusion_reads_the_slice_that_it_takes_and_writes_what_it_updates() -> None:
    text = """\
HloModule jit_k

%layer (p0: bf16[6,512,512], p1: s32[], p2: bf16[6,8,512]) -> bf16[6,8,512] {
  %p0 = bf16[6,512,512]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[6,8,512]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,512]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,512}
  ROOT %update = bf16[6,8,512]{2,1,0} dynamic-update-slice(%p2, %slice, %p1, %zero, %zero)
}

ENTRY %main (w: bf16[6,512,512], i: s32[], h: bf16[6,8,512]) -> bf16[6,8,512] {
  %w = bf16[6,512,512]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %h = bf16[6,8,512]{2,1,0} parameter(2)
  ROOT %fusion = bf16[6,8,512]{2,1,0} fusion(%w, %i, %h), kind=kLoop, calls=%layer
}
"""
    assert work.hbm_bytes(hlo.read(text)) == 2 * 8 * 512 * 2 + 4


def test_a_prefetch_of_a_slice_reads_the_slice() -> None:
    text = """\
HloModule jit_p

ENTRY %main (w: bf16[4736,3584]) -> bf16[1184,3584] {
  %w = bf16[4736,3584]{1,0:T(8,128)(2,1)} parameter(0)
  %slice-start = (bf16[4736,3584]{1,0:T(8,128)(2,1)}, bf16[1184,3584]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(4)}) slice-start(%w), slice={[0:1184], [0:3584]}
  ROOT %slice-done = bf16[1184,3584]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
}
"""  # noqa: E501
    assert work.hbm_bytes(hlo.read(text)) == 1184 * 3584 * 2


def test_what_xla_compiles_here() -> None:
    """A scan of 5 products: XLA's own count, which has the body once, times 5."""

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    x, w = jax.ShapeDtypeStruct((16, 32), np.float32), jax.ShapeDtypeStruct((5, 32, 32), np.float32)
    program = hlo.read(jax.jit(f).lower(x, w).compile().as_text())
    assert work.flops(program) == 5 * 2 * 16 * 32 * 32
    assert traffic.collectives(program) == []


def test_a_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="must have an ENTRY computation"):
        hlo.read("HloModule jit_f\n")
