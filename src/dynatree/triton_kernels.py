"""What `cuda_kernels` launches: the programs of its kernels, in Triton's language."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _wait(EARLY: tl.constexpr):
    """From here on, all that earlier kernels wrote is there, and the next kernel may begin beside
    this one: no further one, which would only take room."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _touch(pointers):
    """Has what lies there read into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64, bitcast=True)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def norm(
    hidden,
    gain_1,
    shift_1,
    gain_2,
    shift_2,
    out_1,
    out_2,
    living,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TWICE: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A row, normalised with one or two gains and shifts."""
    row = tl.program_id(0)
    at = tl.arange(0, PADDED)
    inside = at < WIDTH
    _wait(EARLY)
    if COUNTED:
        if row >= tl.load(living):
            return
    states = tl.load(hidden + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    states = tl.where(inside, states - tl.sum(states, 0) / WIDTH, 0.0)
    states *= 1.0 / tl.sqrt(tl.sum(states * states, 0) / WIDTH + eps)
    gain = tl.load(gain_1 + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_1 + at, mask=inside, other=0.0).to(tl.float32)
    kind = out_1.dtype.element_ty
    tl.store(out_1 + row * WIDTH + at, (states * gain + shift).to(kind), mask=inside)
    if TWICE:
        gain = tl.load(gain_2 + at, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_2 + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_2 + row * WIDTH + at, (states * gain + shift).to(kind), mask=inside)


@triton.jit
def _row_by(
    states,
    weight,
    bias,
    out,
    start,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GELU: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The whole width at once, as MAIN and up to REST columns: what does not depend on the kernel
    before is on its way when that ends."""
    n = start + tl.arange(0, OUTPUTS)
    a = tl.arange(0, MAIN)
    b = MAIN + tl.arange(0, REST)
    more = b < WIDTH
    kind = out.dtype.element_ty
    rows = weight + n[:, None] * WIDTH
    weights_a = tl.load(rows + a[None, :])
    weights_b = tl.load(rows + b[None, :], mask=more[None, :], other=0.0)
    added = tl.load(bias + n).to(tl.float32)
    _wait(EARLY)
    states_a = tl.load(states + a).to(tl.float32)
    states_b = tl.load(states + b, mask=more, other=0.0).to(tl.float32)
    sums = tl.sum(weights_a.to(tl.float32) * states_a[None, :], 1)
    sums += tl.sum(weights_b.to(tl.float32) * states_b[None, :], 1)
    result = (sums + added).to(kind)
    if GELU:
        result = _gelu(result.to(tl.float32)).to(kind)
    tl.store(out + n, result)


@triton.jit
def enter_one(
    states_1,
    states_2,
    weight_1,
    bias_1,
    weight_2,
    bias_2,
    out_1,
    out_2,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    FIRST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """For one row: `out_1` = states 1 by weight 1, `out_2` = GELU(states 2 by weight 2)."""
    program = tl.program_id(0)
    if program < FIRST:
        _row_by(
            states_1, weight_1, bias_1, out_1, program * OUTPUTS,
            WIDTH, MAIN, REST, OUTPUTS, False, EARLY,
        )  # fmt: skip
    else:
        _row_by(
            states_2, weight_2, bias_2, out_2, (program - FIRST) * OUTPUTS,
            WIDTH, MAIN, REST, OUTPUTS, True, EARLY,
        )  # fmt: skip


@triton.jit
def leave_one(
    hidden,
    attended,
    active,
    weight_1,
    bias_1,
    weight_2,
    bias_2,
    out,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    LINES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """For one row: `hidden` + `attended` by weight 1 + `active` by weight 2."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, STEP)
    kind = out.dtype.element_ty
    rows_1 = weight_1 + n[:, None] * WIDTH
    rows_2 = weight_2 + n[:, None] * INNER
    if EARLY:
        line = tl.minimum(tl.arange(0, LINES) * 64, WIDTH - 1)
        _touch(rows_2 + line[None, :])
        _touch(rows_1 + line[None, :])
    _wait(EARLY)
    sums = tl.zeros((OUTPUTS, STEP), tl.float32)
    for at in tl.static_range(0, INNER, STEP):
        weights = tl.load(rows_2 + (at + k)[None, :])
        sums += weights.to(tl.float32) * tl.load(active + at + k).to(tl.float32)[None, :]
    second = (tl.sum(sums, 1) + tl.load(bias_2 + n).to(tl.float32)).to(kind).to(tl.float32)
    sums = tl.zeros((OUTPUTS, STEP), tl.float32)
    for at in tl.static_range(0, WIDTH, STEP):
        weights = tl.load(rows_1 + (at + k)[None, :])
        sums += weights.to(tl.float32) * tl.load(attended + at + k).to(tl.float32)[None, :]
    first = (tl.sum(sums, 1) + tl.load(bias_1 + n).to(tl.float32)).to(kind).to(tl.float32)
    both = (second + first).to(kind).to(tl.float32)
    tl.store(out + n, (both + tl.load(hidden + n).to(tl.float32)).to(kind))


@triton.jit
def _rows_by(
    states,
    weight,
    rows,
    start,
    first,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """[OUTPUTS, ROWS], over the columns `first` to `first` + COUNT of both."""
    n = start + tl.arange(0, OUTPUTS)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    weights = weight + n[:, None] * WIDTH + first + k[None, :]
    inputs = states + m[None, :] * WIDTH + first + k[:, None]
    inside = m[None, :] < rows
    if EARLY:
        _touch(weight + n[:, None] * WIDTH + first + tl.arange(0, 4)[None, :] * 64)
    _wait(EARLY)
    for at in tl.range(0, COUNT, STEP, num_stages=STAGES):
        left = tl.load(weights + at)
        right = tl.load(inputs + at, mask=inside, other=0.0)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _store_rows(out, sums, added, n, m, rows, total, GELU: tl.constexpr):
    """Stores [n, m] sums and what is added to each output, as [m, n] of rows with `total`."""
    kind = out.dtype.element_ty
    result = (sums + added[:, None]).to(kind)
    if GELU:
        result = _gelu(result.to(tl.float32)).to(kind)
    tl.store(out + m[None, :] * total + n[:, None], result, mask=m[None, :] < rows)


@triton.jit
def _enter_rows_by(
    states,
    weight,
    bias,
    out,
    living,
    rows,
    start,
    total,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    GELU: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    n = start + tl.arange(0, OUTPUTS)
    m = tl.arange(0, ROWS)
    added = tl.load(bias + n).to(tl.float32)
    if COUNTED:
        _wait(EARLY)
        count = tl.load(living)
        for first in tl.range(0, count, ROWS, num_stages=1):
            sums = _rows_by(
                states + first * WIDTH, weight, count - first, start, 0, WIDTH,
                WIDTH, ROWS, OUTPUTS, STEP, STAGES, PRECISION, False,
            )  # fmt: skip
            _store_rows(out + first * total, sums, added, n, m, count - first, total, GELU)
    else:
        sums = _rows_by(
            states, weight, rows, start, 0, WIDTH,
            WIDTH, ROWS, OUTPUTS, STEP, STAGES, PRECISION, EARLY,
        )  # fmt: skip
        _store_rows(out, sums, added, n, m, rows, total, GELU)


@triton.jit
def enter_many(
    states_1,
    states_2,
    weight_1,
    bias_1,
    weight_2,
    bias_2,
    out_1,
    out_2,
    living,
    rows,
    total_1,
    total_2,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`enter_one` for several rows."""
    program = tl.program_id(0)
    if program < FIRST:
        _enter_rows_by(
            states_1, weight_1, bias_1, out_1, living, rows, program * OUTPUTS, total_1,
            WIDTH, ROWS, OUTPUTS, STEP, STAGES, PRECISION, False, COUNTED, EARLY,
        )  # fmt: skip
    else:
        _enter_rows_by(
            states_2, weight_2, bias_2, out_2, living, rows, (program - FIRST) * OUTPUTS, total_2,
            WIDTH, ROWS, OUTPUTS, STEP, STAGES, PRECISION, True, COUNTED, EARLY,
        )  # fmt: skip


@triton.jit
def _normed_by(
    hidden,
    weights,
    gains,
    shifts,
    rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[outputs, ROWS], of rows that are normalised here."""
    m = tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    inside = m[:, None] < rows
    states = tl.load(hidden + m[:, None] * WIDTH + k[None, :], mask=inside, other=0.0)
    states = states.to(tl.float32)
    states -= (tl.sum(states, 1) / WIDTH)[:, None]
    states *= (1.0 / tl.sqrt(tl.sum(states * states, 1) / WIDTH + eps))[:, None]
    states = (states * gains[None, :] + shifts[None, :]).to(weights.dtype)
    return tl.dot(weights, tl.trans(states), input_precision=PRECISION)


@triton.jit
def _normed_rows_by(
    hidden,
    gain,
    shift,
    weight,
    bias,
    out,
    living,
    rows,
    start,
    total,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    GELU: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    n = start + tl.arange(0, OUTPUTS)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    weights = tl.load(weight + n[:, None] * WIDTH + k[None, :])
    gains = tl.load(gain + k).to(tl.float32)
    shifts = tl.load(shift + k).to(tl.float32)
    added = tl.load(bias + n).to(tl.float32)
    _wait(EARLY)
    if COUNTED:
        count = tl.load(living)
        for first in tl.range(0, count, ROWS, num_stages=1):
            sums = _normed_by(
                hidden + first * WIDTH, weights, gains, shifts, count - first, eps,
                WIDTH, ROWS, PRECISION,
            )  # fmt: skip
            _store_rows(out + first * total, sums, added, n, m, count - first, total, GELU)
    else:
        sums = _normed_by(hidden, weights, gains, shifts, rows, eps, WIDTH, ROWS, PRECISION)
        _store_rows(out, sums, added, n, m, rows, total, GELU)


@triton.jit
def enter_narrow(
    hidden,
    gain_1,
    shift_1,
    gain_2,
    shift_2,
    weight_1,
    bias_1,
    weight_2,
    bias_2,
    out_1,
    out_2,
    living,
    rows,
    total_1,
    total_2,
    eps,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Normalisation and `enter_many` in one, for a width of which a program can hold all rows."""
    program = tl.program_id(0)
    if program < FIRST:
        _normed_rows_by(
            hidden, gain_1, shift_1, weight_1, bias_1, out_1, living, rows, program * OUTPUTS,
            total_1, eps, WIDTH, ROWS, OUTPUTS, PRECISION, False, COUNTED, EARLY,
        )  # fmt: skip
    else:
        _normed_rows_by(
            hidden, gain_2, shift_2, weight_2, bias_2, out_2, living, rows,
            (program - FIRST) * OUTPUTS,
            total_2, eps, WIDTH, ROWS, OUTPUTS, PRECISION, True, COUNTED, EARLY,
        )  # fmt: skip


@triton.jit
def _leave_part(
    attended,
    active,
    weight_1,
    weight_2,
    parts,
    rows,
    start,
    split,
    size,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Notes one split's share of ROWS rows."""
    n = start + tl.arange(0, OUTPUTS)
    at = tl.arange(0, ROWS)[None, :] * WIDTH + n[:, None]
    if split == 0:
        sums = _rows_by(
            attended, weight_1, rows, start, 0, WIDTH, WIDTH,
            ROWS, OUTPUTS, STEP, STAGES, PRECISION, EARLY,
        )  # fmt: skip
        tl.store(parts + at, sums)
    else:
        sums = _rows_by(
            active, weight_2, rows, start, (split - 1) * (INNER // SPLITS), INNER, INNER // SPLITS,
            ROWS, OUTPUTS, STEP, STAGES, PRECISION, EARLY,
        )  # fmt: skip
        tl.store(parts + split * size + at, sums)


@triton.jit
def _leave_whole(
    hidden,
    bias_1,
    bias_2,
    out,
    parts,
    rows,
    start,
    size,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Puts the shares of ROWS rows together."""
    n = start + tl.arange(0, OUTPUTS)
    m = tl.arange(0, ROWS)
    inside = (m[None, :] < rows) & (n[:, None] < WIDTH)
    at = m[None, :] * WIDTH + n[:, None]
    kind = out.dtype.element_ty
    first = tl.load(parts + at, cache_modifier=".cg")
    second = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for part in tl.static_range(1, SPLITS + 1):
        second += tl.load(parts + part * size + at, cache_modifier=".cg")
    first += tl.load(bias_1 + n).to(tl.float32)[:, None]
    second += tl.load(bias_2 + n).to(tl.float32)[:, None]
    both = second.to(kind).to(tl.float32) + first.to(kind).to(tl.float32)
    before = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (both.to(kind).to(tl.float32) + before).to(kind), mask=inside)


@triton.jit
def leave_many(
    hidden,
    attended,
    active,
    weight_1,
    bias_1,
    weight_2,
    bias_2,
    out,
    parts,
    finished,
    living,
    rows,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    SPLITS: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`leave_one` for up to HELD rows; the second product is split among SPLITS programs."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    start = tile * OUTPUTS
    size = HELD * WIDTH
    if COUNTED:
        _wait(EARLY)
        count = tl.load(living)
        for first in tl.range(0, count, ROWS, num_stages=1):
            _leave_part(
                attended + first * WIDTH, active + first * INNER, weight_1, weight_2,
                parts + first * WIDTH, count - first, start, split, size,
                WIDTH, INNER, SPLITS, ROWS, OUTPUTS, STEP, STAGES, PRECISION, False,
            )  # fmt: skip
    else:
        _leave_part(
            attended, active, weight_1, weight_2, parts, rows, start, split, size,
            WIDTH, INNER, SPLITS, ROWS, OUTPUTS, STEP, STAGES, PRECISION, EARLY,
        )  # fmt: skip
    # All threads have stored before one of them says so.
    tl.debug_barrier()
    if tl.atomic_add(finished + tile, 1, sem="acq_rel") == SPLITS:
        if COUNTED:
            count = tl.load(living)
            for first in tl.range(0, count, ROWS, num_stages=1):
                at = first * WIDTH
                _leave_whole(
                    hidden + at, bias_1, bias_2, out + at, parts + at, count - first, start, size,
                    WIDTH, SPLITS, ROWS, OUTPUTS,
                )  # fmt: skip
        else:
            _leave_whole(
                hidden, bias_1, bias_2, out, parts, rows, start, size,
                WIDTH, SPLITS, ROWS, OUTPUTS,
            )  # fmt: skip
        tl.store(finished + tile, 0)


@triton.jit
def leave_narrow(
    hidden,
    attended,
    active,
    weight_1,
    bias_1,
    weight_2,
    bias_2,
    out,
    parts,
    finished,
    living,
    rows,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    SPLITS: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`leave_many` for a width of which a program can hold all rows: what does not depend on the
    kernel before is on its way when that ends."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    size = HELD * WIDTH
    if split == 0:
        weights = tl.load(weight_1 + n[:, None] * WIDTH + k[None, :])
    else:
        weights = tl.load(weight_2 + n[:, None] * INNER + (split - 1) * WIDTH + k[None, :])
    number = rows
    if COUNTED:
        number = tl.load(living)
    _wait(EARLY)
    for first in tl.range(0, number, ROWS, num_stages=1):
        inside = (first + m)[:, None] < number
        row = (first + m)[:, None]
        if split == 0:
            states = tl.load(attended + row * WIDTH + k[None, :], mask=inside, other=0.0)
        else:
            at = row * INNER + (split - 1) * WIDTH + k[None, :]
            states = tl.load(active + at, mask=inside, other=0.0)
        sums = tl.dot(weights, tl.trans(states), input_precision=PRECISION)
        tl.store(parts + split * size + (first + m)[None, :] * WIDTH + n[:, None], sums)
    # All threads have stored before one of them says so.
    tl.debug_barrier()
    if tl.atomic_add(finished + tile, 1, sem="acq_rel") == SPLITS:
        for first in tl.range(0, number, ROWS, num_stages=1):
            at = first * WIDTH
            _leave_whole(
                hidden + at, bias_1, bias_2, out + at, parts + at, number - first, tile * OUTPUTS,
                size, WIDTH, SPLITS, ROWS, OUTPUTS,
            )  # fmt: skip
        tl.store(finished + tile, 0)


@triton.jit
def _rotated(
    states,
    cosines,
    sines,
    rows,
    inside,
    stride,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Rows of queries or keys, turned by their angles, as [n, PADDED]."""
    d = tl.arange(0, PADDED)
    kind = states.dtype.element_ty
    at = rows[:, None] * stride
    held = inside[:, None] & (d < SIZE)[None, :]
    turned = inside[:, None] & (d < ROTARY)[None, :]
    half: tl.constexpr = ROTARY // 2
    other = tl.where(d < half, d + half, d - half)
    sign = tl.where(d < half, -1.0, 1.0)
    own = tl.load(states + at + d[None, :], mask=held, other=0.0).to(tl.float32)
    partner = tl.load(states + at + other[None, :], mask=turned, other=0.0).to(tl.float32)
    angle = rows[:, None] * ROTARY + d[None, :]
    cosine = tl.load(cosines + angle, mask=turned, other=1.0).to(tl.float32)
    sine = tl.load(sines + angle, mask=turned, other=0.0).to(tl.float32)
    straight = (own * cosine).to(kind).to(tl.float32)
    across = (partner * sign[None, :] * sine).to(kind).to(tl.float32)
    return (straight + across).to(kind)


@triton.jit
def _against(
    queries,
    key,
    value,
    seen,
    scale,
    peak,
    total,
    sums,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of a softmax over pieces (Milakov and Gimelshein, 2018, arXiv:1805.02867)."""
    scores = tl.dot(queries, key, input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where(seen, scores, -1.0e30)
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp(scores - higher[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    fade = tl.exp(peak - higher)
    total = total * fade + tl.sum(weights, 1)
    sums = sums * fade[:, None]
    sums = tl.dot(weights.to(value.dtype), value, sums, input_precision=PRECISION)
    return higher, total, sums


@triton.jit
def _shown(keys, values, old, begin, s, m, d, inside, held, visible, SIZE: tl.constexpr):
    """A head's keys [d, s] and values [s, d] in the slots `s`, and which of them rows are shown."""
    there = s < visible
    at = begin + s * SIZE
    key = tl.load(keys + at[None, :] + d[:, None], mask=held[:, None] & there[None, :], other=0.0)
    value = tl.load(
        values + at[:, None] + d[None, :], mask=there[:, None] & held[None, :], other=0.0
    )
    seen = inside[:, None] & there[None, :]
    seen = tl.load(old + m[:, None] * visible + s[None, :], mask=seen, other=0) != 0
    return key, value, seen


@triton.jit
def surroundings(
    mask,
    slots,
    positions,
    all_cosines,
    all_sines,
    old,
    new,
    common,
    used,
    cosines,
    sines,
    living,
    rows,
    visible,
    last,
    ROTARY: tl.constexpr,
    TURNED: tl.constexpr,
    PADDED: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A row of a mask without the `slots` [rows], and what it says of these; how many slots it
    shows before the first that it hides, and before all that come after the last; its angles."""
    row = tl.program_id(0)
    j = tl.arange(0, PADDED)
    inside = j < rows
    _wait(EARLY)
    if COUNTED:
        if row >= tl.load(living):
            return
    d = tl.arange(0, TURNED)
    angle = tl.minimum(tl.load(positions + row), last) * ROTARY + d
    cosine = tl.load(all_cosines + angle, mask=d < ROTARY, other=0.0)
    sine = tl.load(all_sines + angle, mask=d < ROTARY, other=0.0)
    tl.store(cosines + row * ROTARY + d, cosine, mask=d < ROTARY)
    tl.store(sines + row * ROTARY + d, sine, mask=d < ROTARY)
    slot = tl.load(slots + j, mask=inside, other=0)
    shown = tl.load(mask + row * visible + slot, mask=inside, other=0)
    tl.store(new + row * rows + j, shown, mask=inside)
    for first in range(0, visible, 1024):
        at = first + tl.arange(0, 1024)
        there = at < visible
        copied = tl.load(mask + row * visible + at, mask=there, other=0)
        tl.store(old + row * visible + at, copied, mask=there)
    # What is stored next comes after it.
    tl.debug_barrier()
    tl.store(old + row * visible + slot, tl.zeros((PADDED,), tl.uint8), mask=inside)
    tl.debug_barrier()
    hidden = visible
    last = 0
    for first in range(0, visible, 1024):
        at = first + tl.arange(0, 1024)
        copied = tl.load(old + row * visible + at, mask=at < visible, other=0)
        hidden = tl.minimum(hidden, tl.min(tl.where(copied == 0, at, visible), 0))
        last = tl.maximum(last, tl.max(tl.where(copied != 0, at + 1, 0), 0))
    tl.store(common + row, hidden)
    tl.store(used + row, last)


@triton.jit
def attend(
    states,
    slots,
    old,
    new,
    common,
    used,
    cosines,
    sines,
    keys,
    values,
    out,
    parts,
    peaks,
    totals,
    finished,
    living,
    rows,
    visible,
    stride,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One head's queries of ROWS rows against CHUNKS * SLOTS slots, or against the new tokens.

    The last split is that of the new tokens, which come from `states` and are stored in the cache
    beside; the mask of the others hides the slots where they are being stored. What is the same
    for all layers is loaded before the kernel waits for the last one: it was there before that.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    block = tl.program_id(2)
    splits = tl.num_programs(1)
    kind = out.dtype.element_ty
    width: tl.constexpr = HEADS * SIZE
    number = rows
    if COUNTED:
        number = tl.load(living)
        if block * ROWS >= number:
            _wait(EARLY)
            return
    m = block * ROWS + tl.arange(0, ROWS)
    inside = m < number
    d = tl.arange(0, PADDED)
    held = d < SIZE
    own = states + head * 3 * SIZE
    peak = tl.full((ROWS,), -1.0e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, PADDED), tl.float32)
    if split < splits - 1:
        if CHUNKS == 1:
            s = split * SLOTS + tl.arange(0, SLOTS)
            key, value, seen = _shown(
                keys, values, old, head * stride, s, m, d, inside, held, visible, SIZE
            )
            _wait(EARLY)
            queries = _rotated(own, cosines, sines, m, inside, 3 * width, SIZE, PADDED, ROTARY)
            peak, total, sums = _against(
                queries, key, value, seen, scale, peak, total, sums, True, PRECISION
            )
        else:
            # Most slots hold what all rows are shown: nothing is asked there.
            lowest = tl.min(tl.load(common + m, mask=inside, other=visible), 0)
            most = tl.max(tl.load(used + m, mask=inside, other=0), 0)
            begin = split * CHUNKS * SLOTS
            end = tl.minimum(begin + CHUNKS * SLOTS, most)
            whole = tl.maximum(tl.minimum(lowest, end) - begin, 0) // SLOTS
            i = tl.arange(0, SLOTS)
            _wait(EARLY)
            queries = _rotated(own, cosines, sines, m, inside, 3 * width, SIZE, PADDED, ROTARY)
            for chunk in tl.range(0, whole, num_stages=STAGES):
                at = head * stride + (begin + chunk * SLOTS + i) * SIZE
                key = tl.load(keys + at[None, :] + d[:, None], mask=held[:, None], other=0.0)
                value = tl.load(values + at[:, None] + d[None, :], mask=held[None, :], other=0.0)
                peak, total, sums = _against(
                    queries, key, value, inside, scale, peak, total, sums, False, PRECISION
                )
            for first in tl.range(begin + whole * SLOTS, end, SLOTS, num_stages=1):
                key, value, seen = _shown(
                    keys, values, old, head * stride, first + i, m, d, inside, held, visible, SIZE
                )
                peak, total, sums = _against(
                    queries, key, value, seen, scale, peak, total, sums, True, PRECISION
                )
    else:
        both = inside[:, None] & held[None, :]
        slot = tl.load(slots + m, mask=inside, other=0)
        fresh = inside[:, None] & inside[None, :]
        fresh = tl.load(new + m[:, None] * rows + m[None, :], mask=fresh, other=0) != 0
        _wait(EARLY)
        new_value = tl.load(
            own + 2 * SIZE + m[:, None] * 3 * width + d[None, :], mask=both, other=0.0
        )
        new_key = _rotated(own + SIZE, cosines, sines, m, inside, 3 * width, SIZE, PADDED, ROTARY)
        queries = _rotated(own, cosines, sines, m, inside, 3 * width, SIZE, PADDED, ROTARY)
        place = head * stride + slot[:, None] * SIZE + d[None, :]
        tl.store(keys + place, new_key, mask=both)
        tl.store(values + place, new_value, mask=both)
        peak, total, sums = _against(
            queries, tl.trans(new_key), new_value, fresh, scale, peak, total, sums, True, PRECISION
        )
        if BLOCKS:
            for first in tl.range(0, number, ROWS, num_stages=1):
                if first != block * ROWS:
                    j = first + tl.arange(0, ROWS)
                    there = j < number
                    more = own + 2 * SIZE + j[:, None] * 3 * width + d[None, :]
                    other_value = tl.load(more, mask=there[:, None] & held[None, :], other=0.0)
                    other_key = _rotated(
                        own + SIZE, cosines, sines, j, there, 3 * width, SIZE, PADDED, ROTARY
                    )
                    shown = inside[:, None] & there[None, :]
                    shown = tl.load(new + m[:, None] * rows + j[None, :], mask=shown, other=0) != 0
                    peak, total, sums = _against(
                        queries, tl.trans(other_key), other_value, shown, scale, peak, total, sums,
                        True, PRECISION,
                    )  # fmt: skip
    group = head * tl.num_programs(2) + block
    i = tl.arange(0, ROWS)
    note = (group * splits + split) * ROWS + i
    tl.store(peaks + note, peak, mask=inside)
    tl.store(totals + note, total, mask=inside)
    tl.store(parts + note[:, None] * PADDED + d[None, :], sums, mask=inside[:, None])
    # All threads have stored before one of them says so.
    tl.debug_barrier()
    if tl.atomic_add(finished + group, 1, sem="acq_rel") == splits - 1:
        if ONE:
            p = tl.arange(0, SPLITS)
            of = (group * splits + p) * ROWS
            highs = tl.load(peaks + of, mask=p < splits, other=-1.0e30, cache_modifier=".cg")
            counts = tl.load(totals + of, mask=p < splits, other=0.0, cache_modifier=".cg")
            part = tl.load(
                parts + of[:, None] * PADDED + d[None, :],
                mask=(p < splits)[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            gains = tl.exp(highs - tl.max(highs, 0))
            mixed = tl.sum(part * gains[:, None], 0) / tl.sum(counts * gains, 0)
            tl.store(out + block * ROWS * width + head * SIZE + d, mixed.to(kind), mask=held)
        else:
            most = tl.full((ROWS,), -1.0e30, tl.float32)
            whole = tl.zeros((ROWS,), tl.float32)
            mixed = tl.zeros((ROWS, PADDED), tl.float32)
            for p in tl.range(0, splits, loop_unroll_factor=4):
                of = (group * splits + p) * ROWS + i
                high = tl.load(peaks + of, mask=inside, other=0.0, cache_modifier=".cg")
                count = tl.load(totals + of, mask=inside, other=1.0, cache_modifier=".cg")
                part = tl.load(
                    parts + of[:, None] * PADDED + d[None, :],
                    mask=inside[:, None],
                    other=0.0,
                    cache_modifier=".cg",
                )
                higher = tl.maximum(most, high)
                fade, gain = tl.exp(most - higher), tl.exp(high - higher)
                whole = whole * fade + count * gain
                mixed = mixed * fade[:, None] + part * gain[:, None]
                most = higher
            to = out + m[:, None] * width + head * SIZE + d[None, :]
            both = inside[:, None] & held[None, :]
            tl.store(to, (mixed / whole[:, None]).to(kind), mask=both)
        tl.store(finished + group, 0)


@triton.jit
def select_rows(table, indices, out, WIDTH: tl.constexpr, PART: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = at < WIDTH
    _wait(EARLY)
    chosen = tl.load(indices + row)
    tl.store(out + row * WIDTH + at, tl.load(table + chosen * WIDTH + at, mask=inside), mask=inside)


@triton.jit
def select_columns(table, indices, out, count, stride, PART: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = at < count
    _wait(EARLY)
    chosen = tl.load(indices + at, mask=inside, other=0)
    found = tl.load(table + row * stride + chosen, mask=inside, other=0)
    tl.store(out + row * count + at, found, mask=inside)


@triton.jit
def begin(
    history,
    position,
    offsets,
    depths,
    root,
    columns,
    slots,
    positions,
    recent,
    tokens,
    mask,
    visible,
    nodes,
    places,
    COUNT: tl.constexpr,
    PART: tl.constexpr,
):
    """A part of what can be said of a tree before it is grown."""
    part = tl.program_id(0)
    at = part * PART + tl.arange(0, PART)
    here = tl.load(position)
    column = tl.minimum(tl.maximum(at + 1 - here, 0), nodes)
    tl.store(columns + at, column, mask=at < visible)
    tl.store(slots + at, at + here, mask=at < nodes)
    depth = tl.load(depths + at, mask=at < places, other=0)
    tl.store(positions + at, depth + here, mask=at < places)
    for index in tl.static_range(COUNT):
        slot = tl.load(offsets + index) + here
        shown = (at <= slot).to(tl.uint8)
        tl.store(mask + index * visible + at, shown, mask=at < visible)
        if part == 0:
            tl.store(recent + index, slot)
            tl.store(tokens + index, tl.load(history + slot))
    if part == 0:
        tl.store(root, tl.load(history + here))


@triton.jit
def _most_probable(log_probs, held, most, count):
    """Which of the `count` numbers that are `held` are the `most` largest, all if there are no
    more; the first ones where they are equal. What is not a number is the largest of all."""
    chosen = held
    if count > most:
        # None is above 0, and numbers of one sign are ordered as their bits are.
        key = tl.abs(log_probs).to(tl.int32, bitcast=True)
        key = tl.where(log_probs != log_probs, 0, key + 1)
        key = tl.where(held, key, 0x7FFFFFFF)
        bound = 0
        for bit in tl.static_range(30, -1, -1):
            higher = bound | (1 << bit)
            bound = tl.where(tl.sum((key < higher).to(tl.int32), 0) < most, higher, bound)
        below = key < bound
        even = key == bound
        free = most - tl.sum(below.to(tl.int32), 0)
        chosen = below | (even & (tl.cumsum(even.to(tl.int32), 0) <= free))
    return chosen


@triton.jit
def grow(
    values,
    best,
    parent_log_probs,
    tokens,
    parents,
    depths,
    log_probs,
    attends,
    living,
    first,
    size,
    least,
    columns,
    total,
    width,
    CHILDREN: tl.constexpr,
    TOTAL: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A candidate for the next level, in its place there: behind all living ones if it is dead."""
    index = tl.program_id(0)
    number = tl.arange(0, TOTAL)
    inside = number < total
    nothing = float("-inf")
    _wait(EARLY)
    parent = tl.load(parent_log_probs + number // CHILDREN, mask=inside, other=nothing)
    log_prob = tl.load(values + number, mask=inside, other=0.0) + parent
    # What is not a number is not less. Of a dead parent nothing may have been computed.
    lives = inside & (parent != nothing) & (log_prob != nothing) & ~(log_prob < least)
    count = tl.sum(lives.to(tl.int32), 0)
    lives = _most_probable(log_prob, lives, width, count)
    count = tl.minimum(count, width)
    before = tl.sum((lives & (number < index)).to(tl.int32), 0)
    live = tl.sum((lives & (number == index)).to(tl.int32), 0) > 0
    own = tl.sum(tl.where(lives & (number == index), log_prob, 0.0), 0)
    place = tl.where(live, before, count + index - before)
    if index == 0:
        tl.store(living, count)
    if place < width:
        row = size + place
        ancestor = first + index // CHILDREN
        tl.store(log_probs + row, tl.where(live, own, nothing))
        tl.store(tokens + row, tl.load(best + index, mask=live, other=0))
        tl.store(parents + row, ancestor.to(tl.int64))
        tl.store(depths + row, tl.load(depths + ancestor) + 1)
        at = tl.arange(0, PADDED)
        shown = at < columns
        path = tl.load(attends + ancestor * columns + at, mask=shown, other=0)
        tl.store(attends + row * columns + at, tl.where(at == 1 + row, 1, path), mask=shown)


@triton.jit
def compact(
    tokens,
    parents,
    depths,
    log_probs,
    attends,
    kept_tokens,
    kept_parents,
    kept_depths,
    kept_log_probs,
    kept_attends,
    nodes,
    size,
    most,
    dead,
    columns,
    kept_columns,
    PADDED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """A row of a tree that holds the most probable living nodes of another; the rest is its row
    `dead`."""
    row = tl.program_id(0)
    index = tl.arange(0, PADDED)
    inside = index < size
    log_prob = tl.load(log_probs + index, mask=inside, other=float("-inf"))
    living = log_prob != float("-inf")
    count = tl.sum(living.to(tl.int32), 0)
    living = _most_probable(log_prob, living, most, count)
    count = tl.minimum(count, most)
    places = tl.cumsum(living.to(tl.int32), 0) - 1
    at = tl.arange(0, KEPT)
    tl.store(
        kept_attends + row * kept_columns + 1 + at,
        tl.zeros((KEPT,), tl.uint8),
        mask=at < kept_columns - 1,
    )
    if row < most:
        own = tl.sum(tl.where(living & (places == row), index, 0), 0)
        node = tl.where(row < count, own, dead)
        tl.store(nodes + row, node.to(tl.int64))
        tl.store(kept_tokens + row, tl.load(tokens + node))
        tl.store(kept_depths + row, tl.load(depths + node))
        tl.store(kept_log_probs + row, tl.load(log_probs + node))
        parent = tl.load(parents + node)
        place = tl.sum(tl.where(index == parent, places, 0), 0)
        tl.store(kept_parents + row, tl.maximum(place, 0).to(tl.int64))
        path = tl.load(attends + node * columns + 1 + index, mask=living, other=0)
        # What is stored next comes after the zeros.
        tl.debug_barrier()
        tl.store(kept_attends + row * kept_columns + 1 + places, path, mask=living)


@triton.jit
def any_nan(values, flag, count, PADDED: tl.constexpr):
    """Whether one of the values is not a number."""
    at = tl.arange(0, PADDED)
    found = tl.load(values + at, mask=at < count, other=0.0)
    tl.store(flag, tl.max((found != found).to(tl.int32), 0).to(tl.int64))


@triton.jit
def survey(log_probs, depths, flag, nodes, depth, size, PADDED: tl.constexpr):
    """Whether a tree holds what is not a number, its living nodes but the root, the deepest."""
    at = tl.arange(0, PADDED)
    inside = at < size
    found = tl.load(log_probs + at, mask=inside, other=float("-inf"))
    living = found != float("-inf")
    tl.store(flag, tl.max((found != found).to(tl.int32), 0).to(tl.int64))
    tl.store(nodes, tl.sum((living & (at > 0)).to(tl.int64), 0))
    tl.store(depth, tl.max(tl.load(depths + at, mask=living, other=0), 0))


@triton.jit
def walk(
    tokens,
    parents,
    attends,
    choices,
    path,
    chosen,
    count,
    rows,
    most,
    columns,
    PADDED: tl.constexpr,
):
    """From the root on, to the child that holds what was chosen after its parent."""
    index = tl.arange(0, PADDED)
    inside = (index > 0) & (index < rows)
    token = tl.load(tokens + index, mask=inside, other=0)
    parent = tl.load(parents + index, mask=inside, other=0)
    # A padding row is not even its own ancestor.
    inside = inside & (tl.load(attends + index * columns + 1 + index, mask=inside, other=0) != 0)
    choice = tl.load(choices)
    tl.store(path, tl.zeros((), tl.int64))
    tl.store(chosen, choice)
    node = 0
    length = 1
    for step in range(1, most):
        follows = inside & (parent == node) & (token == choice)
        found = tl.min(tl.where(follows, index, rows), 0)
        # Where the walk has ended, nobody has such a parent.
        node = tl.where(found < rows, found, -1)
        length += tl.where(found < rows, 1, 0)
        last = tl.minimum(found, rows - 1)
        choice = tl.load(choices + last)
        tl.store(path + step, last.to(tl.int64))
        tl.store(chosen + step, choice)
    tl.store(count, length.to(tl.int64))


@triton.jit
def commit(
    path,
    tokens,
    count,
    origins,
    history,
    position,
    noted_tokens,
    noted_count,
    sources,
    drafted,
    destinations,
    most,
    PADDED: tl.constexpr,
):
    """Where the entries of a path are and belong; its tokens join the history."""
    i = tl.arange(0, PADDED)
    inside = i < most
    root = tl.load(position)
    number = tl.load(count)
    node = tl.load(path + i, mask=inside, other=0)
    token = tl.load(tokens + i, mask=inside, other=0)
    tl.store(sources + i, node + root, mask=inside)
    tl.store(drafted + i, tl.load(origins + node, mask=inside, other=0) + root, mask=inside)
    tl.store(destinations + i, i + root, mask=inside)
    tl.store(history + root + 1 + i, token, mask=inside)
    tl.store(noted_tokens + i, token, mask=inside)
    tl.store(noted_count, number)
    # All threads have read it before it changes.
    tl.debug_barrier()
    tl.store(position, root + number)


@triton.jit
def move_slots(
    storage,
    sources,
    destinations,
    count,
    stride,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    COUNT: tl.constexpr,
):
    i = tl.arange(0, COUNT)
    d = tl.arange(0, PADDED)
    inside = (i < count)[:, None] & (d < SIZE)[None, :]
    own = storage + tl.program_id(0).to(tl.int64) * stride
    source = tl.load(sources + i, mask=i < count, other=0)
    destination = tl.load(destinations + i, mask=i < count, other=0)
    moved = tl.load(own + source[:, None] * SIZE + d[None, :], mask=inside)
    # All is read before anything is overwritten.
    tl.debug_barrier()
    tl.store(own + destination[:, None] * SIZE + d[None, :], moved, mask=inside)


@triton.jit
def best(
    logits,
    values,
    tokens,
    part_values,
    part_tokens,
    part_sums,
    finished,
    living,
    vocabulary,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    FINALISTS: tl.constexpr,
    LOG_PROBS: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The COUNT largest of a row in falling order, the smaller token first where they are equal."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    _wait(EARLY)
    if COUNTED:
        if row >= tl.load(living):
            return
    token = part * SIZE + tl.arange(0, SIZE)
    inside = token < vocabulary
    found = tl.load(logits + row * vocabulary + token, mask=inside, other=float("-inf"))
    found = found.to(tl.float32)
    broken = tl.max((found != found).to(tl.int32), 0)
    total = 0.0
    if LOG_PROBS:
        peak = tl.maximum(tl.max(found, 0), -1.0e30)
        total = tl.sum(tl.exp(found - peak), 0)
    total = tl.where(broken > 0, float("nan"), total)
    base = (row * parts + part) * COUNT
    left = inside
    for rank in tl.static_range(COUNT):
        value = tl.max(tl.where(left, found, float("-inf")), 0)
        best = tl.min(tl.where(left & (found == value), token, vocabulary), 0)
        tl.store(part_values + base + rank, value)
        tl.store(part_tokens + base + rank, best)
        left = left & (token != best)
    tl.store(part_sums + row * parts + part, total)
    # All threads have stored before one of them says so.
    tl.debug_barrier()
    if tl.atomic_add(finished + row, 1, sem="acq_rel") == parts - 1:
        p = tl.arange(0, PARTS)
        some = p < parts
        at = row * parts + p
        peaks = tl.load(
            part_values + at * COUNT, mask=some, other=float("-inf"), cache_modifier=".cg"
        )
        sums = tl.load(part_sums + at, mask=some, other=0.0, cache_modifier=".cg")
        highest = tl.maximum(tl.max(peaks, 0), -1.0e30)
        whole = tl.sum(sums * tl.exp(tl.maximum(peaks, -1.0e30) - highest), 0)
        spoilt = tl.sum((sums != sums).to(tl.int32), 0) > 0
        c = tl.arange(0, FINALISTS)
        held = c < parts * COUNT
        at = row * parts * COUNT + c
        finals = tl.load(part_values + at, mask=held, other=float("-inf"), cache_modifier=".cg")
        named = tl.load(part_tokens + at, mask=held, other=vocabulary, cache_modifier=".cg")
        # A part with fewer tokens than are wanted has named none.
        held = held & (named < vocabulary)
        for rank in tl.static_range(COUNT):
            value = tl.max(tl.where(held, finals, float("-inf")), 0)
            best = tl.min(tl.where(held & (finals == value), named, vocabulary), 0)
            held = held & (named != best)
            if LOG_PROBS:
                value = value - highest - tl.log(whole)
            value = tl.where(spoilt, float("nan"), value)
            tl.store(values + row * COUNT + rank, value)
            tl.store(tokens + row * COUNT + rank, tl.minimum(best, vocabulary - 1).to(tl.int64))
        tl.store(finished + row, 0)
