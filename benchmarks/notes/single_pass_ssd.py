"""Prototype: SSD forward and backward in single passes with the state on chip. Checks, then times, each configuration.

y_t = C_t^T h_t + D x_t, h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T, state kept as [N,P] in float32 registers.
Backward is two sweeps that recompute the states: forward for dC, backward for dB and dx. No product has a transposed
accumulator as an operand: gradients of B and C are formed as [N,Q] tiles from transposed loads. The gradient of the log
decay comes from sum(C dC) - sum(B dB) per token and one suffix sum.
"""

import itertools
import os
import statistics
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def _decay(dt_ptr, bias, A, rows, mask, H: tl.constexpr):
    """dt after bias and softplus, and its log decay; both 0 beyond the sequence."""
    dt = tl.load(dt_ptr + rows * H, mask=mask, other=0.0).to(tl.float32) + bias
    soft = tl.maximum(dt, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(dt)))
    soft = tl.where(mask, soft, 0.0)
    return soft, soft * A


@triton.jit
def forward(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, y_ptr, T,
            H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr):
    """One program owns BP channels of one head of one sequence."""
    h, pb, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    A = tl.load(A_ptr + h); bias = tl.load(bias_ptr + h); D = tl.load(D_ptr + h)
    n = tl.arange(0, N); p = pb * BP + tl.arange(0, BP); i = tl.arange(0, Q)
    state = tl.zeros([N, BP], tl.float32)
    for start in range(0, T, Q):
        rows = b * T + start + i
        mask = start + i < T
        dt, a = _decay(dt_ptr + h, bias, A, rows, mask, H)
        s = tl.cumsum(a, 0)
        total = tl.sum(a, 0)
        c = tl.load(C_ptr + rows[:, None] * N + n[None, :], mask=mask[:, None], other=0.0)
        bt = tl.load(B_ptr + rows[None, :] * N + n[:, None], mask=mask[None, :], other=0.0)
        x = tl.load(x_ptr + (rows[:, None] * H + h) * P + p[None, :], mask=mask[:, None], other=0.0)
        gap = s[:, None] - s[None, :]
        w = tl.where(i[:, None] >= i[None, :], tl.exp(tl.minimum(gap, 0.0)) * dt[None, :], 0.0)
        cb = tl.dot(c, bt) * w
        y = tl.dot(c, state.to(c.dtype)) * tl.exp(s)[:, None]
        y = tl.dot(cb.to(x.dtype), x, acc=y)
        y += D * x
        tl.store(y_ptr + (rows[:, None] * H + h) * P + p[None, :], y.to(x.dtype), mask=mask[:, None])
        xs = (x * (dt * tl.exp(total - s))[:, None]).to(x.dtype)
        state = tl.dot(bt, xs, acc=state * tl.exp(total))


