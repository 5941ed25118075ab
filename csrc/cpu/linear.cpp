// Packed linears on the CPU.
//   fp32, bf16: 16 outputs are one vector; each input is broadcast and multiplied into it. A chain of 256 inputs is summed
//               on its own and then added to the total, which keeps the rounding error of long rows small.
//   int8, int4: x is rounded to 8 bits in blocks of 32 inputs; a block's products are summed exactly in integers, then
//               scaled: y += (Σ q_w q_x) · s_x · s_w. Unsigned by signed byte products want unsigned weights: int4 is
//               stored with an offset of 8, int8 gets one of 128 where VNNI is used; offset · Σ q_x is taken off at once.
#include "linear.h"

#include <memory>
#include <vector>

#include "team.h"
#include "vector_math.h"

namespace mgk {
namespace MGK_ISA {

namespace {

#if defined(MGK_LEVEL_AVX512)
constexpr int kFloatTiles = 2, kFloatRows = 8, kIntRows = 8;  // what the registers hold
#elif defined(MGK_LEVEL_AVX2)
constexpr int kFloatTiles = 1, kFloatRows = 4, kIntRows = 4;
#else
constexpr int kFloatTiles = 1, kFloatRows = 2, kIntRows = 2;
#endif
constexpr int kItemTiles = 2;
constexpr int kChain = 256;
constexpr int64_t kInt4Ahead = 3072;  // bytes

void finish(const LinearOutput& out, int64_t row, int64_t column, const F16& sum) {
    F16 y = sum;
    if (out.bias) y = y + load(out.bias + column);
    if (out.gelu) y = gelu(y);
    if (out.residual) y = load(out.residual + row * out.residual_stride + column) + y;
    store(out.y + row * out.y_stride + column, y);
}

// ---- fp32 and bf16 weights

template <int rows, int tiles>
void fp32_block(const float* w, int64_t tile_stride, int k, const float* x, int64_t stride, F16 (&total)[rows][tiles]) {
    for (int m = 0; m < rows; ++m)
        for (int t = 0; t < tiles; ++t) total[m][t] = zero();
    for (int start = 0; start < k; start += kChain) {
        F16 sum[rows][tiles];
        for (int m = 0; m < rows; ++m)
            for (int t = 0; t < tiles; ++t) sum[m][t] = zero();
        const int end = start + kChain < k ? start + kChain : k;
        for (int i = start; i < end; ++i) {
            F16 weight[tiles];
            for (int t = 0; t < tiles; ++t) weight[t] = load(w + t * tile_stride + int64_t(i) * kTile);
            for (int m = 0; m < rows; ++m) {
                const F16 input = set1(x[m * stride + i]);
                for (int t = 0; t < tiles; ++t) sum[m][t] = fma(weight[t], input, sum[m][t]);
            }
        }
        for (int m = 0; m < rows; ++m)
            for (int t = 0; t < tiles; ++t) total[m][t] = total[m][t] + sum[m][t];
    }
}

template <int rows, int tiles>
void bf16_block(const uint16_t* w, int64_t tile_stride, int k, const float* x, int64_t stride, F16 (&total)[rows][tiles]) {
    const I16 high = int_set1(int32_t(0xffff0000u));
    for (int m = 0; m < rows; ++m)
        for (int t = 0; t < tiles; ++t) total[m][t] = zero();
    for (int start = 0; start < k; start += kChain) {
        F16 sum[rows][tiles];
        for (int m = 0; m < rows; ++m)
            for (int t = 0; t < tiles; ++t) sum[m][t] = zero();
        const int end = start + kChain < k ? start + kChain : k;
        for (int i = start; i < end; i += 2) {
            F16 even[tiles], odd[tiles];
            for (int t = 0; t < tiles; ++t) {
                const I16 pair = int_load(w + t * tile_stride + int64_t(i) * kTile);
                even[t] = as_float(shift_left<16>(pair));
                odd[t] = as_float(pair & high);
            }
            for (int m = 0; m < rows; ++m) {
                const F16 first = set1(x[m * stride + i]), second = set1(x[m * stride + i + 1]);
                for (int t = 0; t < tiles; ++t) {
                    sum[m][t] = fma(even[t], first, sum[m][t]);
                    sum[m][t] = fma(odd[t], second, sum[m][t]);
                }
            }
        }
        for (int m = 0; m < rows; ++m)
            for (int t = 0; t < tiles; ++t) total[m][t] = total[m][t] + sum[m][t];
    }
}

template <int rows, int tiles>
void float_rows(const PackedMatrix& w, const LinearInput& in, const LinearOutput& out, int64_t row, int64_t tile) {
    const int64_t tile_size = int64_t(w.k) * kTile;
    const float* x = in.x + row * in.stride;
    F16 total[rows][tiles];
    if (w.kind == WeightKind::fp32)
        fp32_block<rows, tiles>(reinterpret_cast<const float*>(w.codes) + tile * tile_size, tile_size, w.k, x, in.stride, total);
    else
        bf16_block<rows, tiles>(reinterpret_cast<const uint16_t*>(w.codes) + tile * tile_size, tile_size, w.k, x, in.stride,
                                total);
    for (int m = 0; m < rows; ++m)
        for (int t = 0; t < tiles; ++t) finish(out, row + m, (tile + t) * kTile, total[m][t]);
}

template <int tiles>
void float_item(const PackedMatrix& w, const LinearInput& in, const LinearOutput& out, int64_t rows, int64_t tile) {
    int64_t row = 0;
    for (; row + kFloatRows <= rows; row += kFloatRows) float_rows<kFloatRows, tiles>(w, in, out, row, tile);
    if constexpr (kFloatRows > 4)
        for (; row + 4 <= rows; row += 4) float_rows<4, tiles>(w, in, out, row, tile);
    if constexpr (kFloatRows > 2)
        for (; row + 2 <= rows; row += 2) float_rows<2, tiles>(w, in, out, row, tile);
    for (; row < rows; ++row) float_rows<1, tiles>(w, in, out, row, tile);
}

// ---- int8 and int4 weights: the integer sum of one block of 32 inputs, for 16 outputs and `rows` rows of x; `quad` codes lie
// between four inputs of a group of rows and the next four

constexpr int kInt4OffsetBits = 3;

// −offset · Σ q_x, where the sum of a block begins.
template <int offset_bits> MGK_INLINE I16 offset_sum(int32_t negative_sum) {
    return offset_bits ? shift_left<offset_bits>(int_set1(negative_sum)) : int_zero();
}

#if defined(MGK_LEVEL_AVX512)

constexpr int kInt8OffsetBits = 7;

MGK_INLINE __m512i four_inputs(const int8_t* x) {
    int32_t bytes;
    std::memcpy(&bytes, x, 4);
    return _mm512_set1_epi32(bytes);
}

template <int rows>
MGK_INLINE void int8_dot(const uint8_t* w, const int8_t* x, int64_t quad, const int32_t* x_sums, I16 (&sum)[rows]) {
    for (int m = 0; m < rows; ++m) sum[m] = offset_sum<kInt8OffsetBits>(x_sums[m]);
    const __m512i flip = _mm512_set1_epi8(char(0x80));
    for (int q = 0; q < 8; ++q) {
        const __m512i weight = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * q), flip);
        for (int m = 0; m < rows; ++m)
            sum[m].part[0] = _mm512_dpbusd_epi32(sum[m].part[0], weight, four_inputs(x + q * quad + 4 * m));
    }
}

template <int rows>
MGK_INLINE void int4_dot(const uint8_t* w, const int8_t* x, int64_t quad, const int32_t* x_sums, I16 (&sum)[rows]) {
    for (int m = 0; m < rows; ++m) sum[m] = offset_sum<kInt4OffsetBits>(x_sums[m]);
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int q = 0; q < 4; ++q) {
        const __m512i bytes = _mm512_loadu_si512(w + 64 * q);
        const __m512i low = _mm512_and_si512(bytes, nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
        for (int m = 0; m < rows; ++m) {
            sum[m].part[0] = _mm512_dpbusd_epi32(sum[m].part[0], low, four_inputs(x + q * quad + 4 * m));
            sum[m].part[0] = _mm512_dpbusd_epi32(sum[m].part[0], high, four_inputs(x + (4 + q) * quad + 4 * m));
        }
    }
}

#elif defined(MGK_LEVEL_AVX2)

constexpr int kInt8OffsetBits = 0;

MGK_INLINE __m256i four_inputs(const int8_t* x) {
    int32_t bytes;
    std::memcpy(&bytes, x, 4);
    return _mm256_set1_epi32(bytes);
}

MGK_INLINE __m256i load_half(const uint8_t* w, int half) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * half));
}

