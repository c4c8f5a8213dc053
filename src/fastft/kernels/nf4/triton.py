"""NF4 dequantisation in one Triton kernel: the nested absmax is computed inside, every byte is touched once."""

import triton
import triton.language as tl


@triton.jit
def nf4_level(index):
    """Return the NF4 level of each 4-bit `index` by a tree of selects; the constants are those of `ref.LEVELS`."""
    low = tl.where(
        (index & 4) == 0,
        tl.where(
            (index & 2) == 0,
            tl.where((index & 1) == 0, -1.0, -0.6961928009986877),
            tl.where((index & 1) == 0, -0.5250730514526367, -0.39491748809814453),
        ),
        tl.where(
            (index & 2) == 0,
            tl.where((index & 1) == 0, -0.28444138169288635, -0.18477343022823334),
            tl.where((index & 1) == 0, -0.09105003625154495, 0.0),
        ),
    )
    high = tl.where(
        (index & 4) == 0,
        tl.where(
            (index & 2) == 0,
            tl.where((index & 1) == 0, 0.07958029955625534, 0.16093020141124725),
            tl.where((index & 1) == 0, 0.24611230194568634, 0.33791524171829224),
        ),
        tl.where(
            (index & 2) == 0,
            tl.where((index & 1) == 0, 0.44070982933044434, 0.5626170039176941),
            tl.where((index & 1) == 0, 0.7229568362236023, 1.0),
        ),
    )
    return tl.where(index < 8, low, high)


@triton.jit
def nf4_dequantize_kernel(
    packed,
    absmax,
    code2,
    absmax2,
    offset,
    out,
    numel,
    NESTED: tl.constexpr,
    PER_WORD: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Dequantise `BLOCKS` blocks of 64 weights a program.

    packed: [ceil(numel / PER_WORD)] words, int32 (8 weights) or uint8 (2 weights); a word of 8 becomes one 16-byte
    store in 16 bits. absmax: one a block, fp32, or with NESTED uint8 into code2 [256] fp32, times absmax2 (one fp32
    per 256 blocks), plus offset. BLOCKS divides 256, so a program needs one absmax2. EVEN: numel is a multiple of
    64 * BLOCKS and no mask is needed. GATHER: look levels up in a table in shared memory rather than by selects,
    which are bound by arithmetic.
    """
    WORDS: tl.constexpr = BLOCKS * 64 // PER_WORD
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    b_block = tl.arange(0, BLOCKS)
    block_mask = first * 64 + b_block * 64 < numel
    if NESTED:
        b_code = tl.load(absmax + first + b_block, mask=block_mask, other=0).to(tl.int32)
        b_scale = tl.load(code2 + b_code) * tl.load(absmax2 + first // 256) + tl.load(offset)
    else:
        b_scale = tl.load(absmax + first + b_block, mask=block_mask, other=0.0)

    b_word = tl.arange(0, WORDS)
    word_start = first * (64 // PER_WORD)
    if EVEN:
        b_data = tl.load(packed + word_start + b_word, eviction_policy="evict_first")
    else:
        b_data = tl.load(packed + word_start + b_word, mask=first * 64 + b_word * PER_WORD < numel, other=0)
    b_shift = (tl.arange(0, PER_WORD) ^ 1) * 4  # little-endian bytes, high nibble first
    b_index = (b_data.to(tl.int32)[:, None] >> b_shift[None, :]) & 15
    if GATHER:
        b_value = tl.gather(nf4_level(tl.arange(0, 16)), tl.reshape(b_index, (BLOCKS * 64,)), 0)
    else:
        b_value = nf4_level(b_index)
    b_out = (tl.reshape(b_value, (BLOCKS, 64)) * b_scale[:, None]).to(out.dtype.element_ty)
    b_local = b_block[:, None] * 64 + tl.arange(0, 64)[None, :]
    if EVEN:
        tl.store(out + first * 64 + b_local, b_out)
    else:
        tl.store(out + first * 64 + b_local, b_out, mask=first * 64 + b_local < numel)
