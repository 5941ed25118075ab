// Sixteen lanes on any machine: one 512-bit, two 256-bit or four 128-bit registers.
//
// Every kernel is written once against these types and compiled once per ISA level, each into its own namespace
// (MGK_ISA), so that the linker cannot mix code of different levels. The compiler must not contract
// (-ffp-contract=off): `fma` rounds once where the level has it and twice on the baseline, consistently within a level.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(MGK_LEVEL_AVX512)
#define MGK_ISA avx512
#elif defined(MGK_LEVEL_AVX2)
#define MGK_ISA avx2
#else
#define MGK_LEVEL_BASELINE 1
#define MGK_ISA baseline
#endif

#define MGK_INLINE inline __attribute__((always_inline))

namespace mgk {
namespace MGK_ISA {

constexpr int kLanes = 16;

#if defined(MGK_LEVEL_AVX512)
constexpr int kParts = 1;
using FloatPart = __m512;
using IntPart = __m512i;
#elif defined(MGK_LEVEL_AVX2)
constexpr int kParts = 2;
using FloatPart = __m256;
using IntPart = __m256i;
#else
constexpr int kParts = 4;
using FloatPart = __m128;
using IntPart = __m128i;
#endif
constexpr int kPartLanes = kLanes / kParts;

struct F16 {  // sixteen fp32
    FloatPart part[kParts];
};
struct I16 {  // sixteen int32, or 64 bytes
    IntPart part[kParts];
};

#define MGK_EACH for (int i = 0; i < kParts; ++i)

#if defined(MGK_LEVEL_AVX512)
#define MGK_OP(name) _mm512_##name
#define MGK_CAST_IF(x) _mm512_castsi512_ps(x)
#define MGK_CAST_FI(x) _mm512_castps_si512(x)
#define MGK_INT_LOAD(p) _mm512_loadu_si512(p)
#define MGK_INT_STORE(p, x) _mm512_storeu_si512(p, x)
#elif defined(MGK_LEVEL_AVX2)
#define MGK_OP(name) _mm256_##name
#define MGK_CAST_IF(x) _mm256_castsi256_ps(x)
#define MGK_CAST_FI(x) _mm256_castps_si256(x)
#define MGK_INT_LOAD(p) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
#define MGK_INT_STORE(p, x) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x)
#else
#define MGK_OP(name) _mm_##name
#define MGK_CAST_IF(x) _mm_castsi128_ps(x)
#define MGK_CAST_FI(x) _mm_castps_si128(x)
#define MGK_INT_LOAD(p) _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
#define MGK_INT_STORE(p, x) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x)
#endif

// ---- fp32 lanes
MGK_INLINE F16 zero() { F16 r; MGK_EACH r.part[i] = MGK_OP(setzero_ps)(); return r; }
MGK_INLINE F16 set1(float x) { F16 r; MGK_EACH r.part[i] = MGK_OP(set1_ps)(x); return r; }
MGK_INLINE F16 load(const float* p) { F16 r; MGK_EACH r.part[i] = MGK_OP(loadu_ps)(p + i * kPartLanes); return r; }
MGK_INLINE void store(float* p, F16 a) { MGK_EACH MGK_OP(storeu_ps)(p + i * kPartLanes, a.part[i]); }
MGK_INLINE F16 operator+(F16 a, F16 b) { MGK_EACH a.part[i] = MGK_OP(add_ps)(a.part[i], b.part[i]); return a; }
MGK_INLINE F16 operator-(F16 a, F16 b) { MGK_EACH a.part[i] = MGK_OP(sub_ps)(a.part[i], b.part[i]); return a; }
MGK_INLINE F16 operator*(F16 a, F16 b) { MGK_EACH a.part[i] = MGK_OP(mul_ps)(a.part[i], b.part[i]); return a; }
MGK_INLINE F16 operator/(F16 a, F16 b) { MGK_EACH a.part[i] = MGK_OP(div_ps)(a.part[i], b.part[i]); return a; }
MGK_INLINE F16 max(F16 a, F16 b) { MGK_EACH a.part[i] = MGK_OP(max_ps)(a.part[i], b.part[i]); return a; }
MGK_INLINE F16 min(F16 a, F16 b) { MGK_EACH a.part[i] = MGK_OP(min_ps)(a.part[i], b.part[i]); return a; }
MGK_INLINE F16 fma(F16 a, F16 b, F16 c) {  // a·b + c
#if defined(MGK_LEVEL_BASELINE)
    return a * b + c;
#else
    MGK_EACH c.part[i] = MGK_OP(fmadd_ps)(a.part[i], b.part[i], c.part[i]);
    return c;
#endif
}

// ---- int32 lanes
MGK_INLINE I16 int_zero() { I16 r; MGK_EACH r.part[i] = MGK_CAST_FI(MGK_OP(setzero_ps)()); return r; }
MGK_INLINE I16 int_set1(int32_t x) { I16 r; MGK_EACH r.part[i] = MGK_OP(set1_epi32)(x); return r; }
MGK_INLINE I16 int_load(const void* p) {
    I16 r;
    MGK_EACH r.part[i] = MGK_INT_LOAD(static_cast<const char*>(p) + i * (64 / kParts));
    return r;
}
MGK_INLINE void int_store(void* p, I16 a) { MGK_EACH MGK_INT_STORE(static_cast<char*>(p) + i * (64 / kParts), a.part[i]); }
MGK_INLINE I16 operator+(I16 a, I16 b) { MGK_EACH a.part[i] = MGK_OP(add_epi32)(a.part[i], b.part[i]); return a; }
MGK_INLINE I16 operator-(I16 a, I16 b) { MGK_EACH a.part[i] = MGK_OP(sub_epi32)(a.part[i], b.part[i]); return a; }
#if defined(MGK_LEVEL_AVX512)
MGK_INLINE I16 operator&(I16 a, I16 b) { a.part[0] = _mm512_and_si512(a.part[0], b.part[0]); return a; }
MGK_INLINE I16 operator|(I16 a, I16 b) { a.part[0] = _mm512_or_si512(a.part[0], b.part[0]); return a; }
#elif defined(MGK_LEVEL_AVX2)
MGK_INLINE I16 operator&(I16 a, I16 b) { MGK_EACH a.part[i] = _mm256_and_si256(a.part[i], b.part[i]); return a; }
MGK_INLINE I16 operator|(I16 a, I16 b) { MGK_EACH a.part[i] = _mm256_or_si256(a.part[i], b.part[i]); return a; }
#else
MGK_INLINE I16 operator&(I16 a, I16 b) { MGK_EACH a.part[i] = _mm_and_si128(a.part[i], b.part[i]); return a; }
MGK_INLINE I16 operator|(I16 a, I16 b) { MGK_EACH a.part[i] = _mm_or_si128(a.part[i], b.part[i]); return a; }
#endif
template <int n> MGK_INLINE I16 shift_left(I16 a) { MGK_EACH a.part[i] = MGK_OP(slli_epi32)(a.part[i], n); return a; }
template <int n> MGK_INLINE I16 shift_right(I16 a) { MGK_EACH a.part[i] = MGK_OP(srli_epi32)(a.part[i], n); return a; }
template <int n> MGK_INLINE I16 shift_right_signed(I16 a) { MGK_EACH a.part[i] = MGK_OP(srai_epi32)(a.part[i], n); return a; }
MGK_INLINE F16 to_float(I16 a) { F16 r; MGK_EACH r.part[i] = MGK_OP(cvtepi32_ps)(a.part[i]); return r; }
MGK_INLINE I16 round_to_int(F16 a) { I16 r; MGK_EACH r.part[i] = MGK_OP(cvtps_epi32)(a.part[i]); return r; }  // half to even
MGK_INLINE F16 as_float(I16 a) { F16 r; MGK_EACH r.part[i] = MGK_CAST_IF(a.part[i]); return r; }
MGK_INLINE I16 as_int(F16 a) { I16 r; MGK_EACH r.part[i] = MGK_CAST_FI(a.part[i]); return r; }
MGK_INLINE F16 abs(F16 a) { return as_float(as_int(a) & int_set1(0x7fffffff)); }

// Where a < b take x, else y.
MGK_INLINE F16 select_less(F16 a, F16 b, F16 x, F16 y) {
#if defined(MGK_LEVEL_AVX512)
    x.part[0] = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_LT_OQ), y.part[0], x.part[0]);
#elif defined(MGK_LEVEL_AVX2)
    MGK_EACH x.part[i] = _mm256_blendv_ps(y.part[i], x.part[i], _mm256_cmp_ps(a.part[i], b.part[i], _CMP_LT_OQ));
#else
    MGK_EACH {
        const __m128 less = _mm_cmplt_ps(a.part[i], b.part[i]);
        x.part[i] = _mm_or_ps(_mm_and_ps(less, x.part[i]), _mm_andnot_ps(less, y.part[i]));
    }
#endif
    return x;
}

