"""Triton kernels of FAVOR+ attention; features live in registers only.

Words. In the forward, keys *write* (v and 1) into sums over the past and queries *read* them. The gradients of k and v
are the same computation with time reversed: queries write (their cotangent dy and delta = <dy, y>) and keys read. So
every kernel has a reader, a writer and a payload, and runs in both directions.

A weight exp(reader_ir + writer_jr) is the product of exp(reader_ir + top_r) and exp(writer_jr - top_r), where `top` is
the running maximum of the writers. Inside a chunk it is that of the chunk's first writer and all before, and a chunk
ends before a writer that would outgrow it by more than exp(LIMIT): no sum overflows, a product that underflows is below
1e-20 of its row's largest, and no row depends on what comes after it.

In bfloat16 the causal kernels of wide heads have a scale that moves seldom: `walk_read` and `walk_gradient`, and for
positive features and heads of 128 channels `walk_lean_read` and `walk_lean_gradient`.
"""
