// The matrix product with packed weights in "rows" order, for the few rows of a decode step: a warp an output.
//
// A lane takes 16 bytes of a weight row at a time, with a stride of a warp, and multiplies them with up to kRows rows of x;
// what a lane sums, and how lanes are added up, depends on in_features and the group alone, so a row of the result is the
// same bits in any batch. More than kRows rows are more blocks, which read the weights again: prefill of many tokens is
// better served by Triton's kernel, which uses tensor cores.
#include "device.h"

namespace mgk {
namespace cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kRows = 4;
constexpr int kMaxInFeatures = 1 << 30;  // an int, and still one after a lane's last stride

template <WeightKind kKind>
struct Weight;
template <>
struct Weight<WeightKind::fp32> {
    using Code = float;
    static constexpr int kVector = 4;
};
template <>
struct Weight<WeightKind::bf16> {
    using Code = BFloat16;
    static constexpr int kVector = 8;
};
template <>
struct Weight<WeightKind::int8> {
    using Code = int8_t;
    static constexpr int kVector = 16;
};
template <>
struct Weight<WeightKind::int4> {  // byte j holds input 2j in its low half, 2j + 1 in its high half
    using Code = uint8_t;
    static constexpr int kVector = 32;
};

// kVector weights from a 16-byte load, unscaled.
template <WeightKind kKind>
MGK_DEVICE void load_weights(const void* codes, int64_t at, float (&w)[Weight<kKind>::kVector]) {
    using W = Weight<kKind>;
    if constexpr (kKind == WeightKind::int4) {
        const auto pack = *reinterpret_cast<const Pack<uint8_t, 16>*>(static_cast<const uint8_t*>(codes) + at / 2);
        MGK_UNROLL
        for (int j = 0; j < 16; ++j) {
            w[2 * j] = float(int(pack.element[j] & 15) - 8);
            w[2 * j + 1] = float(int(pack.element[j] >> 4) - 8);
        }
    } else {
        load<W::kVector>(static_cast<const typename W::Code*>(codes) + at, w);
    }
}

template <class T>
MGK_DEVICE void finish(const LinearArguments& a, int64_t at, float y) {
    if (a.residual) y += to_float(static_cast<const T*>(a.residual)[at]);
    from_float(y, static_cast<T*>(a.out)[at]);
}

template <class T, WeightKind kKind>
__global__ void __launch_bounds__(kWarps * kWarp, 4) multiply(const LinearArguments a) {
    constexpr int kVector = Weight<kKind>::kVector, kWidest = 16 / sizeof(T);
    constexpr int kChunk = kWidest < kVector ? kWidest : kVector;  // elements of x in one load
    const int lane = threadIdx.x % kWarp;
    const int64_t output = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int64_t first_row = int64_t(blockIdx.y) * kRows;
    if (output >= a.out_features) return;  // a whole warp
    // 32 bits suffice for a row, and a GPU divides 64-bit integers in a subroutine.
    const int in_features = int(a.in_features), group_len = int(a.group_len);
    const T* x = static_cast<const T*>(a.x);
    const uint16_t* scales = a.scales ? a.scales + output * (in_features / group_len) : nullptr;
    float total[kRows] = {};
    for (int i = lane * kVector; i < in_features; i += kWarp * kVector) {
        float w[kVector];
        load_weights<kKind>(a.codes, output * in_features + i, w);
        const float scale = scales ? to_float(BFloat16{scales[i / group_len]}) : 1.0f;
        MGK_UNROLL
        for (int r = 0; r < kRows; ++r) {
            if (first_row + r >= a.num_rows) break;
            float sum = 0, chunk[kChunk];
            MGK_UNROLL
            for (int j = 0; j < kVector; ++j) {
                if (j % kChunk == 0) load<kChunk>(x + (first_row + r) * in_features + i + j, chunk);
                sum = fmaf(w[j], chunk[j % kChunk], sum);
            }
            total[r] = fmaf(sum, scale, total[r]);
        }
    }
    MGK_UNROLL
    for (int r = 0; r < kRows; ++r) {
        float y = reduce_lanes<1, kWarp>(total[r], Add());
        if (lane != 0 || first_row + r >= a.num_rows) continue;
        const int64_t at = (first_row + r) * a.out_features + output;
        if (a.bias) y += a.bias[output];
        if (a.gelu) y = 0.5f * y * (1.0f + erff(y * 0.7071067811865476f));
        if (a.out_type == Type::fp32) finish<float>(a, at, y);
        if (a.out_type == Type::bf16) finish<BFloat16>(a, at, y);
        if (a.out_type == Type::fp16) finish<Half>(a, at, y);
    }
}

template <class T>
void run(const LinearArguments& a, void* stream) {
    const dim3 grid(unsigned((a.out_features + kWarps - 1) / kWarps), unsigned((a.num_rows + kRows - 1) / kRows));
    auto go = [&](auto kernel) { launch("linear", kernel, grid, kWarps * kWarp, 0, stream, a); };
    switch (a.kind) {
        case WeightKind::fp32: return go(multiply<T, WeightKind::fp32>);
        case WeightKind::bf16: return go(multiply<T, WeightKind::bf16>);
        case WeightKind::int8: return go(multiply<T, WeightKind::int8>);
        case WeightKind::int4: return go(multiply<T, WeightKind::int4>);
    }
    throw LaunchError("linear: no such kind of weight");
}

}  // namespace

void linear(const LinearArguments& a, void* stream) {
    if (a.in_features % 32 || !aligned16(a.x) || !aligned16(a.codes)) {
        throw LaunchError("linear: in_features is no multiple of 32, or x or the weight is not aligned to 16 bytes");
    }
    if (a.in_features > kMaxInFeatures) throw LaunchError("linear: over 2^30 inputs");
    with_float_type(a.type, [&](auto x) { run<decltype(x)>(a, stream); });
}

}  // namespace cuda
}  // namespace mgk