// The sum as it is written: the compiler would turn a block's sums into trees, whose leaves do not fit the registers.
MGK_INLINE __m256i in_order(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
}

// |w| by x·sign(w): both within ±127, so a pair of products stays below 2^15.
template <int rows>
MGK_INLINE void int8_dot(const uint8_t* w, const int8_t* x, int64_t quad, const int32_t*, I16 (&sum)[rows]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int m = 0; m < rows; ++m) sum[m] = int_zero();
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
        const __m256i weight[2] = {load_half(w + 64 * q, 0), load_half(w + 64 * q, 1)};
        const __m256i size[2] = {_mm256_abs_epi8(weight[0]), _mm256_abs_epi8(weight[1])};
        for (int m = 0; m < rows; ++m) {
            const __m256i input = four_inputs(x + q * quad + 4 * m);
            for (int half = 0; half < 2; ++half) {
                const __m256i pairs = _mm256_maddubs_epi16(size[half], _mm256_sign_epi8(input, weight[half]));
                sum[m].part[half] = in_order(_mm256_add_epi32(sum[m].part[half], _mm256_madd_epi16(pairs, ones)));
            }
        }
    }
}

// Eight pair products of at most 15·127·2 fit 16 bits (30480), so one widening a block is enough.
template <int rows>
MGK_INLINE void int4_dot(const uint8_t* w, const int8_t* x, int64_t quad, const int32_t* x_sums, I16 (&sum)[rows]) {
    const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15);
    __m256i pairs[rows][2];
    for (int m = 0; m < rows; ++m) pairs[m][0] = pairs[m][1] = _mm256_setzero_si256();
    const auto add = [&](__m256i first, __m256i second, const int8_t* inputs) {
        for (int m = 0; m < rows; ++m) {
            const __m256i input = four_inputs(inputs + 4 * m);
            pairs[m][0] = in_order(_mm256_add_epi16(pairs[m][0], _mm256_maddubs_epi16(first, input)));
            pairs[m][1] = in_order(_mm256_add_epi16(pairs[m][1], _mm256_maddubs_epi16(second, input)));
        }
    };
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
        const __m256i first = load_half(w + 64 * q, 0), second = load_half(w + 64 * q, 1);
        add(_mm256_and_si256(first, nibble), _mm256_and_si256(second, nibble), x + q * quad);
        add(_mm256_and_si256(_mm256_srli_epi16(first, 4), nibble), _mm256_and_si256(_mm256_srli_epi16(second, 4), nibble),
            x + (4 + q) * quad);
    }
    for (int m = 0; m < rows; ++m) {
        sum[m] = offset_sum<kInt4OffsetBits>(x_sums[m]);
        for (int half = 0; half < 2; ++half)
            sum[m].part[half] = _mm256_add_epi32(sum[m].part[half], _mm256_madd_epi16(pairs[m][half], ones));
    }
}

