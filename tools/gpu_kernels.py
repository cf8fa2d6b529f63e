"""Counts the kernels and the memory traffic of a train step on an NVIDIA H100, without one.

    pip install "jax-cuda13-plugin[with_cuda]==VERSION" "jax-cuda13-pjrt==VERSION"
    python -m tools.gpu_kernels --config=configs/cifar10.py --config.model.dtype=bfloat16

VERSION is that of JAX. XLA compiles the program of config.train.batch_size images for the card's description. It cannot
measure which kernel of a library is the fastest, so it takes the library's own choice. The script prints a JSON line:
the kernels of a step, also by the kind in their name, the GB that they read and write, the GiB of temporary arrays and
the seconds of the compilation. Kernels that are too short for their start are the first thing to look for.
"""

import collections
import json
import re
import time

import jax
from absl import app
from jax.experimental import topologies
from ml_collections import config_flags

from diffusion_jax.planning import plan, programs

CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py")
KINDS = ("reduce", "transpose", "concatenate", "copy", "slice", "cudnn", "gemm", "custom-call")  # the rest is "loop"
NO_KERNEL = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}
# The fields of XLA's GpuTargetConfigProto, for the SXM card.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices
    config = CONFIG.value
    lowered, start = plan.lower_train_step(config, devices, config.train.batch_size), time.monotonic()
    compiled = programs.compiled(lowered)
    hlo, seconds = compiled.as_text(), time.monotonic() - start
    entry = hlo[hlo.index("\nENTRY ") :]
    instructions = re.findall(r"^\s+(?:ROOT )?%(\S+) = .*? ([a-z\-]+)\(", entry, re.MULTILINE)
    kernels = [name for name, opcode in instructions if opcode not in NO_KERNEL]
    kinds = collections.Counter(next((kind for kind in KINDS if kind in name), "loop") for name in kernels)
    line = {"kernels": len(kernels), "by_kind": dict(kinds.most_common())}
    line |= {"gigabytes": round(sum(programs.hbm_bytes(hlo)) / 1e9, 2), "seconds": round(seconds)}
    line |= {"temporaries_gib": round(compiled.memory_analysis().temp_size_in_bytes / 2**30, 2)}
    print(json.dumps(line | {"batch": config.train.batch_size, "jax": jax.__version__}))


if __name__ == "__main__":
    app.run(main)
