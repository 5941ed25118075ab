// The sampling step: a block a (request, codebook), the guided logits in shared memory.
//
// z = (logit − max)/temperature is never above 0, so the bits of |z| order the logits: a small key is a large z. The top-k
// threshold is the smallest key that at least k codes do not exceed, by bisection over the 31 bits of a key, exactly. For
// top-p the masses are integers, multiples of 2^-48, whose sum is exact in any order: bisection finds the largest key
// before which the mass is within p, and among codes of that key the last index that is. The draw is the Gumbel
// maximum over what is kept.
#include "device.h"
#include "philox.h"

namespace mgk {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 4;  // neighbouring codes: one load, and one block of Philox words
constexpr uint32_t kInfinity = 0x7F800000u;
constexpr float kMassUnit = 281474976710656.0f;  // 2^48: sums of up to 2^15 masses fit 64 bits

struct Better {
    MGK_DEVICE uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
// A value and an index as one integer that orders by value, then by lower index. −0 counts as +0.
MGK_DEVICE uint64_t pack_best(float value, int index) {
    const uint32_t bits = __float_as_uint(value + 0.0f);
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t(ordered) << 32 | (0xFFFFFFFFu - uint32_t(index));
}
MGK_DEVICE int best_index(uint64_t packed) { return int(0xFFFFFFFFu - uint32_t(packed)); }

struct Draw {
    const float* z;  // [num_codes], shared
    int num_codes;
    BlockReducer<kThreads>& reduce;

    MGK_DEVICE static uint32_t key(float z) { return __float_as_uint(z) & 0x7FFFFFFFu; }
    MGK_DEVICE static unsigned long long mass(float z) {
        return static_cast<unsigned long long>(expf(z) * kMassUnit + 0.5f);
    }

    // Every thread sums f(v) over its codes, then the block does.
    template <class T, class F>
    MGK_DEVICE T sum(F f) {
        T total = 0;
        for (int v = threadIdx.x; v < num_codes; v += kThreads) total += f(v);
        return reduce(total, Add());
    }

