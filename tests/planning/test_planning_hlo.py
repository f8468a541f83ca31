"""Reading the compiler's program: what runs how often, and from where. Texts are cut from real ones of libtpu 0.0.42."""

import pytest

from gigagan_jax.planning import op_profile, roofline
from gigagan_jax.planning.hlo import HloModule, shape_bytes


def timed(cycles, model="CLASSIC"):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}","cost_model_type":"COST_MODEL_TYPE_{model}"}}}}'


BODY = f"""
%fused (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %inside = f32[4]{{0}} add(%p, %p), {timed(999)}
}}

%body (arg: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {{
  %arg = (s32[]{{:T(128)}}, f32[4]{{0:T(8,128)}}, /*index=2*/s32[]{{:T(128)}}) parameter(0)
  %gte.0 = s32[]{{:T(128)}} get-tuple-element(%arg), index=0
  %gte.1 = f32[4]{{0}} get-tuple-element(%arg), index=1
  %one = s32[]{{:T(128)}} get-tuple-element(%arg), index=2
  %next = s32[]{{:T(128)}} add(%gte.0, %one)
  %work = f32[4]{{0}} fusion(%gte.1), kind=kOutput, calls=%fused, {timed(100)}
  ROOT %out = (s32[], f32[4], s32[]) tuple(%next, %work, %one)
}}
"""
COMPARE = """
%cond (arg.1: (s32[], f32[4], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %arg.1 = (s32[]{:T(128)}, f32[4]{0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}
"""
ENTRY = """
ENTRY %main (x: f32[4]) -> f32[4] {
  %zero = s32[]{:T(128)} constant(START)
  %step = s32[]{:T(128)} constant(STEP)
  %x = f32[4]{0:T(8,128)} parameter(0)
  %copied = s32[]{:T(128)} copy(%zero)
  %state = (s32[], f32[4], s32[]) tuple(%copied, %x, %step)
  %loop = (s32[]{:T(128)}, f32[4]{0:T(8,128)}, s32[]{:T(128)}) while(%state), condition=%cond, body=%body, NOTE
  ROOT %result = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def program(condition=COMPARE, start=0, step=1, note="metadata={}"):
    entry = ENTRY.replace("START", str(start)).replace("STEP", str(step)).replace("NOTE", note)
    return HloModule("HloModule jit__run, is_scheduled=true\n" + BODY + condition + entry)


def cycles(module):
    return sum((r.instruction.estimated_cycles or 0) * r.times for r in module.executed_instructions())


@pytest.mark.parametrize(
    "changes, turns",
    [
        ({}, 12),
        ({"start": 2}, 10),
        ({"step": 5}, 3),
        ({"condition": COMPARE.replace("direction=LT", "direction=LE")}, 13),
        ({"condition": COMPARE.replace("(%counter, %limit), direction=LT", "(%limit, %counter), direction=GT")}, 12),
        ({"note": 'backend_config={"known_trip_count":{"n":"7"}}'}, 7),
    ],
)
def test_bodies_of_loops_count_by_their_turns(changes, turns):
    module = program(**changes)
    assert cycles(module) == 100 * turns
    assert module.unknown_loops == []


def test_a_condition_inside_of_a_fusion():
    inner = """
%compared (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt.1 = pred[] compare(%a, %b), direction=LT
}
"""
    condition = COMPARE.replace("compare(%counter, %limit), direction=LT", "fusion(%counter, %limit), calls=%compared")
    assert cycles(program(inner + condition)) == 1200


def test_a_loop_that_nobody_can_count_is_said_to_be_one():
    module = program(COMPARE.replace("direction=LT", "direction=NE"))
    assert cycles(module) == 100
    assert module.unknown_loops == ["loop"]


def test_calls_conditionals_and_missing_estimates():
    text = f"""
%cheap (p.1: f32[4]) -> f32[4] {{
  ROOT %a = f32[4]{{0}} negate(%p.1), {timed(5)}
}}

%dear (p.2: f32[4]) -> f32[4] {{
  ROOT %b = f32[4]{{0}} copy(%p.2), {timed(70, "INVALID")}
}}