#else

constexpr int kInt8OffsetBits = 0;

MGK_INLINE __m128i four_inputs(const int16_t* x) {  // x0 x1 x2 x3 twice
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
    return _mm_unpacklo_epi64(low, low);
}

// Per output two partial sums lie side by side; they are added at the end of the block.
MGK_INLINE __m128i join_pairs(__m128i rows01, __m128i rows23) {
    const __m128 a = _mm_castsi128_ps(rows01), b = _mm_castsi128_ps(rows23);
    return _mm_add_epi32(_mm_castps_si128(_mm_shuffle_ps(a, b, 0x88)), _mm_castps_si128(_mm_shuffle_ps(a, b, 0xdd)));
}

template <int rows>
MGK_INLINE void int8_dot(const uint8_t* w, const int16_t* x, int64_t quad, const int32_t* x_sums, I16 (&sum)[rows]) {
    for (int m = 0; m < rows; ++m) sum[m] = offset_sum<kInt8OffsetBits>(x_sums[m]);
    for (int part = 0; part < 4; ++part) {
        __m128i low[rows], high[rows];
        for (int m = 0; m < rows; ++m) low[m] = high[m] = _mm_setzero_si128();
        for (int q = 0; q < 8; ++q) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 64 * q + 16 * part));
            const __m128i rows01 = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
            const __m128i rows23 = _mm_srai_epi16(_mm_unpackhi_epi8(bytes, bytes), 8);
            for (int m = 0; m < rows; ++m) {
                const __m128i input = four_inputs(x + q * quad + 4 * m);
                low[m] = _mm_add_epi32(low[m], _mm_madd_epi16(rows01, input));
                high[m] = _mm_add_epi32(high[m], _mm_madd_epi16(rows23, input));
            }
        }
        for (int m = 0; m < rows; ++m) sum[m].part[part] = _mm_add_epi32(sum[m].part[part], join_pairs(low[m], high[m]));
    }
}