    MGK_DEVICE uint32_t top_k_threshold(int top_k) {
        uint32_t low = 0, high = kInfinity;
        while (low < high) {
            const uint32_t middle = low + (high - low) / 2;
            const int count = sum<int>([&](int v) { return int(key(z[v]) <= middle); });
            if (count >= top_k) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        return low;
    }

    // Codes with a smaller key are kept, and codes of this key up to `last_tie`.
    MGK_DEVICE void top_p_threshold(float top_p, uint32_t& threshold, int& last_tie) {
        using Mass = unsigned long long;
        const double total = double(sum<Mass>([&](int v) { return mass(z[v]); })), limit = top_p;
        uint32_t low = 0, high = kInfinity;
        while (low < high) {
            const uint32_t middle = low + (high - low + 1) / 2;
            const Mass before = sum<Mass>([&](int v) { return key(z[v]) < middle ? mass(z[v]) : 0; });
            if (double(before) / total <= limit) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        const Mass before = sum<Mass>([&](int v) { return key(z[v]) < low ? mass(z[v]) : 0; });
        int first = 0, last = num_codes - 1;
        while (first < last) {  // the last index before which the tied mass is still within p
            const int middle = first + (last - first + 1) / 2;
            const Mass tied = sum<Mass>([&](int v) { return v < middle && key(z[v]) == low ? mass(z[v]) : 0; });
            if (double(before + tied) / total <= limit) {
                first = middle;
            } else {
                last = middle - 1;
            }
        }
        threshold = low;
        last_tie = first;
    }
};

// Up to four neighbouring logits in one load where alignment allows it (num_codes a multiple of 4).
MGK_DEVICE void load_logits(const float* from, int count, bool aligned, float (&x)[kChunk]) {
    if (aligned) return load<kChunk>(from, x);
    MGK_UNROLL
    for (int i = 0; i < kChunk; ++i) x[i] = i < count ? from[i] : 0.0f;
}

// Guidance, rounded after each operation as the oracle does. Rows: conditional, (melody only,) null.
MGK_DEVICE void mix(const float* logits, int count, bool aligned, int num_rows, int64_t row_stride, float guidance,
                    float beta, float (&mixed)[kChunk]) {
    float full[kChunk], melody[kChunk];
    load_logits(logits + (num_rows - 1) * row_stride, count, aligned, mixed);
    if (num_rows > 1) load_logits(logits, count, aligned, full);
    if (num_rows > 2) load_logits(logits + row_stride, count, aligned, melody);
    MGK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
        const float null = mixed[i];
        if (num_rows == 2) mixed[i] = null + guidance * (full[i] - null);
        if (num_rows == 3) mixed[i] = null + guidance * (melody[i] + beta * (full[i] - melody[i]) - null);
    }
}

MGK_DEVICE int draw(const SampleArguments& a, int request, int codebook, int step) {
    BlockReducer<kThreads> reduce(shared_memory());
    float* z = reinterpret_cast<float*>(shared_memory() + BlockReducer<kThreads>::kBytes);
    const int num_codes = int(a.num_codes), first = a.row_offsets[request];
    const int num_rows = a.row_offsets[request + 1] - first;
    const int64_t row_stride = a.num_codebooks * a.num_codes;
    const float* logits = a.logits + first * row_stride + codebook * a.num_codes;
    const float guidance = a.guidance[request], beta = a.guidance_beta[request];
    const bool aligned = num_codes % kChunk == 0 && reinterpret_cast<uintptr_t>(a.logits) % 16 == 0;
    uint64_t best = 0;
    for (int v = threadIdx.x * kChunk; v < num_codes; v += kThreads * kChunk) {
        float mixed[kChunk];
        mix(logits + v, num_codes - v, aligned, num_rows, row_stride, guidance, beta, mixed);
        MGK_UNROLL
        for (int i = 0; i < kChunk; ++i) {
            if (v + i >= num_codes) break;
            z[v + i] = mixed[i];
            best = Better()(best, pack_best(mixed[i], v + i));
        }
    }
    best = reduce(best, Better());
    const float temperature = a.temperature[request], top_p = a.top_p[request];
    if (temperature == 0) return best_index(best);
    const float largest = z[best_index(best)];
    __syncthreads();  // another thread's z is read above, its owner changes it below
    // From here on a thread works on codes a block apart: neighbours' accesses then fall in different banks.
    for (int v = threadIdx.x; v < num_codes; v += kThreads) z[v] = (z[v] - largest) / temperature;
    Draw filter{z, num_codes, reduce};
    uint32_t threshold = kInfinity;
    int last_tie = num_codes - 1;
    const int top_k = a.top_k[request];
    if (top_p > 0) {
        filter.top_p_threshold(top_p, threshold, last_tie);
    } else if (top_k > 0 && top_k < num_codes) {
        threshold = filter.top_k_threshold(top_k);
    }
    __syncthreads();  // below a thread reads neighbours again, which others have written
    best = 0;
    const uint64_t seed = uint64_t(a.seeds[request]);
    for (int v = threadIdx.x * kChunk; v < num_codes; v += kThreads * kChunk) {
        const Philox4 words = philox4x32(uint32_t(step), uint32_t(codebook), uint32_t(v / kChunk), 0, uint32_t(seed),
                                         uint32_t(seed >> 32));
        MGK_UNROLL
        for (int i = 0; i < kChunk; ++i) {
            if (v + i >= num_codes) break;
            const uint32_t key = Draw::key(z[v + i]);
            if (key > threshold || (key == threshold && v + i > last_tie)) continue;
            const float gumbel = -logf(-logf(philox_uniform(words.word[i])));
            best = Better()(best, pack_best(z[v + i] + gumbel, v + i));
        }
    }
    return best_index(reduce(best, Better()));
}

__global__ void __launch_bounds__(kThreads) sample(const SampleArguments a) {
    const int request = blockIdx.x, codebook = blockIdx.y, step = a.steps[request];
    const int frame = step - 1 - a.delays[codebook];
    int32_t* cell = a.sequences + (a.slots[request] * a.num_codebooks + codebook) * a.max_steps + step;
    int code = load_contended(cell);  // requests that are not there may share a slot
    __syncthreads();  // all have read the cell before one writes it
    if (frame < 0 || frame >= a.num_frames[request]) {
        code = int(a.num_codes);
    } else if (code < 0) {
        code = draw(a, request, codebook, step);
    }
    if (threadIdx.x == 0) {
        store_contended(cell, code);
        a.out[request * a.num_codebooks + codebook] = code;
    }
}

}  // namespace

void delayed_sample_step(const SampleArguments& a, void* stream) {
    const size_t shared_bytes = BlockReducer<kThreads>::kBytes + a.num_codes * sizeof(float);
    if (shared_bytes > 48 * 1024) throw LaunchError("delayed_sample_step: over 12000 codes");
    const dim3 grid(unsigned(a.num_requests), unsigned(a.num_codebooks));
    launch("delayed_sample_step", sample, grid, kThreads, shared_bytes, stream, a);
}

}  // namespace cuda
}  // namespace mgk
