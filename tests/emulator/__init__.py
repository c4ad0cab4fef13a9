"""A GPU in NumPy: runs the PTX that Triton makes of a kernel, for tests on machines without one.

Triton's interpreter runs a kernel's source; this runs what the compiler made of it for a card: instructions, registers,
shared memory, fragments of matrices. So it sees what the interpreter cannot: alignment that an address was said to
have, layouts, asynchronous copies, barriers. `driver.activate(90)` makes Triton launch here, on CPU tensors.

Each access is checked: within a tensor of the launch or the block's shared memory, aligned to its width, and separated
by a barrier from what another thread does to the same bytes.

    program    PTX as text -> blocks of instructions
    translate  a block -> a Python function over arrays with one element a thread
    machine    threads, barriers, memory and its checks
    matrix     mma, wgmma, ldmatrix: fragments and shared-memory layouts
    driver     Triton's side

What is not seen: time, caches, the order of warps (all threads go through a block together; races are found by
checking, not by chance); fences of the asynchronous proxy and waits of wgmma, whose sums are there at once;
approximations (ex2.approx and div.full are taken exactly, denormals kept) and the lower precision in which Hopper sums
FP8 products; races on tensors above 64 MiB, and of a write with any but the last read of a byte. Bounds are those of a
tensor's storage. Instructions that none of the kernels needs are refused by name.
"""
