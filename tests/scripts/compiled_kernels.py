"""Compile the kernels for devices that need not exist here.

``python -m tests.scripts.compiled_kernels cuda:90 hip:gfx942``; Triton's interpreter must be off.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_alrc._moments import accelerator, kernels

NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
CASES = [
    {"TO": 0, "HAS_REDUCED": False, "SEES": True},
    {"TO": 1, "HAS_REDUCED": True, "SEES": False},
    {"TO": 2, "HAS_REDUCED": True, "SEES": True},
]

OTHERS = {"HAS_CALL_SUMS": True, "SPIKED_CALLS_OFFEND": True}


def compiled(
    device: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int
) -> str:
    """The assembly for a device, such as ``cuda:90``."""
    architecture, _, version = device.partition(":")
    is_cuda = architecture == "cuda"
    target = GPUTarget(architecture, int(version) if is_cuda else version, 32 if is_cuda else 64)
    signature = types | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    result = triton.compile(source, target=target, options={"num_warps": warps})
    uses = re.findall(r"(\S+) %count[ ,]", result.asm["ttir"])
    # An int32 is converted first, because twice the count may exceed it.
    assert {*uses} <= {"arith.extsi", "arith.sitofp"}, uses
    return str(result.asm["ptx" if is_cuda else "amdgcn"])


def compile_all(device: str) -> None:
    """Compile for a device with each dtype, and with each case of two dtypes."""
    doubles = dict.fromkeys(
        ("state", "settings", "reduced", "outgoing", "call_sums", "parts"), "*fp64"
    )
    for index, (dtype, name) in enumerate(NAMES.items()):
        factors = "*fp64" if dtype == torch.float64 else "*fp32"
        block, warps = accelerator.BLOCKS[-1 if dtype == torch.float32 else 0]
        for case in CASES[index % 2 :: 2]:
            types = {"given_losses": f"*{name}", "clipped_losses": f"*{name}", "factors": factors}
            limits = {"LARGEST": torch.finfo(dtype).max, "IS_NARROW": dtype.itemsize == 2}
            constants = case | OTHERS | limits | {"BLOCK": block}
            types |= {"count": "i32", "seen": "*fp64"} | doubles
            assembly = compiled(device, kernels.clip, types, constants, warps)
            print(f"{device}: clip of {dtype} losses, {case}: {len(assembly.splitlines())} lines")
    constants = OTHERS | {"TO": 0, "HAS_REDUCED": True, "HAS_PARTS": True}
    constants["PROGRAMS"] = accelerator.MOST_PROGRAMS
    types = doubles | {"programs": "i32", "count": "i32"}
    assembly = compiled(device, kernels.learn, types, constants, 4)
    print(f"{device}: learn: {len(assembly.splitlines())} lines")


if __name__ == "__main__":
    for device in sys.argv[1:]:
        compile_all(device)
