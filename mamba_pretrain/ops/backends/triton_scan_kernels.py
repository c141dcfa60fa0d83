"""Device code of the selective scan in Triton; `triton_scan` launches it and says how the parts fit together.

A program holds the states [N, BLOCK_E] of BLOCK_E neighbouring channels and walks through time. With 32 channels and
one warp for every 16 states, Triton's default layout gives each thread one channel: sums over N then need no other
thread (N <= 16), and loads and stores of a step are coalesced.

Whatever has a value for each state lies in tiles [BLOCK_N, BLOCK_E], one for each block X of channels: all addresses of
a tile are one register plus constants, where (N, E) would cost two registers for every state. Padding is zero. A
arrives in tiles too, multiplied by log2(e).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton types its kernels itself, from the arguments of a launch.

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), with all digits where exp(x) is small (the second factor undoes the rounding of 1 + exp(x))."""
    power = tl.exp(tl.minimum(x, 20.0))
    rounded = (1.0 + power) - 1.0
    tail = tl.log(1.0 + power) * (power / tl.where(rounded == 0.0, 1.0, rounded))
    return tl.where(x > 20.0, x, tl.where(rounded == 0.0, power, tail))


@triton.jit
def _wide(POINTER, mask):
    return tl.load(POINTER, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _decay(a, step, SEQ, t):
    """exp(Delta_t A), or zero where a document begins at step t."""
    decay = tl.exp2(step[None, :] * a)
    if SEQ is not None:
        decay = tl.where(tl.load(SEQ + t) == tl.load(SEQ + tl.maximum(t - 1, 0)), decay, 0.0)
    return decay


@triton.jit
def ends_kernel(
    U, DELTA, A, B, BIAS, SEQ, END, TOTAL, L, E, u_b, u_l, delta_b, delta_l, b_b, b_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """END (B, chunks) tiles: the state after each chunk had it begun with zeros. TOTAL (B, chunks, E): sum of Delta."""
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = row * tl.num_programs(1) + chunk
    tile_at = (place * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N * BLOCK_E
    start = chunk * CHUNK
    n = tl.arange(0, BLOCK_N)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    real_n, real_e = n < N, e < E
    tile = n[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    a, bias = tl.load(A + tl.program_id(0) * BLOCK_N * BLOCK_E + tile), _wide(BIAS + e, real_e)
    U += row * u_b + start.to(tl.int64) * u_l
    DELTA += row * delta_b + start.to(tl.int64) * delta_l
    B += row * b_b + start.to(tl.int64) * b_l
    if SEQ is not None:
        SEQ += row * L

    h = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    for i in range(tl.minimum(CHUNK, L - start)):
        u = _wide(U + i * u_l + e, real_e)
        step = _softplus(_wide(DELTA + i * delta_l + e, real_e) + bias)
        b = _wide(B + i * b_l + n, real_n)
        h = _decay(a, step, SEQ, start + i) * h + (step * u)[None, :] * b[:, None]
        total += step
    tl.store(END + tile_at + tile, h)
    tl.store(TOTAL + place * E + e, total, mask=real_e)


@triton.jit
def carry_kernel(
    CARRY, TOTAL, A, SEQ, FIRST, LAST, chunks, L, E,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From chunk to chunk: CARRY, what each adds, becomes what comes into each. FIRST and LAST are (B, E, N)."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    tile = n[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    outer = row * E * N + e[None, :] * N + n[:, None]
    real = (n < N)[:, None] & (e < E)[None, :]
    a = tl.load(A + block * BLOCK_N * BLOCK_E + tile)
    if SEQ is not None:
        SEQ += row * L

    h = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if FIRST is not None:
        h = _wide(FIRST + outer, real)
    for i in range(chunks):
        chunk = i
        if REVERSE:
            chunk = chunks - 1 - i
        place = row * chunks + chunk
        carry = CARRY + (place * tl.num_programs(0) + block) * BLOCK_N * BLOCK_E + tile
        added = tl.load(carry)
        decay = tl.exp2(_wide(TOTAL + place * E + e, e < E)[None, :] * a)
        if SEQ is not None:  # documents are numbered upwards, so no change from end to end is no change at all
            before = tl.load(SEQ + tl.maximum(chunk * CHUNK - 1, 0))
            decay = tl.where(before == tl.load(SEQ + tl.minimum(chunk * CHUNK + CHUNK, L) - 1), decay, 0.0)
        tl.store(carry, h)
        h = decay * h + added
    if LAST is not None:
        tl.store(LAST + outer, h, mask=real)


@triton.jit
def outputs_kernel(
    U, DELTA, A, B, C, D, Z, BIAS, SEQ, STATE, Y, L, E, u_b, u_l, delta_b, delta_l, b_b, b_l, c_b, c_l, z_b, z_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Y (B, L, E) from STATE (B, chunks) tiles, the state that comes into each chunk."""
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = row * tl.num_programs(1) + chunk
    tile_at = (place * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N * BLOCK_E
    start = chunk * CHUNK
    n = tl.arange(0, BLOCK_N)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    real_n, real_e = n < N, e < E
    tile = n[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    a = tl.load(A + tl.program_id(0) * BLOCK_N * BLOCK_E + tile)
    bias, skip = _wide(BIAS + e, real_e), _wide(D + e, real_e)
    first = start.to(tl.int64)
    U += row * u_b + first * u_l
    DELTA += row * delta_b + first * delta_l
    B += row * b_b + first * b_l
    C += row * c_b + first * c_l
    Z += row * z_b + first * z_l
    Y += (row * L + first) * E
    if SEQ is not None:
        SEQ += row * L

    h = tl.load(STATE + tile_at + tile)
    for i in range(tl.minimum(CHUNK, L - start)):
        u, z = _wide(U + i * u_l + e, real_e), _wide(Z + i * z_l + e, real_e)
        step = _softplus(_wide(DELTA + i * delta_l + e, real_e) + bias)
        b, c = _wide(B + i * b_l + n, real_n), _wide(C + i * c_l + n, real_n)
        h = _decay(a, step, SEQ, start + i) * h + (step * u)[None, :] * b[:, None]
        y = (tl.sum(h * c[:, None], axis=0) + skip * u) * z * tl.sigmoid(z)
        tl.store(Y + i * E + e, y.to(Y.dtype.element_ty), mask=real_e)


@triton.jit
def forward_again_kernel(
    U, DELTA, A, B, C, D, Z, BIAS, SEQ, STATE, DY, DZ, DC, DD, WITHIN, ADDED, L, E, u_b, u_l, delta_b, delta_l,
    b_b, b_l, c_b, c_l, z_b, z_l, dy_b, dy_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """All of the backward that needs the states in order.

    DZ (B, L, E); DC (blocks, B, L, N) and DD (B, chunks, E), to be summed; WITHIN (B, chunks, X, CHUNK / PART) tiles:
    the state before every PART steps; ADDED (B, chunks) tiles: what a chunk's outputs add to the gradient of the state
    that came into it.
    """
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = row * tl.num_programs(1) + chunk
    tile_at = (place * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N * BLOCK_E
    start = chunk * CHUNK
    n = tl.arange(0, BLOCK_N)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    real_n, real_e = n < N, e < E
    tile = n[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    a = tl.load(A + tl.program_id(0) * BLOCK_N * BLOCK_E + tile)
    bias, skip = _wide(BIAS + e, real_e), _wide(D + e, real_e)
    first = start.to(tl.int64)
    U += row * u_b + first * u_l
    DELTA += row * delta_b + first * delta_l
    B += row * b_b + first * b_l
    C += row * c_b + first * c_l
    Z += row * z_b + first * z_l
    DY += row * dy_b + first * dy_l
    DZ += (row * L + first) * E
    DC += ((tl.program_id(0) * tl.num_programs(2) + row) * L + first) * N
    WITHIN += tile_at * (CHUNK // PART)
    if SEQ is not None:
        SEQ += row * L

    h = tl.load(STATE + tile_at + tile)
    product = tl.full([BLOCK_N, BLOCK_E], 1.0, tl.float32)  # of all decays since the chunk began
    added = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dskip = tl.zeros([BLOCK_E], tl.float32)
    steps = tl.minimum(CHUNK, L - start)
    for part in range(tl.cdiv(steps, PART)):
        tl.store(WITHIN + part * BLOCK_N * BLOCK_E + tile, h)
        for i in range(part * PART, tl.minimum(part * PART + PART, steps)):
            u, z = _wide(U + i * u_l + e, real_e), _wide(Z + i * z_l + e, real_e)
            dout = _wide(DY + i * dy_l + e, real_e)
            step = _softplus(_wide(DELTA + i * delta_l + e, real_e) + bias)
            b, c = _wide(B + i * b_l + n, real_n), _wide(C + i * c_l + n, real_n)
            decay = _decay(a, step, SEQ, start + i)
            h = decay * h + (step * u)[None, :] * b[:, None]
            product *= decay

            gate = tl.sigmoid(z)
            y = tl.sum(h * c[:, None], axis=0) + skip * u
            dz = dout * y * gate * (1.0 + z * (1.0 - gate))
            tl.store(DZ + i * E + e, dz.to(DZ.dtype.element_ty), mask=real_e)
            dy = dout * z * gate
            dskip += dy * u
            tl.store(DC + i * N + n, tl.sum(h * dy[None, :], axis=1), mask=real_n)
            added += product * (c[:, None] * dy[None, :])
    tl.store(ADDED + tile_at + tile, added)
    tl.store(DD + place * E + e, dskip, mask=real_e)


@triton.jit
def backward_kernel(
    U, DELTA, A, B, C, D, Z, BIAS, SEQ, WITHIN, G, DY, DU, DDELTA, DA, DB, DBIAS, L, E, u_b, u_l, delta_b, delta_l,
    b_b, b_l, c_b, c_l, z_b, z_l, dy_b, dy_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """g_t = C_t dy_t + decay_{t+1} g_{t+1} is the gradient of h_t; every gradient made here is a product with it.

    G (B, chunks) tiles: what comes from later chunks. DU and DDELTA (B, L, E); DA (B, chunks) tiles, DB (blocks, B, L,
    N) and DBIAS (B, chunks, E), to be summed.
    """
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = row * tl.num_programs(1) + chunk
    tile_at = (place * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N * BLOCK_E
    start = chunk * CHUNK
    n = tl.arange(0, BLOCK_N)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    real_n, real_e = n < N, e < E
    tile = n[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    a = tl.load(A + tl.program_id(0) * BLOCK_N * BLOCK_E + tile)
    bias, skip = _wide(BIAS + e, real_e), _wide(D + e, real_e)
    first = start.to(tl.int64)
    U += row * u_b + first * u_l
    DELTA += row * delta_b + first * delta_l
    B += row * b_b + first * b_l
    C += row * c_b + first * c_l
    Z += row * z_b + first * z_l
    DY += row * dy_b + first * dy_l
    DU += (row * L + first) * E
    DDELTA += (row * L + first) * E
    DB += ((tl.program_id(0) * tl.num_programs(2) + row) * L + first) * N
    WITHIN += tile_at * (CHUNK // PART)
    if SEQ is not None:
        SEQ += row * L

    g = tl.load(G + tile_at + tile)
    da = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dbias = tl.zeros([BLOCK_E], tl.float32)
    steps = tl.minimum(CHUNK, L - start)
    parts = tl.cdiv(steps, PART)
    for backwards in range(parts):
        part = parts - 1 - backwards
        h = tl.load(WITHIN + part * BLOCK_N * BLOCK_E + tile)
        # The state before each step and what the second loop reads of its inputs, in registers: both loops are
        # unrolled, and the first has no stores and no sums over threads, so that its loads can be under way together.
        states, kept = (), ()
        for j in tl.static_range(PART):
            i = tl.minimum(part * PART + j, steps - 1)
            here = part * PART + j < steps  # a step behind the end is the last one once more, and changes nothing
            u, z = _wide(U + i * u_l + e, real_e), _wide(Z + i * z_l + e, real_e)
            before = _wide(DELTA + i * delta_l + e, real_e) + bias
            step, slope = tl.where(here, _softplus(before), 0.0), tl.sigmoid(before)
            dy = tl.where(here, _wide(DY + i * dy_l + e, real_e) * z * tl.sigmoid(z), 0.0)
            states, kept = states + (h,), kept + ((u, step, slope, dy),)  # type: ignore[assignment]  # noqa: RUF005
            b = _wide(B + i * b_l + n, real_n)
            h = _decay(a, step, SEQ, tl.where(here, start + i, 0)) * h + (step * u)[None, :] * b[:, None]
        for j in tl.static_range(PART):
            i = tl.minimum(part * PART + PART - 1 - j, steps - 1)
            here = part * PART + PART - 1 - j < steps
            u, step, slope, dy = kept[PART - 1 - j]
            b, c = _wide(B + i * b_l + n, real_n), _wide(C + i * c_l + n, real_n)

            g += c[:, None] * dy[None, :]
            ddrive = tl.sum(g * b[:, None], axis=0)  # of Delta_t u_t
            tl.store(DB + i * N + n, tl.sum(g * (step * u)[None, :], axis=1), mask=n < tl.where(here, N, 0))
            tl.store(DU + i * E + e, (dy * skip + step * ddrive).to(DU.dtype.element_ty), mask=e < tl.where(here, E, 0))
            g *= _decay(a, step, SEQ, tl.where(here, start + i, 0))
            dexponent = g * states[PART - 1 - j]  # of Delta_t A
            da += dexponent * step[None, :]
            ddelta = tl.where(here, u * ddrive + LN_2 * tl.sum(dexponent * a, axis=0), 0.0) * slope
            dbias += ddelta
            tl.store(DDELTA + i * E + e, ddelta.to(DDELTA.dtype.element_ty), mask=e < tl.where(here, E, 0))
    tl.store(DA + tile_at + tile, da)
    tl.store(DBIAS + place * E + e, dbias, mask=real_e)
