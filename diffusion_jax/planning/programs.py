"""Memory, FLOPs and traffic of compiled programs, in two parts.

1. Chips, compilation, memory and FLOPs. Training uses this part, and --mode=plan does too. It asks JAX's own
   `memory_analysis`, and returns None if a backend does not answer.
2. Traffic and the roofline, counted in the HLO text of the program. The text has no stable format, so
   --mode=plan alone uses this part: a train step must not depend on it.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.errors import one_line

# ---------------------------------------------------------------------------- 1. chips, compilation, memory and FLOPs


class Chip(NamedTuple):
    """The published performance of a device, which is a chip or a part of one, and the number of chips in a pod."""

    flops: float  # bfloat16 operations per second
    hbm: int  # bytes
    bandwidth: float  # of the HBM, bytes per second
    links: float  # to all other chips together, in one direction, bytes per second
    pod: int  # chips
    devices: int = 1  # of JAX in a chip


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. The pages give the bandwidth of the links in both directions,
# twice the value here. They give none for v4, whose 6 links have 50 GB/s each. A chip of TPU7x is two devices, each
# with half of the chip's numbers.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, 4096),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 256),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 8960),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 256),
    "tpu7x": Chip(2307e12 / 2, 96 * 2**30, 7380e9 / 2, 600e9 / 2, 9216, devices=2),
}
# JAX's names of the devices. NVIDIA's data sheets give twice these FLOPs, for matrices half of which is zero.
_KINDS = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "TPU7x": CHIPS["tpu7x"],
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * 2**30, 1555e9, 300e9, 1),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * 2**30, 2039e9, 300e9, 1),
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, 80 * 2**30, 3350e9, 450e9, 1),
    "NVIDIA H200": Chip(989.4e12, 141 * 10**9, 4800e9, 450e9, 1),
    "NVIDIA L4": Chip(121e12, 24 * 2**30, 300e9, 32e9, 1),
}


def chip_of(device: jax.Device) -> Chip | None:
    """Returns the Chip of a device, or None if it is not known."""
    return _KINDS.get(device.device_kind)


def room(device: jax.Device) -> int | None:
    """Returns the bytes of a device's memory, or None if the device does not report them."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):  # on a GPU, what JAX takes of the memory
        return limit
    return chip.hbm if (chip := chip_of(device)) else None


class DoesNotFit(Exception):
    """Reports that a program needs more memory than the chip has, with the compiler's message."""


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Returns `lowered.compile()`.

    Raises:
      DoesNotFit: the program needs more memory than the chip has.
      jax.errors.JaxRuntimeError: the compiler fails for another reason.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = one_line(error)
        if "CompileTimeHbmOom" in message or ("RESOURCE_EXHAUSTED" in message and "exceeds available" in message):
            raise DoesNotFit(message) from None
        raise


def shortage(error: DoesNotFit) -> str:
    """Returns the needed and the available size as the compiler's message states them."""
    size = r"[\w ]+\([\d.]+[KMGT]\)"
    match = re.search(f"{size} exceeds{size}", str(error))
    return match[0].strip() if match else str(error)[:200]


def memory_needed(program: jax.stages.Compiled) -> int | None:
    """Returns the peak bytes of a program on one chip, or None if the backend does not report them."""
    sizes = _analysis(program.memory_analysis)
    try:
        return memory(sizes)["peak"]
    except AttributeError:  # None, or a type without sizes: JAX promises no structure
        return None