template <int rows>
MGK_INLINE void int4_dot(const uint8_t* w, const int16_t* x, int64_t quad, const int32_t* x_sums, I16 (&sum)[rows]) {
    for (int m = 0; m < rows; ++m) sum[m] = offset_sum<kInt4OffsetBits>(x_sums[m]);
    const __m128i nibble = _mm_set1_epi8(15), none = _mm_setzero_si128();
    for (int part = 0; part < 4; ++part) {
        __m128i low[rows], high[rows];
        for (int m = 0; m < rows; ++m) low[m] = high[m] = none;
        for (int q = 0; q < 4; ++q) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 64 * q + 16 * part));
            const __m128i codes[2] = {_mm_and_si128(bytes, nibble), _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble)};
            for (int half = 0; half < 2; ++half)
                for (int m = 0; m < rows; ++m) {
                    const __m128i input = four_inputs(x + (4 * half + q) * quad + 4 * m);
                    low[m] = _mm_add_epi32(low[m], _mm_madd_epi16(_mm_unpacklo_epi8(codes[half], none), input));
                    high[m] = _mm_add_epi32(high[m], _mm_madd_epi16(_mm_unpackhi_epi8(codes[half], none), input));
                }
        }
        for (int m = 0; m < rows; ++m) sum[m].part[part] = _mm_add_epi32(sum[m].part[part], join_pairs(low[m], high[m]));
    }
}

#endif

// `rows` rows from `row` on, all within one group. `fetch`: these weights lie in a cache and are used for the last time, so
// the next tile is fetched: the memory would rest otherwise (measured at 16 rows: 71 instead of 58 % of the arithmetic
// peak). At the first use the hardware fetches ahead into the second level; int4 has so much arithmetic a byte that it has
// to be in the first (int8 gained nothing from it).
template <int rows, bool int4, bool one_block>
void int_rows(const PackedMatrix& w, const QuantisedRows& x, const LinearOutput& out, int64_t row, int64_t tile, bool fetch) {
    constexpr int block_bytes = int4 ? kTile * kQuantBlock / 2 : kTile * kQuantBlock;
    const int64_t num_blocks = w.k / kQuantBlock, num_groups = w.k / w.group;
    const int64_t blocks_per_group = one_block ? 1 : w.group / kQuantBlock;
    const int64_t tile_bytes = num_blocks * block_bytes;
    const uint8_t* codes = w.codes + tile * tile_bytes;
    const uint16_t* scales = w.scales + tile * num_groups * kTile;
    const QuantCode* inputs = x.codes + x.code_at(row, 0);
    const float* x_scales = x.scales + x.block_at(row, 0);
    const int32_t* x_sums = x.negative_sums + x.block_at(row, 0);
    F16 total[rows];
    for (int m = 0; m < rows; ++m) total[m] = zero();
    for (int64_t group = 0; group < num_groups; ++group) {
        F16 part[rows];
        for (int m = 0; m < rows; ++m) part[m] = zero();
        for (int64_t block = 0; block < blocks_per_group; ++block) {
            for (int line = 0; line < block_bytes; line += 64) {
                if (fetch) _mm_prefetch(reinterpret_cast<const char*>(codes + tile_bytes + line), _MM_HINT_T1);
                else if (int4) _mm_prefetch(reinterpret_cast<const char*>(codes + kInt4Ahead + line), _MM_HINT_T0);
            }
            I16 sum[rows];
            if constexpr (int4)
                int4_dot<rows>(codes, inputs, 4 * x.group, x_sums, sum);
            else
                int8_dot<rows>(codes, inputs, 4 * x.group, x_sums, sum);
            for (int m = 0; m < rows; ++m) {
                const F16 scale = set1(x_scales[m]);
                part[m] = one_block ? to_float(sum[m]) * scale : fma(to_float(sum[m]), scale, part[m]);
            }
            codes += block_bytes;
            inputs += kQuantBlock * x.group;
            x_scales += x.group;
            x_sums += x.group;
        }
        const F16 scale = load_bf16(scales + group * kTile);
        for (int m = 0; m < rows; ++m) total[m] = fma(part[m], scale, total[m]);
    }
    for (int m = 0; m < rows; ++m) finish(out, row + m, tile * kTile, total[m]);
}

