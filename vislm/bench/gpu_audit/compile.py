"""Compiling one Triton kernel for a card that is not there, and reading the machine code."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

from vislm.errors import UsageError
from vislm.kernels.backends.triton.audit_case import AuditCase

WARP_SIZE = 32
TENSOR_INSTRUCTIONS = r"\b(HMMA|BMMA|IMMA|HGMMA|UTC[A-Z]*MMA)\b"
"""Warp (sm_80), warp group (sm_90) and tensor memory (sm_100) matrix products."""


class MachineCode(NamedTuple):
    """What a compiled kernel uses.

    ``local`` and ``stack`` are bytes per thread of spilled registers, ``spills`` counts loads and stores of them,
    ``shared`` is bytes per block, ``tensor_memory`` columns, ``tensor`` name -> number of tensor-core instructions.
    ``warps`` may be more than asked for where the compiler gave the copying to warps of its own.
    """

    registers: int
    stack: int
    local: int
    spills: int
    shared: int
    tensor_memory: int
    warps: int
    tensor: dict[str, int]


def machine_code(case: AuditCase, target: int) -> MachineCode:
    """Return the machine code of a case for compute capability ``target / 10``; needs no card.

    Raises:
        UsageError: Triton's interpreter is on.
        Exception: whatever the compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(case.function, JITFunction):
        raise UsageError("the audit needs Triton's compiler, but TRITON_INTERPRET is set; unset it")
    names = list(case.signature)
    constants = {_path(names, key): value for key, value in case.constexprs.items()}
    alignment = {_path(names, key): [["tt.divisibility", 16]] for key in case.aligned}
    compiled = triton.compile(
        ASTSource(case.function, case.signature, constants, alignment),
        target=GPUTarget("cuda", target, WARP_SIZE),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    return _read(compiled.asm["cubin"], compiled.metadata)


def _path(names: list[str], key: str | tuple[str, int]) -> tuple[int, ...]:
    return (names.index(key),) if isinstance(key, str) else (names.index(key[0]), key[1])


def _read(binary: bytes, metadata: Any) -> MachineCode:
    from triton import knobs

    handle, name = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(binary)
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", name)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", name)
    finally:
        os.unlink(name)
    counts = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    found = re.findall(TENSOR_INSTRUCTIONS, code)
    return MachineCode(
        registers=counts["REG"],
        stack=counts["STACK"],
        local=counts["LOCAL"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=metadata.shared,
        tensor_memory=metadata.tmem_size or 0,
        warps=metadata.num_warps,
        tensor={instruction: found.count(instruction) for instruction in sorted(set(found))},
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
