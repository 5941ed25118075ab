// New keys and values to their pages: a block a token, eight threads a head, each four channels at a time.
#include "device.h"

namespace mgk {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 8;
constexpr int kVector = 4;

// x/scale to int8, nearest even; the bound matters only where the scale is subnormal and therefore coarse.
MGK_DEVICE int8_t quantise(float x, float scale) {
    return int8_t(fminf(fmaxf(rintf(x / (scale == 0 ? 1.0f : scale)), -127.0f), 127.0f));
}

template <class T, bool kAligned>
MGK_DEVICE void load_channels(const T* from, float (&x)[kVector]) {
    if constexpr (kAligned) {
        load<kVector>(from, x);
    } else {
        MGK_UNROLL
        for (int i = 0; i < kVector; ++i) x[i] = to_float(from[i]);
    }
}

// One head of one token by eight threads.
template <class T, bool kAligned>
MGK_DEVICE void write_head(const T* from, void* pages, float* scales, Type type, int64_t slot, int dim, bool valid) {
    const int lane = threadIdx.x % kLanes;
    float scale = 0, x[kVector];
    if (type == Type::int8) {
        for (int c = lane * kVector; valid && c < dim; c += kLanes * kVector) {
            load_channels<T, kAligned>(from + c, x);
            MGK_UNROLL
            for (int i = 0; i < kVector; ++i) scale = fmaxf(scale, fabsf(x[i]));
        }
        scale = reduce_lanes<1, kLanes>(scale, Max()) / 127.0f;
        if (valid && lane == 0) scales[slot] = scale;
    }
    for (int c = lane * kVector; valid && c < dim; c += kLanes * kVector) {
        const int64_t at = slot * dim + c;
        load_channels<T, kAligned>(from + c, x);
        if (type == Type::fp32) store(x, static_cast<float*>(pages) + at);
        if (type == Type::bf16) store(x, static_cast<BFloat16*>(pages) + at);
        if (type == Type::fp16) store(x, static_cast<Half*>(pages) + at);
        if (type == Type::int8) {
            Pack<int8_t, kVector> codes;
            MGK_UNROLL
            for (int i = 0; i < kVector; ++i) codes.element[i] = quantise(x[i], scale);
            *reinterpret_cast<Pack<int8_t, kVector>*>(static_cast<int8_t*>(pages) + at) = codes;
        }
    }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) append(const AppendArguments a) {
    const RaggedRows& r = a.rows;
    const int token = blockIdx.x;
    const int row = find_row<1, 0>(r.query_offsets, int(r.num_rows), token);
    const int position = r.kv_lens[row] - r.query_offsets[row + 1] + token;
    if (position < 0) return;  // a row that is not there: the whole block, before any exchange
    const int64_t page = r.page_table[row * r.max_pages + position / kPage];
    const int heads = int(r.num_heads), dim = int(r.head_dim);
    for (int first = 0; first < heads; first += kThreads / kLanes) {  // all threads in every pass: lanes exchange values
        const int head = first + int(threadIdx.x) / kLanes;
        const bool valid = head < heads;
        const int64_t slot = (page * heads + head) * kPage + position % kPage;
        const T* key = static_cast<const T*>(a.keys) + token * a.k_token_stride + head * a.k_head_stride;
        const T* value = static_cast<const T*>(a.values) + token * a.v_token_stride + head * a.v_head_stride;
        write_head<T, kAligned>(key, a.pages.k, a.pages.k_scales, a.pages.type, slot, dim, valid);
        write_head<T, kAligned>(value, a.pages.v, a.pages.v_scales, a.pages.type, slot, dim, valid);
    }
}

}  // namespace

void append_paged_kv(const AppendArguments& a, void* stream) {
    if (a.rows.head_dim % kVector) throw LaunchError("append_paged_kv: head_dim is no multiple of 4");
    const int64_t strides[] = {a.k_token_stride, a.k_head_stride, a.v_token_stride, a.v_head_stride};
    bool aligned = aligned16(a.keys) && aligned16(a.values);
    for (int64_t stride : strides) aligned = aligned && stride % kVector == 0;
    with_float_type(a.type, [&](auto x) {
        using T = decltype(x);
        const dim3 grid(unsigned(a.rows.num_tokens));
        if (aligned) return launch("append_paged_kv", append<T, true>, grid, kThreads, 0, stream, a);
        launch("append_paged_kv", append<T, false>, grid, kThreads, 0, stream, a);
    });
}

}  // namespace cuda
}  // namespace mgk