template <bool int4, bool one_block>
void int_item(const PackedMatrix& w, const QuantisedRows& x, const LinearOutput& out, int64_t rows, int64_t tile) {
    const auto last = [&](int64_t row, int count) { return row > 0 && row + count == rows; };  // of several uses
    int64_t row = 0;
    for (; row + kIntRows <= rows; row += kIntRows)
        int_rows<kIntRows, int4, one_block>(w, x, out, row, tile, last(row, kIntRows));
    if constexpr (kIntRows > 4)
        for (; row + 4 <= rows; row += 4) int_rows<4, int4, one_block>(w, x, out, row, tile, last(row, 4));
    if constexpr (kIntRows > 2)
        for (; row + 2 <= rows; row += 2) int_rows<2, int4, one_block>(w, x, out, row, tile, last(row, 2));
    for (; row < rows; ++row) int_rows<1, int4, one_block>(w, x, out, row, tile, last(row, 1));
}

}  // namespace

int64_t linear_items(const PackedMatrix& w) { return (w.n / kTile + kItemTiles - 1) / kItemTiles; }

void quantise_block(const float* x, const QuantisedRows& out, int64_t row, int64_t block) {
    const F16 a = load(x), b = load(x + kLanes);
    const float largest = max_lanes(max(abs(a), abs(b)));
    const F16 inverse = set1(largest > 0.0f ? 127.0f / largest : 0.0f);
    alignas(64) int32_t rounded[kQuantBlock];
    int_store(rounded, round_to_int(a * inverse));
    int_store(rounded + kLanes, round_to_int(b * inverse));
    int32_t sum = 0;
    QuantCode codes[kQuantBlock];
    for (int i = 0; i < kQuantBlock; ++i) {
        codes[i] = QuantCode(rounded[i]);
        sum += rounded[i];
    }
    QuantCode* to = out.codes + out.code_at(row, block * kQuantBlock);
    for (int i = 0; i < kQuantBlock; i += 4) std::memcpy(to + i * out.group, codes + i, 4 * sizeof(QuantCode));
    out.scales[out.block_at(row, block)] = largest / 127.0f;
    out.negative_sums[out.block_at(row, block)] = -sum;
}

void quantise_row(const float* x, const QuantisedRows& out, int64_t row) {
    for (int64_t block = 0; block < out.k / kQuantBlock; ++block) quantise_block(x + block * kQuantBlock, out, row, block);
}

void linear_item(const PackedMatrix& w, const LinearInput& in, const LinearOutput& out, int64_t rows, int64_t item) {
    const int64_t begin = item * kItemTiles, num_tiles = w.n / kTile;
    const int64_t end = begin + kItemTiles < num_tiles ? begin + kItemTiles : num_tiles;
    if (!w.quantised() && kFloatTiles == kItemTiles && end - begin == kItemTiles) {
        float_item<kFloatTiles>(w, in, out, rows, begin);
    } else {
        for (int64_t tile = begin; tile < end; ++tile) {
            if (w.kind == WeightKind::int8) int_item<false, false>(w, in.quantised, out, rows, tile);
            else if (w.kind == WeightKind::int4 && w.group == kQuantBlock) int_item<true, true>(w, in.quantised, out, rows, tile);
            else if (w.kind == WeightKind::int4) int_item<true, false>(w, in.quantised, out, rows, tile);
            else float_item<1>(w, in, out, rows, tile);
        }
    }
    if (out.quantised == nullptr) return;
    for (int64_t row = 0; row < rows; ++row)
        quantise_block(out.y + row * out.y_stride + begin * kTile, *out.quantised, row, item);
}

void linear(const PackedMatrix& w, const float* x, const LinearOutput& out, int64_t rows, int num_threads) {
    const size_t blocks = w.quantised() ? size_t(QuantisedRows::padded(rows)) * (w.k / kQuantBlock) : 0;
    std::unique_ptr<QuantCode[]> codes(new QuantCode[blocks * kQuantBlock]);
    std::unique_ptr<float[]> scales(new float[blocks]);
    std::unique_ptr<int32_t[]> sums(new int32_t[blocks]);
    const LinearInput in{x, w.k, {codes.get(), scales.get(), sums.get(), w.k, QuantisedRows::group_of(rows)}};
    const bool small = int64_t(w.n) * w.k * rows < 65536;
    parallel(small ? 1 : num_threads, [&](Team& team, int member) {
        if (w.quantised()) team.for_each(member, rows, [&](int64_t row) { quantise_row(x + row * w.k, in.quantised, row); });
        team.for_each(member, linear_items(w), [&](int64_t item) { linear_item(w, in, out, rows, item); });
    });
}

}  // namespace MGK_ISA
}  // namespace mgk
