"""Which step shapes have CUDA graphs: buckets of decode steps and of mixed steps, and those prepared at load."""

from llmrs.backends.torch.attn_metadata import MAX_KV_SPLITS, SHORT_MAX_KV_SPLITS, StepShape, kv_splits

DECODE_BATCH_SIZES = (1, 2, 4, *range(8, 257, 8), *range(288, 513, 32))
TOKEN_BUCKETS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192)
SEQ_BUCKETS = (4, 16, 64, 128, 256, 512)
COVER_DECODE, COVER_TOKENS = (1, 4, 16, 64, 128, 256, 512), (128, 256, 512, 1024, 2048)  # captured at load
KERNEL_TOKENS = (64, 128, 256, 384, 512, 768, 1024)  # mixed steps with different kernels or launch configs
KERNEL_SEQ_TOKENS = (256, 1024)  # tokens of mixed steps that are tried with every number of sequences


def bucket(exact: StepShape, block_m_tokens: int, ctas: float) -> StepShape | None:
    """The padded shape in which a step runs; None: it is larger than any. `block_m_tokens`: tokens of a prefill tile;
    `ctas`: of decode attention per KV head that fill the GPU."""
    if exact.is_decode_only:
        n = _next(DECODE_BATCH_SIZES, exact.num_tokens)
        return StepShape(n, n, n, 0, exact.num_kv_splits) if n else None
    tokens, seqs = _next(TOKEN_BUCKETS, exact.num_tokens), _next(SEQ_BUCKETS, exact.num_seqs)
    if not tokens or not seqs:
        return None
    return _mixed(tokens, seqs, seqs if exact.num_decode_tiles else 0, block_m_tokens, ctas)


def _next(sizes: tuple[int, ...], n: int) -> int | None:
    return next((size for size in sizes if size >= n), None)


def _up_to(sizes: tuple[int, ...], n: int) -> int:
    """The size that holds n, else the largest."""
    return _next(sizes, n) or sizes[-1]


def decode_shapes(max_num_seqs: int, ctas: float) -> list[StepShape]:
    """Decode steps of sequences of equal context, long or short; the largest first."""
    largest = _up_to(DECODE_BATCH_SIZES, max_num_seqs)
    even = [(n, kv_splits(n, ctas)) for n in reversed(DECODE_BATCH_SIZES) if n <= largest]
    return [
        StepShape(n, n, n, 0, splits) for n, most in even for splits in sorted({most, min(most, SHORT_MAX_KV_SPLITS)})
    ]


def covering_shapes(max_num_seqs: int, max_num_tokens: int, block_m_tokens: int, ctas: float) -> list[StepShape]:
    """A few shapes that hold nearly every step up to these sizes; the largest first."""
    decode = {*(n for n in COVER_DECODE if n <= max_num_seqs), _up_to(DECODE_BATCH_SIZES, max_num_seqs)}
    seqs = _up_to(SEQ_BUCKETS, max_num_seqs)
    mixed = [_mixed(t, min(t, seqs), min(t, seqs), block_m_tokens, ctas) for t in COVER_TOKENS if t <= max_num_tokens]
    return [*reversed(mixed), *(StepShape(n, n, n, 0, kv_splits(n, ctas)) for n in sorted(decode, reverse=True))]


def kernel_shapes(max_num_seqs: int, max_num_tokens: int, block_m_tokens: int, ctas: float) -> list[StepShape]:
    """Shapes whose steps launch every variant of every kernel that steps up to these sizes launch."""
    one = [StepShape(1, 1, 1, 0, 1 << n) for n in range(MAX_KV_SPLITS.bit_length())]
    seqs = [n for n in SEQ_BUCKETS if n <= _up_to(SEQ_BUCKETS, max_num_seqs)]
    sizes = [(t, n) for t in KERNEL_TOKENS for n in (seqs if t in KERNEL_SEQ_TOKENS else seqs[:1]) if n <= t]
    sizes = [(t, n) for t, n in sizes if t <= max_num_tokens]
    long = [(t, seqs[0]) for t in TOKEN_BUCKETS if t <= max_num_tokens][-1:]
    mixed = (_mixed(t, n, decodes, block_m_tokens, ctas) for t, n in (*sizes, *long) for decodes in (0, n))
    return [*one, *decode_shapes(max_num_seqs, ctas), *mixed]


def _mixed(tokens: int, seqs: int, decodes: int, block_m_tokens: int, ctas: float) -> StepShape:
    tiles = tokens // block_m_tokens + seqs  # each sequence's last tile may be partly filled
    return StepShape(tokens, seqs, decodes, tiles, kv_splits(decodes, ctas))
