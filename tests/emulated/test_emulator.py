"""The emulator against NumPy on small kernels, and the faults that it is there to find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from emulator.machine import DeviceError, Machine
from emulator.program import parse
from heedful.kernels.target import Target

# -- what must come out ------------------------------------------------------------------------------------------------


@triton.jit
def product_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr):
    """out [M, N] = a [M, K] times b [K, N], or b [N, K] if TURNED, in steps of 64."""
    rows, columns = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros([M, N], out.dtype.element_ty)
    for first in range(0, K, 64):
        inner = first + tl.arange(0, 64)
        left = tl.load(a + rows * K + inner[None, :])
        if TURNED:
            right = tl.trans(tl.load(b + tl.arange(0, N)[:, None] * K + inner[None, :]))
        else:
            right = tl.load(b + inner[:, None] * N + columns)
        total = tl.dot(left, right, total, input_precision="tf32", out_dtype=out.dtype.element_ty)
    tl.store(out + rows * N + columns, total)


@pytest.mark.parametrize("shape", [(64, 64, 128), (128, 32, 64), (64, 128, 192), (16, 16, 64)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8"])
def test_products(shape: tuple[int, int, int], turned: bool, dtype: str) -> None:
    (M, N, K), kind = shape, getattr(torch, dtype)
    if dtype == "float8_e4m3fn" and not Target.of(torch.empty(0)).fp8_dot:
        pytest.skip("this card does not multiply FP8")
    torch.manual_seed(0)
    a, b = (torch.randint(-3, 4, s).to(kind) for s in ((M, K), (N, K) if turned else (K, N)))
    out = torch.empty((M, N), dtype=torch.int32 if dtype == "int8" else torch.float32)
    product_kernel[(1,)](a, b, out, M, N, K, turned)
    assert torch.equal(out.double(), a.double() @ (b.double().T if turned else b.double()))


@triton.jit
def row_kernel(x, sums, running, ordered, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.load(x + at)
    tl.store(sums + tl.program_id(0), tl.sum(row, axis=0))
    tl.store(running + at, tl.cumsum(row, axis=0))
    tl.store(ordered + at, tl.sort(row))


@pytest.mark.parametrize("N", [32, 256, 2048])
def test_sums_scans_and_sorts(N: int) -> None:
    x = torch.randint(-1000, 1000, (3, N), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    sums, running, ordered = torch.empty(3, dtype=torch.int32), torch.empty_like(x), torch.empty_like(x)
    row_kernel[(3,)](x, sums, running, ordered, N)
    assert torch.equal(sums, x.sum(1, dtype=torch.int32))
    assert torch.equal(running, x.cumsum(1, dtype=torch.int32))
    assert torch.equal(ordered, x.sort(1).values)


# -- what must not pass ------------------------------------------------------------------------------------------------


@triton.jit
def neighbour_kernel(scratch, out, BARRIER: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(scratch + at, at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + at, tl.load(scratch + (at + 131) % 256))


def test_a_value_that_another_thread_stored_needs_a_barrier() -> None:
    scratch, out = torch.zeros(256, dtype=torch.int32), torch.empty(256, dtype=torch.int32)
    neighbour_kernel[(1,)](scratch, out, True)
    assert torch.equal(out, torch.arange(256, dtype=torch.int32).roll(-131))
    with pytest.raises(DeviceError, match=r"reads argument 0.*race"):
        neighbour_kernel[(1,)](scratch, out, False)


@triton.jit
def block_kernel(values, out):
    block = tl.program_id(0)
    tl.store(values + block, block)
    tl.store(out + block, tl.load(values + tl.maximum(block - 1, 0)))


def test_a_value_that_another_block_stores_is_not_there() -> None:
    with pytest.raises(DeviceError, match="race"):
        block_kernel[(2,)](torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))


@triton.jit
def copy_kernel(x, out, first, ALIGNED: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    from_ = first + at
    if ALIGNED:
        from_ = tl.max_contiguous(tl.multiple_of(from_, 16), 16)
    tl.store(out + at, tl.load(x + from_))


def test_a_hint_that_is_not_true_is_a_misaligned_access() -> None:
    x, out = torch.arange(600, dtype=torch.int32), torch.empty(512, dtype=torch.int32)
    for first, aligned in ((3, False), (32, True)):
        copy_kernel[(1,)](x, out, first, aligned, 512)
        assert torch.equal(out, x[first : first + 512])
    with pytest.raises(DeviceError, match="misaligned"):
        copy_kernel[(1,)](x, out, 3, True, 512)


def test_an_access_behind_the_end_is_found() -> None:
    with pytest.raises(DeviceError, match=r"in no tensor of the launch, 0 bytes behind the end of argument 0"):
        copy_kernel[(1,)](torch.zeros(100, dtype=torch.int32), torch.empty(128, dtype=torch.int32), 3, False, 128)


PTX = """
.visible .entry exchange(
	.param .u64 .ptr .global .align 1 out
)
{{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<4>;
	ld.param.b64 	%rd1, [out];
	mov.u32 	%r1, %tid.x;
	shl.b32 	%r2, %r1, 2;
	setp.lt.u32 	%p1, %r1, 32;
	mul.wide.u32 	%rd2, %r2, 1;
	add.s64 	%rd3, %rd1, %rd2;
	{write}
	{between}
	xor.b32 	%r3, %r2, 128;
	ld.shared.b32 	%r4, [%r3];
	st.global.b32 	[%rd3], %r4;
	ret;
}}
"""


def exchange(write: str, between: str) -> list[int]:
    """64 threads; each writes its number to shared memory, and reads what a thread of the other warp wrote."""
    program = parse(PTX.format(write=write, between=between))
    out = np.arange(64, dtype=np.uint32)
    memory = [(out.view(np.uint8), out.ctypes.data, "out")]
    Machine(program, 64, 256).launch((1, 1, 1), [np.array([out.ctypes.data], np.uint64)], memory)
    return out.tolist()


STORE, COPY = "st.shared.b32 	[%r2], %r1;", "cp.async.ca.shared.global [%r2], [%rd3], 0x4;\n\tcp.async.commit_group;"
OTHERS = [*range(32, 64), *range(32)]


@pytest.mark.parametrize(
    ("write", "between"), [(STORE, "bar.sync 	0;"), (COPY, "cp.async.wait_group 	0;\n\tbar.sync 	0;")]
)
def test_warps_exchange_what_a_barrier_separates(write: str, between: str) -> None:
    assert exchange(write, between) == OTHERS


@pytest.mark.parametrize(
    ("write", "between", "error"),
    [
        (STORE, "", "reads shared memory.*race"),
        (COPY, "bar.sync 	0;", "asynchronous copy to it is under way"),
        (COPY, "bar.sync 	0;\n\tcp.async.wait_group 	0;", "reads shared memory.*race"),
        (STORE, "@%p1 ret;\n\tbar.sync 	0;\n\tadd.s32 	%r2, %r2, 1;", "misaligned"),
        (STORE, "bar.sync 	0;\n\tadd.s32 	%r2, %r2, 4096;", "of 256 of shared memory"),
        (STORE, "@%p1 bra 	$A;\n\tbar.sync 	0;\n$A:", "a barrier that some threads do not come to"),
    ],
)
def test_what_no_barrier_separates_is_a_race(write: str, between: str, error: str) -> None:
    with pytest.raises(DeviceError, match=error):
        exchange(write, between)


def test_an_instruction_that_is_not_known_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"line 15: vote\.sync\.any\.pred"):
        exchange("vote.sync.any.pred 	%p2, %p1, -1;", "")
