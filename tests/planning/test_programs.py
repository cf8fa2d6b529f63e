import types

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from diffusion_jax.planning import programs

HLO = """\
%region_0.2 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}
ENTRY %main (p: f32[3,3,8,16]) -> f32[] {
  %all-reduce.1 = (f32[3,3,8,16]{3,2,1,0:T(8,128)}, f32[16]{0:T(128)}, /*index=2*/f32[]{:T(128)}) \
all-reduce(%p, %q, %r), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%region_0.2, \
metadata={op_name="jit(step)/all-reduce(x)"}
  %all-reduce-start = bf16[64]{0} all-reduce-start(%w), channel_id=2, to_apply=%region_0.2
  %all-reduce-done = bf16[64]{0} all-reduce-done(%all-reduce-start)
  %all-gather-start = (s8[2,4]{1,0}, s8[8,4]{1,0}) all-gather-start(%v), dimensions={0}
  %all-gather-done = s8[8,4]{1,0} all-gather-done(%all-gather-start)
  %get-tuple-element.1 = f32[] get-tuple-element(%all-reduce.1), index=2
}
"""
CHIP = programs.Chip(flops=100e12, hbm=16 * 2**30, bandwidth=1e12, links=100e9, pod=256)


def test_collectives_and_their_bytes():
    assert programs.collectives(HLO) == {
        "all-reduce": {"count": 2, "bytes": 4 * (3 * 3 * 8 * 16 + 16 + 1) + 2 * 64},
        "all-gather": {"count": 1, "bytes": 32},
    }
    assert programs.collectives("%all-reduce-fusion = f32[3] fusion(%all-reduce.1)") == {}


@pytest.mark.parametrize(
    "shape, size",
    [
        ("f32[]", 4),
        ("(bf16[3,3]{1,0}, f32[])", 22),
        ("pred[5]", 5),
        ("s4[3]{0:T(8,128)E(4)}", 2),
        ("f8e4m3fn[7]", 7),
        ("u32[0]", 0),
    ],
)
def test_bytes_of_a_type(shape, size):
    assert programs.array_bytes(shape) == size


def test_bytes_sent_over_the_links():
    totals = {"all-reduce": {"count": 1, "bytes": 800}, "all-gather": {"count": 2, "bytes": 80}}
    assert programs.link_bytes(totals, 4) == 800 * 2 * 3 / 4 + 80 * 3 / 4
    scatter = {"reduce-scatter": {"count": 1, "bytes": 10}}  # the result on a chip is a quarter of the input
    assert programs.link_bytes(scatter, 4) == 30
    assert programs.link_bytes(totals, 1) == 0
    assert programs.link_bytes({}, 8) == 0


@pytest.mark.parametrize(
    "flops, moved, sent, seconds, bound, utilisation",
    [
        (2e12, 10e9, 0.0, 0.02, "compute", 1.0),  # 20 ms against 10 ms
        (1e12, 40e9, 0.0, 0.04, "memory", 0.25),  # 10 ms against 40 ms
        (1e12, 10e9, 3e9, 0.04, "links", 0.25),  # 10 ms, then 30 ms
        (0.0, 0.0, 0.0, 0.0, "compute", 0.0),
    ],
)
def test_roofline(flops, moved, sent, seconds, bound, utilisation):
    line = programs.roofline(CHIP, flops, moved, sent)
    assert line["seconds"] == pytest.approx(seconds)
    assert line["bound"] == bound
    assert line["utilisation"] == pytest.approx(utilisation)


def sizes(**more):
    return types.SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=90,
        alias_size_in_bytes=80,
        temp_size_in_bytes=1000,
        generated_code_size_in_bytes=7,
        **more,
    )


def test_memory_counts_donated_bytes_once():
    assert programs.memory(sizes())["peak"] == 100 + 90 - 80 + 1000 + 7
    assert programs.memory(sizes(peak_memory_in_bytes=2000))["peak"] == 2000


MOVES = """\
%fused (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  ROOT %add = f32[8]{0:T(128)} add(%a, %a)
}

%fused_slice (a: f32[4,8], b: f32[8]) -> f32[8] {
  %a = f32[4,8]{1,0:T(4,128)} parameter(0)
  %b = f32[8]{0:T(128)} parameter(1)
  %flat = f32[32]{0:T(128)} bitcast(%a)
  %first = f32[8]{0:T(128)} slice(%flat), slice={[0:8]}
  ROOT %sum = f32[8]{0:T(128)} add(%first, %b)
}

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %x = f32[8]{0:T(128)} get-tuple-element(%c), index=1
  %fast = f32[8]{0:T(128)S(1)} fusion(%x), kind=kLoop, calls=%fused
  %y = f32[8]{0:T(128)} fusion(%fast, %x), kind=kLoop, calls=%fused
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%i, %y)
}

ENTRY %main.1_spmd (p: f32[8], q: f32[4,8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %q = f32[4,8]{1,0:T(4,128)} parameter(1)
  %copy-start = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%p), metadata={op_name="%q"}
  %copy-done = f32[8]{0:T(128)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[4,8]{1,0:T(4,128)}), f32[1,8]{1,0:T(4,128)S(1)}, s32[]{:S(2)}) slice-start(%q), slice={[0:1]}
  %slice-done = f32[1,8]{1,0:T(4,128)S(1)} slice-done(%slice-start)
  %row = f32[1,8]{1,0:T(4,128)} slice(%q), slice={[0:1], [0:8]}
  %part = f32[8]{0:T(128)} fusion(%q, %p), kind=kLoop, calls=%fused_slice
  %all = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%init), condition=%condition, body=%body
  %out = f32[8]{0:T(128)} get-tuple-element(%all), index=1
  ROOT %sum = f32[8]{0:T(128)} fusion(%out, %copy-done, %slice-done), kind=kLoop, calls=%fused
}
"""