@triton.jit
def backward_dc(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, bias_ptr, dy_ptr, dC_ptr, cdc_ptr, T,
                H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """Forward sweep of one head of one sequence: dC per head [B,T,H,N] and sum(C dC) [B,T,H]."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A = tl.load(A_ptr + h); bias = tl.load(bias_ptr + h)
    n = tl.arange(0, N); p = tl.arange(0, P); i = tl.arange(0, Q)
    state = tl.zeros([N, P], tl.float32)
    for start in range(0, T, Q):
        rows = b * T + start + i
        mask = start + i < T
        dt, a = _decay(dt_ptr + h, bias, A, rows, mask, H)
        s = tl.cumsum(a, 0)
        total = tl.sum(a, 0)
        bt = tl.load(B_ptr + rows[None, :] * N + n[:, None], mask=mask[None, :], other=0.0)
        x = tl.load(x_ptr + (rows[:, None] * H + h) * P + p[None, :], mask=mask[:, None], other=0.0)
        dyt = tl.load(dy_ptr + (rows[None, :] * H + h) * P + p[:, None], mask=mask[None, :], other=0.0)
        gap = s[None, :] - s[:, None]                                                    # [j,i]
        w = tl.where(i[None, :] >= i[:, None], tl.exp(tl.minimum(gap, 0.0)) * dt[:, None], 0.0)
        dpt = tl.dot(x, dyt) * w                                                         # [j,i]
        dct = tl.dot(state.to(x.dtype), dyt) * tl.exp(s)[None, :]
        dct = tl.dot(bt, dpt.to(x.dtype), acc=dct)                                       # [N,i]
        ct = tl.load(C_ptr + rows[None, :] * N + n[:, None], mask=mask[None, :], other=0.0)
        tl.store(cdc_ptr + rows * H + h, tl.sum(ct * dct, 0), mask=mask)
        tl.store(dC_ptr + (rows[None, :] * H + h) * N + n[:, None], dct.to(x.dtype), mask=mask[None, :])
        xs = (x * (dt * tl.exp(total - s))[:, None]).to(x.dtype)
        state = tl.dot(bt, xs, acc=state * tl.exp(total))


@triton.jit
def backward_dbx(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, dy_ptr, dB_ptr, dx_ptr, bdb_ptr, xdx_ptr, T,
                 H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """Reverse sweep of one head of one sequence: dB per head, dx, sum(B dB) and sum(x dxb) [B,T,H]."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A = tl.load(A_ptr + h); bias = tl.load(bias_ptr + h); D = tl.load(D_ptr + h)
    n = tl.arange(0, N); p = tl.arange(0, P); i = tl.arange(0, Q)
    r = tl.zeros([N, P], tl.float32)
    chunks = tl.cdiv(T, Q)
    for back in range(0, chunks):
        start = (chunks - 1 - back) * Q
        rows = b * T + start + i
        mask = start + i < T
        dt, a = _decay(dt_ptr + h, bias, A, rows, mask, H)
        s = tl.cumsum(a, 0)
        total = tl.sum(a, 0)
        to_end = tl.exp(total - s)
        bm = tl.load(B_ptr + rows[:, None] * N + n[None, :], mask=mask[:, None], other=0.0)
        ct = tl.load(C_ptr + rows[None, :] * N + n[:, None], mask=mask[None, :], other=0.0)
        x = tl.load(x_ptr + (rows[:, None] * H + h) * P + p[None, :], mask=mask[:, None], other=0.0)
        xt = tl.load(x_ptr + (rows[None, :] * H + h) * P + p[:, None], mask=mask[None, :], other=0.0)
        dy = tl.load(dy_ptr + (rows[:, None] * H + h) * P + p[None, :], mask=mask[:, None], other=0.0)
        gapt = s[None, :] - s[:, None]
        wt = tl.where(i[None, :] >= i[:, None], tl.exp(tl.minimum(gapt, 0.0)), 0.0)         # [j,i]
        bct = tl.dot(bm, ct) * wt
        rb = r.to(x.dtype)
        dxb = tl.dot(bm, rb) * to_end[:, None]
        dxb = tl.dot(bct.to(x.dtype), dy, acc=dxb)
        tl.store(xdx_ptr + rows * H + h, tl.sum(dxb * x, 1), mask=mask)
        dx = dxb * dt[:, None] + D * dy
        tl.store(dx_ptr + (rows[:, None] * H + h) * P + p[None, :], dx.to(x.dtype), mask=mask[:, None])
        gap = s[:, None] - s[None, :]
        w = tl.where(i[:, None] >= i[None, :], tl.exp(tl.minimum(gap, 0.0)) * dt[None, :], 0.0)
        dp = tl.dot(dy, xt) * w                                                             # [i,j]
        dbt = tl.dot(rb, xt) * (to_end * dt)[None, :]
        dbt = tl.dot(ct, dp.to(x.dtype), acc=dbt)                                           # [N,j]
        bt = tl.load(B_ptr + rows[None, :] * N + n[:, None], mask=mask[None, :], other=0.0)
        tl.store(bdb_ptr + rows * H + h, tl.sum(bt * dbt, 0), mask=mask)
        tl.store(dB_ptr + (rows[None, :] * H + h) * N + n[:, None], dbt.to(x.dtype), mask=mask[None, :])
        dys = (dy * tl.exp(s)[:, None]).to(x.dtype)
        r = tl.dot(ct, dys, acc=r * tl.exp(total))


def median_ms(fn, repeats=20):
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(); fn(); end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def inputs(b, t, h, p, n, device="cuda", dtype=torch.bfloat16):
    g = torch.Generator(device).manual_seed(1)
    r = lambda *shape: torch.randn(*shape, device=device, generator=g)
    return dict(x=r(b, t, h, p).to(dtype), dt=r(b, t, h).to(dtype), A=-torch.rand(h, device=device, generator=g) * 15 - 1,
                B=r(b, t, n).to(dtype), C=r(b, t, n).to(dtype), D=r(h), bias=r(h) - 4.0, dy=r(b, t, h, p).to(dtype))


def exact(v):
    d = {k: t.double() for k, t in v.items()}
    leaves = [d[k].requires_grad_() for k in ("x", "B", "C", "dt")]
    dt = torch.nn.functional.softplus(d["dt"] + d["bias"])
    s = (dt * d["A"]).cumsum(1)
    T = s.shape[1]
    tri = torch.ones(T, T, device=s.device, dtype=torch.bool).tril()
    L = (s[:, :, None] - s[:, None]).masked_fill(~tri[None, :, :, None], -torch.inf).exp()
    M = L * torch.einsum("bin,bjn->bij", d["C"], d["B"])[..., None] * dt[:, None]
    y = torch.einsum("bijh,bjhp->bihp", M, d["x"]) + d["D"][:, None] * d["x"]
    grads = torch.autograd.grad((y * d["dy"]).sum(), leaves)
    return y.detach(), dict(zip(("x", "B", "C", "dt"), grads))


def rel(a, e):
    return float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt())