ENTRY %main (x: f32[4], c: pred[]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  %either = f32[4]{{0}} conditional(%c, %x, %x), branch_computations={{%cheap, %dear}}
  %same = f32[4]{{0}} conditional(%c, %x, %x), true_computation=%cheap, false_computation=%cheap
  %called = f32[4]{{0}} call(%x), to_apply=%cheap
  %later = ((f32[4]{{0}}), f32[4]{{0}}) async-start(%x), calls=%dear
  %done = f32[4]{{0}} async-done(%later)
  ROOT %none = f32[4]{{0}} fusion(%x), kind=kLoop, calls=%cheap, {timed(2**64 - 1)}
}}
"""
    module = HloModule(text)
    assert cycles(module) == 70 + 5 + 5 + 70
    runs = {r.instruction.name: r.instruction for r in module.executed_instructions()}
    assert runs["none"].estimated_cycles is None
    assert runs["a"].uses_matrix_units
    assert not runs["b"].uses_matrix_units


@pytest.mark.parametrize(
    "shape, size_in_bytes",
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("s32[]{:T(128)}", 4),
        ("(bf16[4]{0}, /*index=1*/f8e4m3fn[4]{0}, pred[3]{0}, s4[3]{0}, token[])", 8 + 4 + 3 + 2),
    ],
)
def test_sizes(shape, size_in_bytes):
    assert shape_bytes(shape) == size_in_bytes


TABLES = """HloModule jit__run

FileNames
1 "/some/where/gigagan_jax/training/step.py"
2 "/some/where/gigagan_jax/models/generator.py"
3 "/some/where/gigagan_jax/models/layers/equalized.py"
4 "/some/where/gigagan_jax/models/layers/adaptive_conv.py"

FunctionNames
1 "TrainStep.g_loss"
2 "Generator.synthesize"
3 "run.<locals>.<lambda>"
4 "SynthesisBlock.__call__"
5 "AdaptiveConv.__call__"
6 "demodulation"
7 "_update"

FileLocations
1 {file_name_id=1 function_name_id=1 line=211 end_line=211 column=20 end_column=20}
2 {file_name_id=2 function_name_id=2 line=171 end_line=171 column=20 end_column=20}
3 {file_name_id=3 function_name_id=3 line=173 end_line=173 column=20 end_column=20}
4 {file_name_id=2 function_name_id=4 line=97 end_line=97 column=20 end_column=20}
5 {file_name_id=4 function_name_id=5 line=140 end_line=140 column=20 end_column=20}
6 {file_name_id=4 function_name_id=6 line=40 end_line=40 column=20 end_column=20}
7 {file_name_id=1 function_name_id=7 line=330 end_line=330 column=20 end_column=20}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=4}
5 {file_location_id=5 parent_frame_id=5}
6 {file_location_id=6 parent_frame_id=6}
7 {file_location_id=7 parent_frame_id=1}

