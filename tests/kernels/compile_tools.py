"""Ahead-of-time compilation of Triton kernels, and what can be read from the result without a GPU.

``compile_kernel`` builds one kernel for one chip and returns its resources (``cuobjdump``), what
its PTX does to memory, and the instruction mix of its hottest loop (``cuobjdump -sass``). Kernels
must not be interpreted: import this only in a process where ``TRITON_INTERPRET`` is not set, or use
``run_jobs``, which starts one.

As a script it reads a JSON list of jobs, ``{"builder": "module:function", "arguments": {...}}``,
from standard input and prints a JSON list of results; each builder returns the keyword arguments of
``compile_kernel``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = (80, 86, 89, 90, 100, 120)
# Shared memory one block may use, in bytes: CUDA programming guide, table of compute capabilities.
SHARED_LIMITS = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
# The first class whose list holds an opcode's beginning; "=" asks for the whole opcode.
_OPCODE_CLASSES = {
    "barrier": "BAR WARPSYNC DEPBAR LDGDEPBAR SYNCS WARPGROUP BSYNC BSSY",
    "tensor": "HMMA HGMMA UTCHMMA UTCQMMA IMMA QGMMA DMMA",
    "async_copy": "LDGSTS UBLKCP UTMALDG",
    "global_load": "LDG =LD",
    "global_store": "STG =ST",
    "local": "LDL STL",
    "shared_load": "LDS LDSM LDTM",
    "shared_store": "STS STSM STTM",
    "exponential": "MUFU",
    "float": "FADD FMUL FFMA FMNMX FSEL FSETP HADD2 HFMA2 HMUL2 F2F F2FP",
    "shuffle": "SHFL REDUX",
    "integer": "IADD IMAD LEA LOP3 SHF ISETP SEL PRMT MOV R2UR UMOV UIADD ULEA ULOP USHF UIMAD"
    " VIADD IMNMX P2R R2P PLOP CS2R S2R I2F F2I",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel costs on one chip, and what its code contains.

    Attributes:
        registers: Registers of a thread.
        spill_bytes: Local memory plus stack of a thread, which is where spilled registers go.
        shared_bytes: Shared memory of a block, static and dynamic.
        num_warps: Warps of a block.
        blocks_per_sm: Blocks resident on a multiprocessor by registers, shared memory, warps and
            slots.
        wide_loads: Global loads or asynchronous copies of 16 bytes in the PTX.
        narrow_loads: Global loads or asynchronous copies of data of 4 bytes or less in the PTX.
        byte_accesses: Global memory accesses of one byte in the PTX.
        wgmma: Whether the PTX holds Hopper's warp-group products.
        mma: Whether the PTX holds the older ``mma.sync`` products.
        tcgen05: Whether the PTX holds Blackwell's fifth-generation products.
        loop: Instructions by class in the loop that holds most tensor-core instructions, per warp
            and iteration.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    blocks_per_sm: int
    wide_loads: int
    narrow_loads: int
    byte_accesses: int
    wgmma: bool
    mma: bool
    tcgen05: bool
    loop: dict[str, int]


def blocks_per_sm(capability: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Blocks of a kernel that fit a multiprocessor at once (CUDA programming guide, compute
    capabilities)."""
    max_warps = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}[capability]
    max_blocks = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}[capability]
    # One KiB of shared memory a block is the system's.
    shared = (SHARED_LIMITS[capability] + 1024) // (shared_bytes + 1024)
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = 65536 // (warp_registers * num_warps)
    return min(max_blocks, max_warps // num_warps, by_registers, shared)


def compile_kernel(
    kernel,
    *,
    capability: int,
    pointers: dict[str, str],
    scalars: dict[str, str],
    constants: dict[str, object],
    aligned: set[str] | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Compiled:
    """Compile a ``@triton.jit`` kernel for a chip.

    Args:
        kernel: The function as decorated.
        capability: Compute capability times ten.
        pointers: Pointer arguments and their element types, such as ``{"q_ptr": "bf16"}``.
        scalars: Run-time scalars and their types, such as ``{"num_nodes": "i32"}``.
        constants: Constexpr arguments, and arguments that are None.
        aligned: Arguments known to be divisible by 16; every pointer and every ``stride_*`` but
            unit ones when None. Launches do not look at those that are not to be specialized.
        num_warps: Warps of a block.
        num_stages: Stages of software pipelining.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(kernel, "arg_names") or type(kernel).__name__ != "JITFunction":
        raise TypeError("kernel must be a compiled triton.jit function; is TRITON_INTERPRET set?")
    names = kernel.arg_names
    missing = set(names) - set(pointers) - set(scalars) - set(constants)
    if missing:
        raise ValueError(f"no type or value given for {sorted(missing)}")
    if aligned is None:
        aligned = {*pointers, *(name for name in scalars if name.startswith("stride_"))}
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = f"*{pointers[name]}" if name in pointers else scalars[name]
    values = {(names.index(name),): value for name, value in constants.items()}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name in aligned and name not in constants and name not in kernel.do_not_specialize
    }
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    registers, shared = int(found["REG"]), max(int(found["SHARED"]), built.metadata.shared)
    warps = built.metadata.num_warps
    return Compiled(
        registers=registers,
        spill_bytes=int(found["STACK"]) + int(found["LOCAL"]),
        shared_bytes=shared,
        num_warps=warps,
        blocks_per_sm=blocks_per_sm(capability, registers, shared, warps),
        **_memory_accesses(ptx),
        wgmma="wgmma.mma_async" in ptx,
        mma="mma.sync" in ptx,
        tcgen05="tcgen05.mma" in ptx,
        loop=hottest_loop(sass),
    )


def _memory_accesses(ptx: str) -> dict[str, int]:
    """Global memory accesses of a PTX text by width."""
    wide = narrow = byte = 0
    for line in ptx.splitlines():
        copy = re.search(r"cp\.async\.c[ag]\.shared\.global.*?\], *\[.*?\], *(\w+)", line)
        if copy:
            size = int(copy.group(1), 0)
            wide, narrow = wide + (size == 16), narrow + (size <= 4)
            continue
        access = re.search(r"\b(ld|st)\.global((?:\.[\w:]+)*?)(?:\.v(\d))?\.b(\d+)\b", line)
        if not access:
            continue
        size = int(access.group(3) or 1) * int(access.group(4)) // 8
        byte += access.group(4) == "8"
        if access.group(1) == "ld":
            wide, narrow = wide + (size == 16), narrow + (size <= 4)
    return {"wide_loads": wide, "narrow_loads": narrow, "byte_accesses": byte}


def hottest_loop(sass: str) -> dict[str, int]:
    """Instructions by class of one iteration of the innermost loop with most tensor instructions,
    the shortest of equals."""
    code = []
    for line in sass.splitlines():
        match = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if match:
            code.append((int(match.group(1), 16), match.group(2)))
    index = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, text) in enumerate(code):
        branch = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if branch and int(branch.group(1), 16) < address and int(branch.group(1), 16) in index:
            loops.append((index[int(branch.group(1), 16)], i))
    inner = [
        (first, last)
        for first, last in loops
        if not any((a, z) != (first, last) and first <= a and z <= last for a, z in loops)
    ]
    mixes = [
        Counter(_opcode_class(text) for _, text in code[first : last + 1]) for first, last in inner
    ]
    best = max(mixes, key=lambda mix: (mix["tensor"], -sum(mix.values())), default=Counter())
    return {name: best[name] for name in sorted(best)}


def _opcode_class(text: str) -> str:
    opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
    whole = opcode.split(".")[0]
    for name, beginnings in _OPCODE_CLASSES.items():
        for beginning in beginnings.split():
            if whole == beginning[1:] if beginning[0] == "=" else whole.startswith(beginning):
                return name
    return "other"


@functools.cache
def _tool_path(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [_tool_path(name), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def run_jobs(jobs: list[dict], timeout: float = 600.0) -> list[dict]:
    """Run jobs in one fresh process where kernels are compiled, never interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests" / "kernels"), str(ROOT / "benchmarks")]
    )
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(jobs),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(f"compiling failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_job(job: dict) -> dict:
    """One job in this process."""
    module, function = job["builder"].split(":")
    arguments = getattr(importlib.import_module(module), function)(**job["arguments"])
    try:
        return dataclasses.asdict(compile_kernel(**arguments))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


if __name__ == "__main__":
    print(json.dumps([run_job(job) for job in json.load(sys.stdin)]))
