"""An audit case from a recorded launch: the types, constants and alignments that the launcher would compile for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vislm.kernels.backends.triton.audit_case import AuditCase
from vislm.kernels.backends.triton.launching import Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
ALIGNMENT = 16


def case_of(
    launch: Launch,
    target: int,
    *,
    name: str,
    problem: str,
    flops: float,
    tile_flops: float | None = None,
    exponentials: float = 0.0,
    precision: str = "bf16",
) -> AuditCase:
    """Return the compilation that a launch on a card of ``target`` would cause; see :class:`AuditCase` for the rest.

    The bytes are those of the launch's tensors. Tensor cores are expected unless ``precision`` is ``"fp32"``. As in
    Triton's launcher, None and the integer 1 become constants, and multiples of 16 are declared as such.
    """
    types: dict[str, Any] = {}
    constants: dict[str | tuple[str, int], Any] = {}
    aligned: list[str | tuple[str, int]] = []
    for parameter in launch.kernel.params:
        given = launch.arguments[parameter.name]
        if parameter.is_constexpr or given is None:
            types[parameter.name] = "constexpr"
            constants[parameter.name] = given
        elif isinstance(given, tuple):
            types[parameter.name] = tuple(_type(entry) for entry in given)
            constants |= {(parameter.name, i): entry for i, entry in enumerate(given) if _type(entry) == "constexpr"}
            aligned += [(parameter.name, i) for i, entry in enumerate(given) if _is_aligned(entry)]
        else:
            types[parameter.name] = _type(given)
            constants |= {parameter.name: given} if types[parameter.name] == "constexpr" else {}
            aligned += [parameter.name] if _is_aligned(given) else []
    return AuditCase(
        name=name,
        function=launch.kernel,
        signature=types,
        constexprs=constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        problem=problem,
        flops=flops,
        bytes=sum(entry.nbytes for entry in launch.arguments.values() if isinstance(entry, Tensor)),
        programs=launch.programs,
        tile_flops=tile_flops,
        exponentials=exponentials,
        precision=precision,
        tensor_cores=precision != "fp32",
        targets=(target,),
        aligned=tuple(aligned),
    )


def _type(given: object) -> str:
    if isinstance(given, Tensor):
        return _POINTERS[given.dtype]
    if isinstance(given, float):
        return "fp32"
    assert isinstance(given, int)
    if given == 1:
        return "constexpr"
    return "i32" if -(2**31) <= given < 2**31 else "i64"


def _is_aligned(given: object) -> bool:
    """Return whether the launcher declares a multiple of 16; allocations of PyTorch are."""
    return isinstance(given, Tensor) or (isinstance(given, int) and given != 1 and given % ALIGNMENT == 0)
