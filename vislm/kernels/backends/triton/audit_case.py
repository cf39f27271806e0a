"""What the ahead-of-time audit needs to know about one kernel and one of its shipped tile configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = (80, 90, 100)
"""Compute capabilities, times ten, that tile configurations are shipped for."""


@dataclass(frozen=True)
class AuditCase:
    """One compilation: a kernel, the types of its arguments, a tile configuration, and the problem it is timed on.

    Every module of this folder that has ``audit_cases() -> list[AuditCase]`` is audited. Only ``vislm.bench.gpu_audit``
    calls it, with the real compiler: under Triton's interpreter the kernels are no compiler input. A case made by
    :func:`~vislm.kernels.backends.triton.audit_launch.case_of` from a recorded launch is what a call would compile.

    Attributes:
        name: unique, readable: ``"dense forward bf16 D=64"``.
        function: the ``@triton.jit`` function.
        signature: parameter name -> Triton type, in the order of the function's parameters and for every one of them:
            ``"*bf16"``, ``"*fp32"``, ``"*i1"``, ``"i32"``, ``"fp32"``, a tuple of those for a tuple argument;
            ``"constexpr"`` for those in ``constexprs``.
        constexprs: values of the ``tl.constexpr`` parameters, tile sizes included, of arguments that are None, and of
            integers that are 1; the key of a tuple's entry is ``(name, position)``.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        problem: the problem that ``flops``, ``bytes`` and ``programs`` belong to, in words.
        flops: floating-point operations that the problem needs (2 per multiply-add), summed over all programs.
        bytes: bytes that have to cross the memory bus at least once: every input read once, every output written once.
        programs: size of the launch grid.
        tile_flops: floating-point operations that the tiles do: with padded channels, parts of tiles that are masked
            out, and what other kernels of the same call compute too; None = ``flops``.
        exponentials: exponentials that the tiles take, which have units of their own.
        precision: peak that ``flops`` are held against: ``"bf16"``, ``"fp16"`` (tensor cores) or ``"fp32"`` (none).
        tensor_cores: whether the machine code must hold tensor-core instructions; False for float32 with
            ``input_precision="ieee"`` and for kernels without a dot product.
        targets: compute capabilities, times ten, that this configuration is shipped for.
        aligned: parameters (or ``(name, position)`` in a tuple) whose value is a multiple of 16 in ordinary calls
            (pointers from PyTorch's allocator, most strides), as the launcher would find out by itself.
    """

    name: str
    function: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[str | tuple[str, int], Any]
    num_warps: int
    num_stages: int
    problem: str
    flops: float
    bytes: float
    programs: int
    tile_flops: float | None = None
    exponentials: float = 0.0
    precision: str = "bf16"
    tensor_cores: bool = True
    targets: tuple[int, ...] = TARGETS
    aligned: tuple[str | tuple[str, int], ...] = ()