// The lanes 0 … n−1 of x, the others of y.
MGK_INLINE F16 first_lanes(int n, F16 x, F16 y) {
#if defined(MGK_LEVEL_AVX512)
    x.part[0] = _mm512_mask_blend_ps(__mmask16((1u << n) - 1), y.part[0], x.part[0]);
    return x;
#else
    alignas(64) static const float index[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return select_less(load(index), set1(float(n)), x, y);
#endif
}

// Lane sums and maxima in one fixed order (halves, quarters, …).
MGK_INLINE float sum_lanes(F16 a) {
    alignas(64) float x[kLanes];
    store(x, a);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}
MGK_INLINE float max_lanes(F16 a) {
#if defined(MGK_LEVEL_AVX512)
    return _mm512_reduce_max_ps(a.part[0]);
#else
#if defined(MGK_LEVEL_AVX2)
    const __m256 both = _mm256_max_ps(a.part[0], a.part[1]);
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
#else
    __m128 x = _mm_max_ps(_mm_max_ps(a.part[0], a.part[1]), _mm_max_ps(a.part[2], a.part[3]));
#endif
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
#endif
}

// ---- pairs of 16-bit integers in each lane
MGK_INLINE I16 widen_bytes(const int8_t* p) {  // 32 bytes to 32 int16, two a lane
    I16 r;
#if defined(MGK_LEVEL_AVX512)
    r.part[0] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(MGK_LEVEL_AVX2)
    MGK_EACH r.part[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
#else
    for (int h = 0; h < 2; ++h) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * h));
        r.part[2 * h] = _mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8);
        r.part[2 * h + 1] = _mm_srai_epi16(_mm_unpackhi_epi8(x, x), 8);
    }
