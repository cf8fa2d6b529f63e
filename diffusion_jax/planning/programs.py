"""What a compiled program needs of its chip: memory, FLOPs, bytes, and by them its time at best."""

import math
import re
from typing import NamedTuple

import jax

from diffusion_jax.errors import one_line


class Chip(NamedTuple):
    """One chip in numbers, and how many of them a pod has."""

    flops: float  # bfloat16 operations per second
    hbm: float  # bytes
    bandwidth: float  # of the HBM, bytes per second
    links: float  # to other chips, all together, one way, bytes per second
    pod: int


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. They give the links of both ways together, which is twice this; of
# v4's links they say nothing: 6 of 50 GB/s.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, 4096),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 256),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 8960),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 256),
}
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # as JAX calls them


def chip_of(device) -> Chip | None:
    """The numbers of a device of JAX's; None where they are not known."""
    return CHIPS.get(_KINDS.get(device.device_kind))


def room(device) -> int | None:
    """Bytes of a device's memory; None where it does not say."""
    if chip := chip_of(device):
        return chip.hbm
    return (device.memory_stats() or {}).get("bytes_limit")


COUNTING = 1  # raise it when `needs` counts otherwise: plans keep what was counted


def memory_needed(program) -> int:
    return memory(program.memory_analysis())["peak"]


def least_seconds(program, device, turns=1):
    chip = chip_of(device)
    return (program.cost_analysis() or {}).get("flops", 0.0) * turns / chip.flops if chip else None


class DoesNotFit(Exception):
    """A program needs more memory than the chip has; the compiler's words."""


def compiled(lowered):
    """`lowered.compile()`. Raises DoesNotFit if the compiler says so."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(str(error)):
            raise
        raise DoesNotFit(one_line(error)) from None


def needs(program, chip: Chip | None, num_chips: int, turns: int = 1, steps: int = 1) -> dict:
    """What a compiled program needs, read off it.

    Args:
      turns: of its loops; a compiler counts their bodies once.
      steps: that it takes; "per_chip" is of one.

    Returns:
      "per_chip": FLOPs, bytes to and from the HBM, bytes sent; "memory" in bytes; "collectives";
      "roofline", None without a chip; "optimal_seconds", the compiler's own, None where it is not above 0.
    """
    hlo, cost = program.as_text(), program.cost_analysis() or {}
    found = collectives(hlo)
    outside, inside = hbm_bytes(hlo)
    per_chip = {
        # As if all were inside: outside of the loops there is little to compute.
        "flops": max(cost.get("flops", 0.0), 0.0) * turns / steps,
        "hbm_bytes": (outside + inside * turns) / steps,
        "link_bytes": link_bytes(found, num_chips),
    }
    optimal = cost.get("optimal_seconds", 0.0)
    return {
        "per_chip": per_chip,
        "memory": memory(program.memory_analysis()),
        "collectives": found,
        "roofline": roofline(chip, **per_chip) if chip else None,
        "optimal_seconds": optimal if optimal > 0 else None,  # it has been seen below 0
    }


def memory(sizes) -> dict[str, int]:
    """Bytes of a chip. The peak is the larger of the compiler's and of the sum, which counts donated memory once."""
    found = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    total = sum(found.values()) - 2 * found["aliased"]
    return found | {"peak": max(total, getattr(sizes, "peak_memory_in_bytes", 0))}


def is_out_of_memory(message: str) -> bool:
    """Whether a compiler's message says that the program does not fit into the chip's memory."""
    return "CompileTimeHbmOom" in message or ("RESOURCE_EXHAUSTED" in message and "exceeds available" in message)


def shortage(error: DoesNotFit) -> str:
    """The sizes in the compiler's words."""
    size = r"[\w ]+\([\d.]+[KMGT]\)"
    match = re.search(f"{size} exceeds{size}", str(error))
    return match[0].strip() if match else str(error)[:200]


# ---------------------------------------------------------------------------- read off its text

_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-broadcast|collective-permute)(-done)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")  # type, bits, dimensions, layout