def run_forward(v, y, Q, BP, warps, stages):
    b, t, h, p = v["x"].shape
    forward[(h, p // BP, b)](v["x"], v["dt"], v["A"], v["B"], v["C"], v["D"], v["bias"], y, t,
                             H=h, N=v["B"].shape[-1], P=p, Q=Q, BP=BP, num_warps=warps, num_stages=stages)


def buffers(v):
    b, t, h, p = v["x"].shape
    n = v["B"].shape[-1]
    nan = lambda *shape, dtype=torch.float32: torch.full(shape, torch.nan, device="cuda", dtype=dtype)
    return dict(dC=nan(b, t, h, n, dtype=torch.bfloat16), dB=nan(b, t, h, n, dtype=torch.bfloat16),
                dx=torch.full_like(v["x"], torch.nan), cdc=nan(b, t, h), bdb=nan(b, t, h), xdx=nan(b, t, h))


def run_dc(v, g, Q, warps, stages):
    b, t, h, p = v["x"].shape
    backward_dc[(h, b)](v["x"], v["dt"], v["A"], v["B"], v["C"], v["bias"], v["dy"], g["dC"], g["cdc"], t,
                        H=h, N=v["B"].shape[-1], P=p, Q=Q, num_warps=warps, num_stages=stages)


def run_dbx(v, g, Q, warps, stages):
    b, t, h, p = v["x"].shape
    backward_dbx[(h, b)](v["x"], v["dt"], v["A"], v["B"], v["C"], v["D"], v["bias"], v["dy"], g["dB"], g["dx"], g["bdb"],
                         g["xdx"], t, H=h, N=v["B"].shape[-1], P=p, Q=Q, num_warps=warps, num_stages=stages)


def d_dt(v, g):
    """Gradient of dt from the per-token sums and one suffix sum."""
    dlog = (g["cdc"] - g["bdb"]).flip(1).cumsum(1).flip(1)
    return (dlog * v["A"] + g["xdx"]) * torch.sigmoid(v["dt"].float() + v["bias"])


def configurations():
    for Q, BP, warps, stages in itertools.product((64, 128), (64, 32), (4, 8), (2, 3, 1)):
        yield "fwd", Q, BP, warps, stages
    for kind in ("dc", "dbx"):
        for Q, warps, stages in itertools.product((64, 32, 128), (4, 8), (1, 2)):
            yield kind, Q, 64, warps, stages


def one(kind, Q, BP, warps, stages, small, wanted, big):
    y_exact, g_exact = wanted
    row = []
    if kind == "fwd":
        y = torch.full_like(small["x"], torch.nan)
        run_forward(small, y, Q, BP, warps, stages)
        row.append(f"{rel(y, y_exact):.1e}")
        for v in big.values():
            out = torch.empty_like(v["x"])
            row.append(f"{median_ms(lambda: run_forward(v, out, Q, BP, warps, stages)):.3f}")
        return row
    g = buffers(small)
    run = run_dc if kind == "dc" else run_dbx
    run_dc(small, g, Q, warps, stages)
    row.append(f"dC {rel(g['dC'].float().sum(2), g_exact['C']):.1e}")
    if kind == "dbx":
        run_dbx(small, g, Q, warps, stages)
        row += [f"dB {rel(g['dB'].float().sum(2), g_exact['B']):.1e}", f"dx {rel(g['dx'], g_exact['x']):.1e}",
                f"ddt {rel(d_dt(small, g), g_exact['dt']):.1e}"]
    for v in big.values():
        gb = buffers(v)
        row.append(f"{median_ms(lambda: run(v, gb, Q, warps, stages), 8):.3f}")
    return row


def main():
    begin = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    small = inputs(2, 300, 4, 64, 128)
    wanted = exact(small)
    shapes = {"B8T4096": (8, 4096), "B2T16384": (2, 16384)}
    big = {name: inputs(b, t, 64, 64, 128) for name, (b, t) in shapes.items()}
    print("kind Q BP warps stages | errors | " + " ".join(shapes), flush=True)
    for index, config in enumerate(configurations()):
        if index < begin:
            continue
        try:
            print(*config, *one(*config, small, wanted, big), flush=True)
        except torch.AcceleratorError:
            print(*config, "ILLEGAL ACCESS", flush=True)
            os.execv(sys.executable, [sys.executable, __file__, str(index + 1)])
        except Exception as error:
            print(*config, type(error).__name__, str(error)[:60].replace("\n", " "), flush=True)
    dC = torch.empty(8, 4096, 64, 128, device="cuda", dtype=torch.bfloat16)
    print("sum over heads of one [B,T,H,N]:", f"{median_ms(lambda: dC.sum(2, dtype=torch.float32)):.3f}")


if __name__ == "__main__":
    sys.exit(main())