#endif
    return r;
}
MGK_INLINE void store_int16(int16_t* p, I16 a) {  // values within 16 bits
#if defined(MGK_LEVEL_AVX512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.part[0]));
#elif defined(MGK_LEVEL_AVX2)
    const __m256i mixed = _mm256_packs_epi32(a.part[0], a.part[1]);  // quarters 0 2 1 3
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
#else
    for (int h = 0; h < 2; ++h)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * h), _mm_packs_epi32(a.part[2 * h], a.part[2 * h + 1]));
#endif
}
MGK_INLINE I16 set1_pair(const int16_t* p) {  // p[0], p[1] in every lane
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return int_set1(pair);
}
MGK_INLINE I16 dot_pairs(I16 a, I16 b, I16 sum) {  // sum + a₀b₀ + a₁b₁ in each lane, exact
#if defined(MGK_LEVEL_AVX512)
    sum.part[0] = _mm512_dpwssd_epi32(sum.part[0], a.part[0], b.part[0]);
#elif defined(MGK_LEVEL_AVX2)
    MGK_EACH sum.part[i] = _mm256_add_epi32(sum.part[i], _mm256_madd_epi16(a.part[i], b.part[i]));
#else
    MGK_EACH sum.part[i] = _mm_add_epi32(sum.part[i], _mm_madd_epi16(a.part[i], b.part[i]));
#endif
    return sum;
}

// ---- narrow floats
MGK_INLINE F16 load_bf16(const uint16_t* p) {
    I16 r;
#if defined(MGK_LEVEL_AVX512)
    r.part[0] = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(MGK_LEVEL_AVX2)
    MGK_EACH r.part[i] = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
#else
    for (int h = 0; h < 2; ++h) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * h));
        r.part[2 * h] = _mm_unpacklo_epi16(x, _mm_setzero_si128());
        r.part[2 * h + 1] = _mm_unpackhi_epi16(x, _mm_setzero_si128());
    }
#endif
    return as_float(shift_left<16>(r));
}

MGK_INLINE F16 load_fp16(const uint16_t* p) {
    F16 r;
#if defined(MGK_LEVEL_AVX512)
    r.part[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(MGK_LEVEL_AVX2)
    MGK_EACH r.part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
#else
    // Exponent and mantissa moved into place and rescaled by 2^112 (exact, subnormals too); infinity and NaN keep an
    // all-ones exponent.
    const __m128 rescale = _mm_castsi128_ps(_mm_set1_epi32(0x77800000));
    for (int h = 0; h < 2; ++h) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * h));
        const __m128i wide[2] = {_mm_unpacklo_epi16(x, _mm_setzero_si128()), _mm_unpackhi_epi16(x, _mm_setzero_si128())};
        for (int i = 0; i < 2; ++i) {
            const __m128i magnitude = _mm_and_si128(wide[i], _mm_set1_epi32(0x7fff));
            const __m128i sign = _mm_slli_epi32(_mm_and_si128(wide[i], _mm_set1_epi32(0x8000)), 16);
            const __m128i special = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7bff));
            __m128i bits = _mm_castps_si128(_mm_mul_ps(_mm_castsi128_ps(_mm_slli_epi32(magnitude, 13)), rescale));
            bits = _mm_or_si128(bits, _mm_and_si128(special, _mm_set1_epi32(0x7f800000)));
            r.part[2 * h + i] = _mm_castsi128_ps(_mm_or_si128(bits, sign));
        }
    }
#endif
    return r;
}

MGK_INLINE uint16_t to_bf16(float x) {  // half to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

MGK_INLINE uint16_t to_fp16(float x) {  // half to even, overflow to infinity
#if defined(MGK_LEVEL_BASELINE)
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
        float y;
        std::memcpy(&y, &magnitude, 4);
        y += 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &y, 4);
        return uint16_t(sign | (rounded - 0x3f000000u));
    }
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
#else
    return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#endif
}

MGK_INLINE float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

}  // namespace MGK_ISA
}  // namespace mgk