"""


def operation(name, op_name, frame, count):
    return (
        f'  %{name} = f32[4]{{0}} negate(%x), metadata={{op_name="{op_name}" stack_frame_id={frame}}}, {timed(count)}\n'
    )


def test_operations_get_the_names_of_their_modules():
    scan = "jit(_run)/transpose(jvp(64px))/while/body/closed_call/checkpoint"
    module = HloModule(
        TABLES
        + "ENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n"
        + operation("a", "jit(_run)/jvp(64px)/while/body/closed_call/checkpoint/dot_general", 6, 100)
        + operation("b", f"{scan}/rematted_computation/dot_general", 6, 200)
        + operation("c", f"{scan}/dot_general", 6, 300)
        + operation("d", "jit(_run)/sub", 7, 50)
        + operation("e", "jit(_run)/jvp(clip_loss)/dot_general", 1, 150)
        + operation("f", "", 0, 200)
        + "}\n"
    )
    assert module.call_stack(6)[0] == ("step", "TrainStep.g_loss")
    assert module.call_stack(6)[-1] == ("adaptive_conv", "demodulation")
    timed = [
        (r, r.instruction.estimated_cycles * r.times / 1000.0)
        for r in module.executed_instructions()
        if r.instruction.estimated_cycles
    ]
    rows = op_profile.seconds_by_module(module, timed)
    assert rows[0] == {
        "module": "generator/64px/SynthesisBlock/AdaptiveConv/demodulation",
        "seconds": pytest.approx(0.6),
        "share": pytest.approx(0.6),
        "forward": pytest.approx(0.1),
        "recomputed": pytest.approx(0.2),
        "backward": pytest.approx(0.3),
    }
    assert {r["module"]: r["seconds"] for r in rows[1:]} == {
        "other": pytest.approx(0.2),
        "clip_loss/step/g_loss": pytest.approx(0.15),
        "step/update": pytest.approx(0.05),
    }
    assert op_profile.seconds_by_loss(timed) == {
        "G, D and the rest": pytest.approx(0.85),
        "clip_loss": pytest.approx(0.15),
    }


# ---------------------------------------------------------------- roofs


def convolution(left, right, out, window, labels):
    """FLOPs of one, by the planner."""
    text = (
        f"ENTRY %main (a: f32[1]) -> f32[1] {{\n  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
        f"  ROOT %c = {out} convolution(%a, %b), {window}dim_labels={labels}\n}}\n"
    )
    module = HloModule(text)
    (run,) = [r for r in module.executed_instructions() if r.instruction.opcode == "convolution"]
    return roofline.instruction_flops(module, "main", run.instruction)


@pytest.mark.parametrize(
    "shapes, window, labels, expected",
    [
        # a matrix product
        (("bf16[16,64]", "bf16[64,32]", "bf16[16,32]"), "", "bf_io->bf", 2 * 16 * 64 * 32),
        # 3 x 3, 'same': at the border fewer taps meet the image
        (
            ("bf16[2,8,8,4]", "bf16[3,3,4,5]", "bf16[2,8,8,5]"),
            "window={size=3x3 pad=1_1x1_1}, ",
            "b01f_01io->b01f",
            2 * 2 * 5 * 4 * 22 * 22,
        ),
        # stride two
        (
            ("bf16[2,9,9,4]", "bf16[3,3,4,5]", "bf16[2,4,4,5]"),
            "window={size=3x3 stride=2x2}, ",
            "b01f_01io->b01f",
            2 * 2 * 5 * 4 * 12 * 12,
        ),
        # a batched product, as the TPU's compiler writes it: one tap of sixteen meets an input
        (
            ("bf16[16,64,8]", "bf16[16,8,5]", "bf16[16,64,5]"),
            "window={size=16 stride=15 lhs_dilate=16}, ",
            "0bf_0io->0bf",
            2 * 16 * 64 * 8 * 5,
        ),
    ],
)
def test_flops_of_a_convolution(shapes, window, labels, expected):
    assert convolution(*shapes, window, labels) == expected


def test_a_roof_is_only_for_matrix_operations_and_never_above_the_cycles():
    work = 2 * 1024**3
    line = (
        '  ROOT %c = f32[1024,1024]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, backend_config={"window_config":'
        '{"estimated_cycles":"CYCLES","cost_model_type":"KIND"}}\n'
    )

    def seconds(cycles, kind, peak, bandwidth):
        text = (
            "ENTRY %main (a: f32[1]) -> f32[1] {\n  %a = f32[1024,1024]{1,0} parameter(0)\n"
            "  %b = f32[1024,1024]{1,0} parameter(1)\n"
            + line.replace("CYCLES", str(cycles)).replace("KIND", kind)
            + "}\n"
        )
        module = HloModule(text)
        (run,) = [r for r in module.executed_instructions() if r.instruction.estimated_cycles]
        return roofline.expected_seconds(module, run, 1000.0, peak, bandwidth)

    matrix = "COST_MODEL_TYPE_CLASSIC"
    assert seconds(5000, matrix, work, 1e12) == pytest.approx(1.0)  # FLOPs at the peak
    assert seconds(5000, matrix, 1e15, 3 * 4 * 1024**2 / 2) == pytest.approx(2.0)  # bytes
    assert seconds(500, matrix, work, 1e12) == pytest.approx(0.5)  # cycles
    assert seconds(5000, "OTHER", work, 1e12) == pytest.approx(5.0)