def model_flops(jaxpr: Any) -> float:
    """Returns the FLOPs of the matrix products and convolutions of a jaxpr, without those with padding.

    Compilers for GPUs do not report the FLOPs of the libraries that they call. Each iteration of a `lax.scan` counts,
    and one of a `lax.while_loop`.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        params, name = equation.params, equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            left, right = (variable.aval.shape for variable in equation.invars)
            out = equation.outvars[0].aval.shape
            if name == "dot_general":
                total += 2 * math.prod(out) * math.prod(left[axis] for axis in params["dimension_numbers"][0][0])
            else:
                total += _conv_flops(left, right, out, params)
        inner = [sub for value in params.values() for sub in (value if isinstance(value, tuple) else (value,))]
        jaxprs = [getattr(sub, "jaxpr", sub) for sub in inner]
        total += params.get("length", 1) * sum(model_flops(sub) for sub in jaxprs if hasattr(sub, "eqns"))
    return total


def _conv_flops(left, right, out, params):
    """Returns the FLOPs of a convolution of arrays of these shapes, with the parameters of its primitive."""
    numbers = params["dimension_numbers"]
    products = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * right[numbers.rhs_spec[1]]
    for i, (stride, (low, _)) in enumerate(zip(params["window_strides"], params["padding"], strict=True), 2):
        size, dilation = left[numbers.lhs_spec[i]], params["lhs_dilation"][i - 2]
        taps = np.arange(right[numbers.rhs_spec[i]]) * params["rhs_dilation"][i - 2]
        at = np.add.outer(np.arange(out[numbers.out_spec[i]]) * stride - low, taps)
        products *= int(np.sum((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)))
    return 2 * products


def _analysis(analyse):
    """Returns the result of an optional analysis, or None if the backend fails to make it."""
    try:
        return analyse()
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return None


def memory(sizes: Any) -> dict[str, int]:
    """Returns the bytes that a program takes on a chip, by kind, and their "peak".

    The peak is the larger of the compiler's own and the sum of the kinds, which counts donated memory once.

    Args:
      sizes: the result of `memory_analysis`.
    """
    parts = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]
    return parts | {"peak": max(total, getattr(sizes, "peak_memory_in_bytes", 0))}


# ---------------------------------------------------------------------------- 2. traffic and the roofline

COUNTING = 1  # version of `needs` in the cache of plans; increase it when `needs` counts differently


def needs(
    program: jax.stages.Compiled, chip: Chip | None, num_chips: int, loop_iterations: int = 1, steps: int = 1
) -> dict[str, Any]:
    """Returns the FLOPs, memory and traffic of a program, read from its analyses and its HLO text.

    Args:
      program: compiled for `num_chips` chips.
      chip: the chip of the roofline; None leaves the roofline out.
      loop_iterations: iterations of the program's loops, whose bodies the compiler counts once.
      steps: the number of steps that the program takes; "per_chip" is for one step.

    Returns:
      "per_chip": FLOPs, bytes moved to and from the HBM, and bytes sent over the links; "memory": see
      `memory`; "collectives": see `collectives`; "roofline": see `roofline`, None without a chip;
      "optimal_seconds": the compiler's own estimate, None unless it is positive.
    """
    hlo, cost = program.as_text() or "", program.cost_analysis() or {}
    sent = collectives(hlo)
    outside, inside = hbm_bytes(hlo)
    per_chip = {
        # Treats all FLOPs as inside the loops: there is little to compute outside them.
        "flops": max(cost.get("flops", 0.0), 0.0) * loop_iterations / steps,
        "hbm_bytes": (outside + inside * loop_iterations) / steps,
        "link_bytes": link_bytes(sent, num_chips),
    }
    optimal = cost.get("optimal_seconds", 0.0)
    return {
        "per_chip": per_chip,
        "memory": memory(program.memory_analysis()),
        "collectives": sent,
        "roofline": roofline(chip, **per_chip) if chip else None,
        "optimal_seconds": optimal if optimal > 0 else None,  # some compilers return a negative number
    }


def roofline(chip: Chip, flops: float, hbm_bytes: float, link_bytes: float) -> dict[str, float | str]:
    """max(FLOPs / bf16 peak, bytes / HBM bandwidth) + link bytes / links, the least time of a program on a chip.

    This is an estimate: real programs do not reach the peak (float32 less so), and part of the
    communication hides behind the computation.

    Returns:
      "compute_seconds", "memory_seconds", "links_seconds" and the "seconds" of the formula; "bound": the largest
      of the three ("compute", "memory" or "links"); "utilisation": the share of the peak at this speed.
    """
    parts = {"compute": flops / chip.flops, "memory": hbm_bytes / chip.bandwidth, "links": link_bytes / chip.links}
    seconds = max(parts["compute"], parts["memory"]) + parts["links"]
    return {
        **{f"{name}_seconds": part for name, part in parts.items()},
        "seconds": seconds,
        "bound": max(parts, key=parts.__getitem__),
        "utilisation": parts["compute"] / seconds if seconds else 0.0,
    }


_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-broadcast|collective-permute)(-done)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")  # type, bits, dimensions, layout


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Returns the messages between chips, by kind: {"all-reduce": {"count": 3, "bytes": 142985228}, …}.

    Each collective counts once, also inside a loop. The bytes are those of the results on one chip; an
    asynchronous pair counts at its "-done".
    """
    totals: dict[str, dict[str, int]] = {}
    for shapes, name, _ in _COLLECTIVE.findall(hlo):
        entry = totals.setdefault(name, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += array_bytes(shapes)
    return totals


def array_bytes(shapes: str) -> int:
    """Returns the bytes of the arrays of an HLO type, e.g. 22 for "(bf16[3,3]{1,0}, f32[])"."""
    return sum(map(_size, _ARRAY.findall(shapes)))


def _size(array):
    """Returns the bytes of one match of _ARRAY."""
    _, bits, dims, _ = array
    return -(-math.prod(int(n) for n in dims.split(",") if n) * int(bits or 8) // 8)


def link_bytes(totals: dict[str, dict[str, int]], num_chips: int) -> float:
    """Returns the least bytes that a chip sends for the totals of `collectives`.

    An all-reduce of b bytes among n chips sends 2 b (n − 1)/n.
    """
    share = (num_chips - 1) / num_chips
    factors = {"all-reduce": 2 * share, "reduce-scatter": num_chips - 1, "collective-permute": 1.0}
    return sum(entry["bytes"] * factors.get(name, share) for name, entry in totals.items())


_INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_SLICES = {"slice", "dynamic-slice", "gather"}  # these read as much of their first operand as they return
_NO_TRAFFIC = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call"}


def hbm_bytes(hlo: str) -> tuple[float, float]:
    """Returns the bytes moved to and from the chip's memory: (outside the loops, in one iteration of each loop).

    Each instruction reads its operands and writes its result. Arrays that the compiler has put into the
    vector memory on the chip (S(1) in the layout) do not count. An operand that is only sliced, in a
    fusion too, counts as its slices; an asynchronous copy or slice counts as the bytes that it moves.
    This is an estimate: an instruction may read an operand twice, or only a part of it.
    """
    names = re.split(r"^(?:ENTRY )?(%[\w.\-]+) \(.*\{$", hlo, flags=re.MULTILINE)
    bodies = dict(zip(names[1::2], names[2::2], strict=True))
    entry = re.findall(r"^ENTRY (%[\w.\-]+)", hlo, re.MULTILINE)[0]
    totals, pending, visited = [0.0, 0.0], [(entry, 0)], set()
    while pending:
        name, in_loop = pending.pop()
        if name not in visited:
            visited.add(name)
            totals[in_loop] += _traffic(bodies[name], bodies)
            pending += [(body, 1) for body in re.findall(r"\bbody=(%[\w.\-]+)", bodies[name])]
            pending += [(callee, in_loop) for callee in _callees(bodies[name])]
    return totals[0], totals[1]


def _callees(computation):
    """Returns the computations that calls and branches enter; a fusion or a reduction is one instruction."""
    calls = re.findall(r" call\(.*\bto_apply=(%[\w.\-]+)", computation)
    either = re.findall(r"\b(?:true_computation|false_computation)=(%[\w.\-]+)", computation)
    branches = re.findall(r"branch_computations=\{(.*?)\}", computation)
    return calls + either + [name for names in branches for name in names.split(", ")]


def _traffic(computation, bodies):
    """Returns the bytes that the instructions of one computation move."""
    total, in_hbm = 0.0, {}
    for line in computation.splitlines():
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, shape, opcode, rest = match.groups()
        arrays = [(_size(array), "S(" not in (array[3] or "")) for array in _ARRAY.findall(shape)]
        in_hbm[name] = sum(size for size, hbm in arrays if hbm)
        if opcode in ("copy-start", "slice-start"):
            sides = [(size, hbm) for size, hbm in arrays if size > 4]  # an array of 4 bytes is a semaphore
            total += min((size for size, _ in sides), default=0) * sum(hbm for _, hbm in sides)
        elif opcode not in _NO_TRAFFIC and not opcode.endswith("-done"):
            sliced = {0: array_bytes(shape)} if opcode in _SLICES else {}
            if opcode == "fusion":
                sliced = _sliced_operands(bodies[re.search(r"\bcalls=(%[\w.\-]+)", rest)[1]])
            reads = [min(in_hbm.get(operand, 0), sliced.get(i, math.inf)) for i, operand in enumerate(_operands(rest))]
            total += in_hbm[name] + sum(reads)
    return total


def _operands(rest):
    """Returns the names of the operands, which end at the first closing bracket."""
    return re.findall(r"%[\w.\-]+", rest.partition(")")[0])


def _sliced_operands(fused):
    """Returns {number of an operand: bytes of its slices} of a fused computation; infinity if it is read whole."""
    parameters, sizes = {}, {}  # parameters: the number of the parameter that an instruction is a view of
    for line in fused.splitlines():
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, shape, opcode, rest = match.groups()
        if opcode == "parameter":
            parameters[name] = int(rest.partition(")")[0])
        for i, operand in enumerate(_operands(rest)):
            if operand not in parameters:
                continue
            if opcode == "bitcast":
                parameters[name] = parameters[operand]
            else:
                size = array_bytes(shape) if opcode in _SLICES and i == 0 else math.inf
                sizes[parameters[operand]] = sizes.get(parameters[operand], 0) + size
    return sizes
