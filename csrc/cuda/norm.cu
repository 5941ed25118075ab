// Layer norm, a block a row, and the input embedding, a block a token.
#include "device.h"

namespace mgk {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// Two passes over the row in shared memory: the mean, then the variance around it, where the mean of what is left corrects
// the rounding of the first (Chan, Golub & LeVeque 1983). The order of the sums depends on dim alone. kVector elements are loaded at a time: 16 bytes, or one where dim or an address does not allow it.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) norm_rows(const LayerNormArguments a) {
    BlockReducer<kThreads> reduce(shared_memory());
    float* row = reinterpret_cast<float*>(shared_memory() + BlockReducer<kThreads>::kBytes);
    const int dim = int(a.dim);
    const int64_t at = blockIdx.x * a.dim;
    float h[kVector], other[kVector];
    float sum = 0;
    for (int c = threadIdx.x * kVector; c < dim; c += kThreads * kVector) {
        load<kVector>(static_cast<const T*>(a.x) + at + c, h);
        if (a.residual) {
            load<kVector>(a.residual + at + c, other);
            MGK_UNROLL
            for (int i = 0; i < kVector; ++i) h[i] += other[i];
            store(h, a.residual + at + c);
        }
        store(h, row + c);
        MGK_UNROLL
        for (int i = 0; i < kVector; ++i) sum += h[i];
    }
    const float rough_mean = reduce(sum, Add()) / float(dim);
    float squares = 0, rest = 0;
    for (int c = threadIdx.x * kVector; c < dim; c += kThreads * kVector) {
        load<kVector>(row + c, h);
        MGK_UNROLL
        for (int i = 0; i < kVector; ++i) {
            const float centred = h[i] - rough_mean;
            rest += centred;
            squares = fmaf(centred, centred, squares);
        }
    }
    const float correction = reduce(rest, Add()) / float(dim);
    const float variance = fmaxf(reduce(squares, Add()) / float(dim) - correction * correction, 0.0f);
    const float inverse = 1.0f / sqrtf(variance + a.eps);
    for (int c = threadIdx.x * kVector; c < dim; c += kThreads * kVector) {
        float weight[kVector], bias[kVector];
        load<kVector>(row + c, h);
        load<kVector>(a.weight + c, weight);
        load<kVector>(a.bias + c, bias);
        MGK_UNROLL
        for (int i = 0; i < kVector; ++i) h[i] = fmaf((h[i] - rough_mean - correction) * inverse, weight[i], bias[i]);
        if (a.out_type == Type::fp32) store(h, static_cast<float*>(a.out) + at + c);
        if (a.out_type == Type::bf16) store(h, static_cast<BFloat16*>(a.out) + at + c);
        if (a.out_type == Type::fp16) store(h, static_cast<Half*>(a.out) + at + c);
    }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) embed_tokens(const EmbedArguments a) {
    const int64_t token = blockIdx.x;
    const int num_codebooks = int(a.num_codebooks), dim = int(a.dim);
    const int32_t* codes = a.codes + token * num_codebooks;
    const float* sinusoid = a.sinusoids + a.positions[token] * a.dim;
    for (int c = threadIdx.x * kVector; c < dim; c += kThreads * kVector) {
        float total[kVector], value[kVector];
        load<kVector>(static_cast<const T*>(a.tables) + codes[0] * a.dim + c, total);
        for (int k = 1; k < num_codebooks; ++k) {
            load<kVector>(static_cast<const T*>(a.tables) + (k * a.num_entries + codes[k]) * a.dim + c, value);
            MGK_UNROLL
            for (int i = 0; i < kVector; ++i) total[i] += value[i];
        }
        load<kVector>(sinusoid + c, value);
        MGK_UNROLL
        for (int i = 0; i < kVector; ++i) total[i] += value[i];
        store(total, a.out + token * dim + c);
    }
}

}  // namespace

void layer_norm(const LayerNormArguments& a, void* stream) {
    const size_t shared_bytes = BlockReducer<kThreads>::kBytes + a.dim * sizeof(float);
    if (shared_bytes > 48 * 1024) throw LaunchError("layer_norm: a row of over 12000 elements");
    with_float_type(a.type, [&](auto x) {
        using T = decltype(x);
        constexpr int kVector = 16 / sizeof(T);
        bool wide = a.dim % kVector == 0;
        for (const void* p : {a.x, static_cast<const void*>(a.weight), static_cast<const void*>(a.bias),
                              static_cast<const void*>(a.residual), static_cast<const void*>(a.out)}) {
            wide = wide && aligned16(p);
        }
        const dim3 grid(unsigned(a.num_rows));
        if (wide) return launch("layer_norm", norm_rows<T, kVector>, grid, kThreads, shared_bytes, stream, a);
        launch("layer_norm", norm_rows<T, 1>, grid, kThreads, shared_bytes, stream, a);
    });
}

void embed_codes(const EmbedArguments& a, void* stream) {
    with_float_type(a.type, [&](auto x) {
        using T = decltype(x);
        constexpr int kVector = 16 / sizeof(T);
        const bool wide = a.dim % kVector == 0 && aligned16(a.tables) && aligned16(a.sinusoids) && aligned16(a.out);
        const dim3 grid(unsigned(a.num_tokens));
        if (wide) return launch("embed_codes", embed_tokens<T, kVector>, grid, kThreads, 0, stream, a);
        launch("embed_codes", embed_tokens<T, 1>, grid, kThreads, 0, stream, a);
    });
}

}  // namespace cuda
}  // namespace mgk