def test_bytes_of_the_chips_memory():
    """Each array has 32 bytes, except q, which has 128 bytes and is read in part.

    Outside the loop: 1 for the copy, 1 and 2 for the slices, 3 for the fusion with a slice, 2 for the sum.
    Inside: 1 and 2 for the fusions.
    """
    assert programs.hbm_bytes(MOVES) == (9 * 32, 3 * 32)
    both = MOVES.replace("f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32", "f32[8]{0:T(128)}, f32[8]{0:T(128)}, u32")
    assert programs.hbm_bytes(both)[0] == 10 * 32  # a copy within the HBM is read and written
    whole = MOVES.replace("add(%first, %b)", "add(%first, %a)")
    assert programs.hbm_bytes(whole)[0] == 9 * 32 + 128 - 32  # q is read whole


def test_hbm_bytes_inside_the_loops_of_a_compiled_program():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)

    def loop(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=50)[0]

    outside, inside = programs.hbm_bytes(jax.jit(loop).lower(x).compile().as_text())
    assert inside >= 8000 > outside - 2 * 8000  # an iteration reads and writes x; outside the loop x may be copied


def test_flops_of_a_known_program():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    program = jax.jit(lambda x: x @ x).lower(x).compile()
    needs = programs.needs(program, CHIP, 1)
    assert needs["per_chip"]["flops"] == pytest.approx(2 * 64**3, rel=0.01)
    assert needs["memory"]["arguments"] == needs["memory"]["outputs"] == 4 * 64**2
    assert needs["collectives"] == {}
    assert needs["roofline"]["compute_seconds"] == needs["per_chip"]["flops"] / CHIP.flops
    assert programs.memory_needed(program) == needs["memory"]["peak"] >= 4 * 2 * 64**2


@pytest.mark.parametrize("options", [{}, {"strides": 2}, {"kernel_dilation": 2}, {"feature_group_count": 2}])
@pytest.mark.parametrize("argument", [None, 0, 1])
def test_model_flops_of_a_convolution_are_those_of_its_definition(options, argument):
    """XLA counts the same for the CPU."""
    conv = nn.Conv(6, (3, 3), use_bias=False, **options)
    given = jnp.ones((2, 7, 10, 4)), jnp.ones((3, 3, 4 // options.get("feature_group_count", 1), 6))

    def run(x, kernel):
        return conv.apply({"params": {"kernel": kernel}}, x)

    program, arguments = run, given
    if argument is not None:  # the gradient
        parts = [lambda x: run(x, given[1]), lambda kernel: run(given[0], kernel)]
        program, arguments = jax.linear_transpose(parts[argument], given[argument]), (run(*given),)
    counted = jax.jit(program).lower(*arguments).cost_analysis()["flops"]
    assert programs.model_flops(jax.make_jaxpr(program)(*arguments).jaxpr) == counted > 10_000


def test_model_flops_of_products_in_loops_and_on_a_device():
    def program(x):
        y = jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]
        return jnp.einsum("bij,bjk->bik", y[None], y[None, :, :7])

    flops = 2 * 8 * 8 * (5 * 8 + 7)
    assert programs.model_flops(jax.make_jaxpr(program)(jnp.ones((8, 8))).jaxpr) == flops
    mapped = jax.pmap(program)
    assert programs.model_flops(jax.make_jaxpr(mapped)(jnp.ones((4, 8, 8))).jaxpr) == flops


def raises(error):
    def analysis():
        raise error

    return analysis


@pytest.mark.parametrize(
    "analysis",
    [
        lambda: None,
        lambda: "another structure",
        raises(NotImplementedError()),
        raises(jax.errors.JaxRuntimeError("INTERNAL: a bug")),
    ],
)
def test_training_needs_no_analysis(analysis):
    """The functions of part 1 read no HLO text, and return None for a backend without the analyses."""
    program = types.SimpleNamespace(memory_analysis=analysis)
    assert programs.memory_needed(program) is None
    assert programs.memory_needed(types.SimpleNamespace(memory_analysis=sizes)) == 100 + 90 - 80 + 1000 + 7


def test_loop_iterations_and_steps():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    program = jax.jit(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=10)[0]).lower(x).compile()
    assert programs.needs(program, None, 1, 10)["per_chip"]["flops"] == pytest.approx(10 * 2 * 64**3, rel=0.01)
    assert programs.needs(program, None, 1, 10, 10)["per_chip"]["flops"] == pytest.approx(2 * 64**3, rel=0.01)


class FailingLowered:
    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_compiled_tells_a_lack_of_memory_from_other_errors():
    full = (
        "RESOURCE_EXHAUSTED: CompileTimeHbmOom: the total memory required for HLO temporaries "
        "(17.91G) exceeds available HBM (15.75G)."
    )
    with pytest.raises(programs.DoesNotFit) as error:
        programs.compiled(FailingLowered(full))
    assert programs.shortage(error.value).endswith("HLO temporaries (17.91G) exceeds available HBM (15.75G)")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        programs.compiled(FailingLowered("INTERNAL: a bug"))


def test_chips_by_the_device_kinds_of_jax():
    assert programs.chip_of(types.SimpleNamespace(device_kind="TPU v5 lite")) == programs.CHIPS["v5e"]
    assert programs.chip_of(jax.devices()[0]) is None
    assert programs.room(types.SimpleNamespace(device_kind="TPU v4", memory_stats=lambda: None)) == 32 * 2**30
    gpu = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: {"bytes_limit": 7})
    assert programs.room(gpu) == 7 and programs.chip_of(gpu).flops == 989.4e12
