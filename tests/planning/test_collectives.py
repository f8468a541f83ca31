"""What a chip sends, from the compiled program. Texts are cut from real ones of libtpu 0.0.42."""

import pytest

from gigagan_jax.planning.collectives import find_collectives, replica_groups, summarize_collectives
from gigagan_jax.planning.hlo import HloModule


def parse_entry(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    return HloModule(
        f"{before}\nENTRY %main (x: f32[256]) -> f32[256] {{\n  %x = f32[256]{{0}} parameter(0)\n{body}\n}}\n"
    )


def find_only(module, devices=4, slices=None):
    (found,) = find_collectives(module, slices or [0] * devices)
    return found


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8], to_apply=%add", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x=1", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x=1", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0','axis_1'}, x=1", [list(range(8))]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}, x=1", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("source_target_pairs={{0,1},{1,2},{2,3}}, x=1", [[0, 1], [1, 2], [2, 3]]),
        ("replica_groups={}, to_apply=%add", [list(range(8))]),
    ],
)
def test_groups_in_every_form(text, groups):
    assert replica_groups(text, 8) == groups


GROUPS = "channel_id=1, replica_groups={{0,1,2,3}}"


@pytest.mark.parametrize(
    "line, kind, sent",
    [
        ("%r = f32[256]{0:T(256)} all-reduce(%x)", "all-reduce", 2 * 3 / 4 * 1024),
        ("%r = (f32[256]{0}, bf16[4,2]{1,0:T(8,128)(2,1)}) all-reduce(%x, %y)", "all-reduce", 2 * 3 / 4 * 1040),
        ("%r = f32[1024]{0} all-gather(%x)", "all-gather", 3 / 4 * 4096),
        ("%r = (f32[256]{0}, f32[1024]{0}) all-gather-start(%x)", "all-gather", 3 / 4 * 4096),
        ("%r = f32[64]{0} reduce-scatter(%x)", "reduce-scatter", 3 / 4 * 1024),
        ("%r = f32[256]{0} all-to-all(%x)", "all-to-all", 3 / 4 * 1024),
    ],
)
def test_bytes_that_a_chip_sends(line, kind, sent):
    found = find_only(parse_entry(f"{line}, {GROUPS}"))
    assert (found.kind, found.bytes_sent, found.group_size, found.times) == (kind, pytest.approx(sent), 4, 1)
    assert found.overlapped == ("-start" in line)


def test_a_permutation_and_its_end_are_one():
    found = find_only(
        parse_entry(
            "%s = (f32[256]{0}, f32[256]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, "
            "source_target_pairs={{0,1},{1,2},{2,3}}",
            "%d = f32[256]{0} collective-permute-done(%s)",
        )
    )
    assert (found.kind, found.bytes_sent, found.overlapped) == ("collective-permute", 1024, True)


def test_a_fused_sum_of_which_a_part_is_kept_is_a_reduce_scatter():
    fused = (
        "%all-reduce-scatter.1 (input: f32[256]) -> f32[64] {\n  %input = f32[256]{0} parameter(0)\n"
        f"  %sum = f32[256]{{0}} all-reduce(%input), {GROUPS}\n"
        "  ROOT %part = f32[64]{0} dynamic-slice(%sum, %at), dynamic_slice_sizes={64}\n}\n"
    )
    found = find_only(
        parse_entry("%f = f32[64]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1", before=fused)
    )
    assert (found.kind, found.bytes_sent) == ("reduce-scatter", pytest.approx(3 / 4 * 1024))


def test_fusions_that_share_an_asynchronous_gather_count_once_and_in_loops_by_turns():
    gather = f'all-gather(%p), {GROUPS}, backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}'
    fused = "".join(
        f"%fused_{n} (p: f32[256]) -> f32[1024] {{\n  %p = f32[256]{{0}} parameter(0)\n"
        f"  ROOT %g.{n} = f32[1024]{{0}} {gather}\n}}\n"
        for n in "abc"
    )
    body = (
        "%body (s: f32[256]) -> f32[256] {\n  %s = f32[256]{0} parameter(0)\n"
        + "".join(f"  %f.{n} = f32[1024]{{0}} fusion(%s), kind=kCustom, calls=%fused_{n}\n" for n in "abc")
        + "}\n"
    )
    loop = '%w = f32[256]{0} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    found = find_only(parse_entry(loop, before=fused + body))
    assert (found.kind, found.times, found.overlapped) == ("all-gather", 5, True)
    assert summarize_collectives([found]) == [
        {
            "kind": "all-gather",
            "network": "inside a slice",
            "bytes_sent": 5 * 3072.0,
            "bytes_overlapped": 5 * 3072.0,
            "exchanges": 5,
            "largest_group": 4,
        }
    ]


def test_what_goes_between_slices_is_apart():
    line = "%r = f32[256]{0} all-reduce(%x), replica_groups={{0,2},{1,3}}"
    assert find_only(parse_entry(line), slices=[0, 0, 1, 1]).crosses_slices
    assert not find_only(parse_entry(line), slices=[0, 1, 0, 1]).crosses_slices
    by_hosts = (
        "%s = (f32[256]{0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    found = find_only(parse_entry(by_hosts, "%d = token[] send-done(%s)"), slices=[0, 0, 1, 1])
    assert (found.kind, found.bytes_sent, found.crosses_slices, found.overlapped) == ("all-reduce", 1024, True, True)
    assert find_collectives(parse_entry("%s = (f32[4]{0}, u32[], token[]) send(%x, %t), channel_id=2"), [0, 0]) == []