def collectives(hlo: str) -> dict[str, dict]:
    """What a compiled program sends between chips: {"all-reduce": {"count": 3, "bytes": 142985228}}, each turn once.

    Args:
      hlo: its text. The bytes are those of the results on one chip; of an asynchronous pair the "-done" counts.
    """
    found = {}
    for shapes, name, _ in _COLLECTIVE.findall(hlo):
        entry = found.setdefault(name, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += array_bytes(shapes)
    return found


def array_bytes(shapes: str) -> int:
    """Bytes of the arrays of an HLO type, e.g. "(bf16[3,3]{1,0}, f32[])" is 22."""
    return sum(map(_size, _ARRAY.findall(shapes)))


def _size(array):
    _, bits, dims, _ = array
    return -(-math.prod(int(n) for n in dims.split(",") if n) * int(bits or 8) // 8)


def link_bytes(found: dict[str, dict], num_chips: int) -> float:
    """Bytes that a chip sends for `collectives`, at least: an all-reduce of b bytes among n takes 2 b (n − 1)/n."""
    share = (num_chips - 1) / num_chips
    factors = {"all-reduce": 2 * share, "reduce-scatter": num_chips - 1, "collective-permute": 1.0}
    return sum(entry["bytes"] * factors.get(name, share) for name, entry in found.items())


_INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_SLICES = {"slice", "dynamic-slice", "gather"}  # which of their first operand read what they return
_NO_TRAFFIC = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call"}


def hbm_bytes(hlo: str) -> tuple[float, float]:
    """Bytes that a compiled program moves to and from the chip's memory: (outside its loops, in one turn of each).

    Each instruction reads its operands and writes its result; what the compiler has put into the
    vector memory on the chip (S(1) in the layout) does not count. Of an operand that is only sliced,
    in a fusion too, the slices count, and of an asynchronous copy or slice what it moves. An estimate:
    an operand may be read twice, or in part by other means.
    """
    names = re.split(r"^(?:ENTRY )?(%[\w.\-]+) \(.*\{$", hlo, flags=re.MULTILINE)
    bodies = dict(zip(names[1::2], names[2::2], strict=True))
    entry = re.search(r"^ENTRY (%[\w.\-]+)", hlo, re.MULTILINE)[1]
    moved, ahead, seen = [0.0, 0.0], [(entry, 0)], set()
    while ahead:
        name, in_loop = ahead.pop()
        if name not in seen:
            seen.add(name)
            moved[in_loop] += _traffic(bodies[name], bodies)
            ahead += [(body, 1) for body in re.findall(r"\bbody=(%[\w.\-]+)", bodies[name])]
            ahead += [(called, in_loop) for called in _called(bodies[name])]
    return tuple(moved)


def _called(computation):
    """What calls and branches go to; fusions and reductions are one instruction each."""
    calls = re.findall(r" call\(.*\bto_apply=(%[\w.\-]+)", computation)
    either = re.findall(r"\b(?:true_computation|false_computation)=(%[\w.\-]+)", computation)
    branches = re.findall(r"branch_computations=\{(.*?)\}", computation)
    return calls + either + [name for names in branches for name in names.split(", ")]


def _traffic(computation, bodies):
    total, in_hbm = 0.0, {}
    for line in computation.splitlines():
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, shape, opcode, rest = match.groups()
        arrays = [(_size(array), "S(" not in (array[3] or "")) for array in _ARRAY.findall(shape)]
        in_hbm[name] = sum(size for size, hbm in arrays if hbm)
        if opcode in ("copy-start", "slice-start"):
            sides = [(size, hbm) for size, hbm in arrays if size > 4]  # the rest is a semaphore
            total += min((size for size, _ in sides), default=0) * sum(hbm for _, hbm in sides)
        elif opcode not in _NO_TRAFFIC and not opcode.endswith("-done"):
            sliced = {0: array_bytes(shape)} if opcode in _SLICES else {}
            if opcode == "fusion":
                sliced = _sliced(bodies[re.search(r"\bcalls=(%[\w.\-]+)", rest)[1]])
            reads = [min(in_hbm.get(operand, 0), sliced.get(i, math.inf)) for i, operand in enumerate(_operands(rest))]
            total += in_hbm[name] + sum(reads)
    return total


def _operands(rest):
    return re.findall(r"%[\w.\-]+", rest.partition(")")[0])


def _sliced(fused):
    """{operand of a fused computation that it only slices: bytes of the slices}."""
    number, sizes = {}, {}  # of the parameter that an instruction is, but for its shape
    for line in fused.splitlines():
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, shape, opcode, rest = match.groups()
        if opcode == "parameter":
            number[name] = int(rest.partition(")")[0])
        for i, operand in enumerate(_operands(rest)):
            if operand not in number:
                continue
            if opcode == "bitcast":
                number[name] = number[operand]
            else:
                size = array_bytes(shape) if opcode in _SLICES and i == 0 else math.inf
                sizes[number[operand]] = sizes.get(number[operand], 0) + size
    return sizes


def roofline(chip: Chip, flops: float, hbm_bytes: float, link_bytes: float) -> dict:
    """The least time for a program on a chip: max(FLOPs / bf16 peak, bytes / HBM bandwidth) + link bytes / links.

    An estimate: real programs do not reach the peak (float32 less so), and part of the
    communication hides behind the computation.

    Returns:
      Seconds of each and of all, "bound": the largest ("compute", "memory" or "links"), and "utilisation":
      the share of the peak that this time means.
    """
    parts = {"compute": flops / chip.flops, "memory": hbm_bytes / chip.bandwidth, "links": link_bytes / chip.links}
    seconds = max(parts["compute"], parts["memory"]) + parts["links"]
    return {f"{name}_seconds": part for name, part in parts.items()} | {
        "seconds": seconds,
        "bound": max(parts, key=parts.get),
        "utilisation": parts["compute"] / seconds if seconds else 0.0,
    }
