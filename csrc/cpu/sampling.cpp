// The sampling step on the CPU. For a request and a codebook:
//   1. mix the rows' logits (the same operations in the same order as the reference, no contraction: equal bits);
//   2. z = (logit − max)/temperature ≤ 0, so its bits without the sign order the values: bisection over 31 bits finds the
//      k-th value, or the value at which the mass passes top_p;
//   3. only the kept codes draw their number: a few hundred Philox blocks instead of two thousand.
#include "sampling.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "error.h"
#include "philox.h"
#include "team.h"
#include "vector_math.h"

namespace mgk {
namespace MGK_ISA {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Scratch {
    std::vector<float> z, weight;  // padded to a multiple of 64 with −infinity and 0
    std::vector<int32_t> kept;
    explicit Scratch(int num_codes) : z(padded(num_codes)), weight(padded(num_codes)), kept(padded(num_codes)) {}
    static size_t padded(int n) { return size_t(n + 63) / 64 * 64; }
};

MGK_INLINE uint32_t magnitude(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits & 0x7fffffffu;
}

// Writes the guided logits to z (padding −infinity) and returns the largest.
float mix(const SampleArguments& a, int64_t request, int32_t codebook, Scratch& s) {
    const int32_t first = a.row_offsets[request], rows = a.row_offsets[request + 1] - first;
    const int64_t stride = int64_t(a.num_codebooks) * a.num_codes;
    const float* top = a.logits + first * stride + int64_t(codebook) * a.num_codes;
    const float* middle = top + stride;
    const float* null = top + (rows - 1) * stride;
    const float c = a.guidance[request], beta = a.guidance_beta[request];
    float* z = s.z.data();
    const int n = a.num_codes;
    if (rows == 1)
        std::memcpy(z, top, sizeof(float) * n);
    else if (rows == 2)
        for (int v = 0; v < n; ++v) z[v] = null[v] + c * (top[v] - null[v]);
    else
        for (int v = 0; v < n; ++v) z[v] = null[v] + c * (middle[v] + beta * (top[v] - middle[v]) - null[v]);
    for (size_t v = n; v < s.z.size(); ++v) z[v] = -kInfinity;
    F16 largest = load(z);
    for (size_t v = kLanes; v < s.z.size(); v += kLanes) largest = max(largest, load(z + v));
    return max_lanes(largest);
}

int32_t first_equal(const float* z, int n, float value) {
    for (int v = 0; v < n; ++v)
        if (z[v] == value) return v;
    return 0;  // only where logits are NaN
}

int count_below(const float* z, size_t n, uint32_t bound) {  // bound < 2^31
    int count = 0;
    for (size_t v = 0; v < n; ++v) count += int32_t(magnitude(z[v])) < int32_t(bound);
    return count;
}

// The magnitude of the k-th largest z: the largest m with fewer than k magnitudes below it. With narrow registers a pass
// over all codes is dear: once the upper bits are known, those that share them are set aside (in `weight`, which top-k
// does not use) and the lower bits are found among them.
uint32_t kth_magnitude(Scratch& s, int k) {
#if defined(MGK_LEVEL_AVX512)
    constexpr int kLowBits = 0;
#else
    constexpr int kLowBits = 20;
#endif
    uint32_t m = 0;
    int bit = 30;
    for (; bit >= kLowBits; --bit)
        if (count_below(s.z.data(), s.z.size(), m | 1u << bit) < k) m |= 1u << bit;
    if constexpr (kLowBits == 0) return m;
    const int below = count_below(s.z.data(), s.z.size(), m);
    size_t n = 0;
    for (const float z : s.z) {
        s.weight[n] = z;
        n += magnitude(z) >> kLowBits == m >> kLowBits;
    }
    for (; bit >= 0; --bit)
        if (below + count_below(s.weight.data(), n, m | 1u << bit) < k) m |= 1u << bit;
    return m;
}

double mass_below(const Scratch& s, uint32_t bound) {
    double sums[8] = {};
    for (size_t v = 0; v < s.z.size(); v += 8)
        for (int i = 0; i < 8; ++i) sums[i] += magnitude(s.z[v + i]) < bound ? double(s.weight[v + i]) : 0.0;
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

int keep_top_k(Scratch& s, int n, int k) {
    const uint32_t bound = kth_magnitude(s, k);
    int count = 0;
    for (int v = 0; v < n; ++v) {
        s.kept[count] = v;
        count += magnitude(s.z[v]) <= bound;
    }
    return count;
}

// Keeps, in order of z descending and index ascending, every code whose mass before it is ≤ top_p of the total.
int keep_top_p(Scratch& s, int n, float top_p) {
    for (size_t v = 0; v < s.z.size(); v += kLanes) store(&s.weight[v], exp_negative(load(&s.z[v])));
    const double total = mass_below(s, 0x80000000u), limit = double(top_p);
    uint32_t m = 0;  // the largest magnitude whose codes have mass before them within the limit
    for (int bit = 30; bit >= 0; --bit)
        if (mass_below(s, m | 1u << bit) / total <= limit) m |= 1u << bit;
    double before = mass_below(s, m);
    int count = 0;
    for (int v = 0; v < n; ++v) {
        const uint32_t own = magnitude(s.z[v]);
        if (own > m || (own == m && before / total > limit)) continue;
        s.kept[count++] = v;
        if (own == m) before += double(s.weight[v]);
    }
    return count;
}

// Sixteen Philox calls side by side; the rounds of philox.h on lanes that the compiler vectorises.
struct PhiloxLanes {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
};

MGK_INLINE void philox_lanes(PhiloxLanes& p, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1) {
        for (int i = 0; i < kLanes; ++i) {
            const uint64_t p0 = uint64_t(kPhiloxMultiplier0) * p.c0[i], p1 = uint64_t(kPhiloxMultiplier1) * p.c2[i];
            const uint32_t c1 = p.c1[i], c3 = p.c3[i];
            p.c0[i] = uint32_t(p1 >> 32) ^ c1 ^ k0;
            p.c1[i] = uint32_t(p1);
            p.c2[i] = uint32_t(p0 >> 32) ^ c3 ^ k1;
            p.c3[i] = uint32_t(p0);
        }
    }
}

struct DrawKey {
    uint32_t step, codebook, key0, key1;
};

// u[i] for the codes v[i].
MGK_INLINE void uniforms(const DrawKey& key, const int32_t* v, float* u) {
    PhiloxLanes p;
    for (int i = 0; i < kLanes; ++i) {
        p.c0[i] = key.step;
        p.c1[i] = key.codebook;
        p.c2[i] = uint32_t(v[i]) >> 2;
        p.c3[i] = 0;
    }
    philox_lanes(p, key.key0, key.key1);
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t low = v[i] & 1 ? p.c1[i] : p.c0[i], high = v[i] & 1 ? p.c3[i] : p.c2[i];
        u[i] = (float(int32_t((v[i] & 2 ? high : low) >> 9)) + 0.5f) * 0x1p-23f;
    }
}

// The kept code with the largest z − log(−log u); the lowest on ties (kept is ascending).
int32_t draw(const Scratch& s, int count, const DrawKey& key) {
    float best = -kInfinity;
    int32_t winner = s.kept[0];
    for (int start = 0; start < count; start += kLanes) {
        const int lanes = count - start < kLanes ? count - start : kLanes;
        int32_t v[kLanes];
        alignas(64) float u[kLanes], z[kLanes], perturbed[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            v[i] = s.kept[start + (i < lanes ? i : 0)];
            z[i] = i < lanes ? s.z[v[i]] : -kInfinity;
        }
        uniforms(key, v, u);
        store(perturbed, load(z) - log(zero() - log(load(u))));
        for (int i = 0; i < lanes; ++i)
            if (perturbed[i] > best) {
                best = perturbed[i];
                winner = v[i];
            }
    }
    return winner;
}

int32_t sample(const SampleArguments& a, int64_t request, int32_t codebook, Scratch& s) {
    const int n = a.num_codes;
    const float largest = mix(a, request, codebook, s), temperature = a.temperature[request];
    if (temperature == 0.0f) return first_equal(s.z.data(), n, largest);
    const F16 shift = set1(largest), divisor = set1(temperature);
    for (size_t v = 0; v < s.z.size(); v += kLanes) store(&s.z[v], (load(&s.z[v]) - shift) / divisor);
    int count = n;
    if (a.top_p[request] > 0.0f)
        count = keep_top_p(s, n, a.top_p[request]);
    else if (a.top_k[request] > 0 && a.top_k[request] < n)
        count = keep_top_k(s, n, a.top_k[request]);
    else
        for (int v = 0; v < n; ++v) s.kept[v] = v;
    const uint64_t seed = uint64_t(a.seeds[request]);
    return draw(s, count, {uint32_t(a.steps[request]), uint32_t(codebook), uint32_t(seed), uint32_t(seed >> 32)});
}

void decide(const SampleArguments& a, int64_t request, int32_t codebook, Scratch& s) {
    const int64_t step = a.steps[request], frame = step - 1 - a.delays[codebook];
    int32_t& place = a.sequences[(int64_t(a.slots[request]) * a.num_codebooks + codebook) * a.num_steps + step];
    if (frame < 0 || frame >= a.num_frames[request])
        place = a.num_codes;
    else if (place < 0)
        place = sample(a, request, codebook, s);
    a.out[request * a.num_codebooks + codebook] = place;
}

void check_parameter(const char* argument, int64_t request, float value) {
    if (value >= 0.0f && value < kInfinity) return;
    throw ArgumentError(std::string(argument) + "[" + std::to_string(request) + "]", "a finite number of at least 0",
                        std::to_string(value));
}

void check(const SampleArguments& a) {
    std::vector<bool> used(size_t(a.num_slots), false);
    check_range("batch.row_offsets", 0, a.row_offsets[0], 0, 1);
    for (int32_t k = 0; k < a.num_codebooks; ++k) check_range("delays", k, a.delays[k], 0, a.num_steps + 1);
    for (int64_t r = 0; r < a.num_requests; ++r) {
        const long begin = a.row_offsets[r];
        check_range("batch.row_offsets", r + 1, a.row_offsets[r + 1], begin + 1, begin + 4);
        check_range("batch.row_offsets", r + 1, a.row_offsets[r + 1], 0, a.num_rows + 1);
        check_range("batch.slots", r, a.slots[r], 0, a.num_slots);
        check_range("batch.steps", r, a.steps[r], 0, a.num_steps);
        check_range("batch.num_frames", r, a.num_frames[r], 0, std::numeric_limits<int32_t>::max());
        check_range("batch.top_k", r, a.top_k[r], 0, std::numeric_limits<int32_t>::max());
        check_parameter("batch.temperature", r, a.temperature[r]);
        check_parameter("batch.top_p", r, a.top_p[r]);
        if (used[a.slots[r]])
            throw ArgumentError("batch.slots[" + std::to_string(r) + "]", "a slot of its own", "one used before");
        used[a.slots[r]] = true;
        for (int32_t k = 0; k < a.num_codebooks; ++k)
            check_range("sequences", k, a.sequences[(a.slots[r] * int64_t(a.num_codebooks) + k) * a.num_steps + a.steps[r]],
                        -1, a.num_codes + 1);
    }
}

}  // namespace

void delayed_sample_step(const SampleArguments& a, int num_threads) {
    check(a);
    const int64_t work = a.num_requests * a.num_codebooks;
    parallel(work < 8 ? 1 : num_threads, [&](Team& team, int member) {
        Scratch scratch(a.num_codes);
        team.for_each(member, work, [&](int64_t i) { decide(a, i / a.num_codebooks, int32_t(i % a.num_codebooks), scratch); });
    });
}

void sample_uniforms(int64_t seed, int32_t step, int32_t codebook, int32_t num_codes, float* u) {
    const DrawKey key{uint32_t(step), uint32_t(codebook), uint32_t(seed), uint32_t(uint64_t(seed) >> 32)};
    for (int32_t v = 0; v < num_codes; v += kLanes) {
        int32_t codes[kLanes];
        float values[kLanes];
        for (int i = 0; i < kLanes; ++i) codes[i] = v + i;
        uniforms(key, codes, values);
        for (int i = 0; i < kLanes && v + i < num_codes; ++i) u[v + i] = values[i];
    }
}

}  // namespace MGK_ISA
}  // namespace mgk
