// Machine probes. Results are marked as used, so that nothing is optimised away.
#include "probe.h"

#include <chrono>

#include "team.h"

namespace mgk {
namespace MGK_ISA {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Body> double timed(int num_threads, Body body) {
    const double start = now();
    parallel(num_threads, [&](Team&, int) { body(); });
    return now() - start;
}

// For the compiler: x is read, all of it; w has changed (equal products would be made once, for all chains).
MGK_INLINE void use(const I16& x) { MGK_EACH asm volatile("" : : "x"(x.part[i])); }
[[maybe_unused]] MGK_INLINE void change(I16& w) { MGK_EACH asm volatile("" : "+x"(w.part[i])); }

}  // namespace

double stream_read_seconds(const char* data, int64_t bytes, int num_threads) {
    constexpr int64_t piece = 256 * 1024;
    const double start = now();
    parallel(num_threads, [&](Team& team, int member) {
        I16 sum[8];
        for (I16& s : sum) s = int_zero();
        team.for_each(member, (bytes + piece - 1) / piece, [&](int64_t i) {
            const int64_t end = (i + 1) * piece < bytes ? (i + 1) * piece : bytes;
            for (int64_t at = i * piece; at < end; at += 512)
                for (int k = 0; k < 8; ++k) sum[k] = sum[k] + int_load(data + at + k * 64);
        });
        for (const I16& s : sum) use(s);
    });
    return now() - start;
}

double fma_per_second(int num_threads) {
    constexpr int64_t rounds = 1000000;
    constexpr int chains = 12 / kParts < 2 ? 2 : 12 / kParts;
    const double seconds = timed(num_threads, [&] {
        F16 x[chains];
        const F16 a = set1(0.999f), b = set1(0.001f);
        for (F16& v : x) v = b;
        for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 16
            for (int c = 0; c < chains; ++c) x[c] = fma(x[c], a, b);
        for (const F16& v : x) use(as_int(v));
    });
    return double(rounds) * chains * kLanes * num_threads / seconds;
}

double int8_per_second(int num_threads) {
    constexpr int64_t rounds = 1000000;
#if defined(MGK_LEVEL_AVX512)
    constexpr int chains = 12;
#elif defined(MGK_LEVEL_AVX2)
    constexpr int chains = 3;
#else
    constexpr int chains = 2;
#endif
    const double seconds = timed(num_threads, [&] {
        I16 sum[chains], w = int_set1(0x01020304), x = int_set1(0x01010101);
        for (I16& s : sum) s = int_zero();
        for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
            for (int c = 0; c < chains; ++c) {
                I16& s = sum[c];
#if defined(MGK_LEVEL_AVX512)
                s.part[0] = _mm512_dpbusd_epi32(s.part[0], w.part[0], x.part[0]);
#elif defined(MGK_LEVEL_AVX2)
                change(w);
                MGK_EACH s.part[i] = _mm256_add_epi32(
                    s.part[i], _mm256_madd_epi16(_mm256_maddubs_epi16(w.part[i], x.part[i]), _mm256_set1_epi16(1)));
#else
                for (int step = 0; step < 2; ++step) {  // two 16-bit steps for the same number of products
                    change(w);
                    s = dot_pairs(w, x, s);
                }
#endif
            }
        }
        for (const I16& s : sum) use(s);
    });
    return double(rounds) * chains * kLanes * 4 * num_threads / seconds;
}

}  // namespace MGK_ISA
}  // namespace mgk
