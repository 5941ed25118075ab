// Attention over pages: online softmax in base 2 (Milakov & Gimelshein 2018) over splits of 256 positions.
//
// A block of 128 threads takes a tile of queries of one row and head. A position is one 16-byte load of K and one of V
// a thread: at head_dim 64, 16 threads a position for fp32, 8 for 16-bit pages, 4 for int8, so one pass of the block
// reads 8, 16 or 32 neighbouring positions. A thread copies what it alone will read, asynchronously, kStages passes ahead;
// no barrier is needed until the split ends. Each group of threads keeps a state (m, w, o) of its positions: the
// largest score, the sum of weights, the weighted values; at the end of a split the states are merged, groups of a warp by
// exchange, then warps in ascending order. Splits are merged in ascending order.
//
// Row invariance: a state depends on the query, its limit and its row's positions only. Decode runs splits in parallel and
// merges them in a second kernel; prefill runs them in turn, and its tile of queries share loads, not arithmetic. Both use
// the same functions, and the sources are compiled without contraction, so a query has the same bits in both.
#include "device.h"

namespace mgk {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 4;
constexpr float kLog2E = 1.4426950408889634f;

template <class KV, int D>
struct Shape {
    static constexpr int kVector = 16 / sizeof(KV);             // elements of a 16-byte load
    static constexpr int kLanes = D / kVector;                  // threads a position
    static constexpr int kPositions = kThreads / kLanes;        // positions a pass
    static constexpr int kPasses = kSplit / kPositions;         // passes a split
    static constexpr bool kScaled = sizeof(KV) == 1;
    static constexpr int kTile = 16 / kVector >= 2 ? 4 : 2;     // queries that share loads in prefill
    static_assert(kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0, "a position is read within one warp");
};

// The loads in flight: K and V [stage][thread] of 16 bytes, and for int8 their scales of 4.
template <bool kScaled>
struct Pipeline {
    static constexpr int kVectors = kStages * kThreads * 16, kScales = kStages * kThreads * 4;
    static constexpr int kBytes = 2 * kVectors + (kScaled ? 2 * kScales : 0);
    unsigned char* base;
    MGK_DEVICE void* k(int stage) const { return base + (stage * kThreads + threadIdx.x) * 16; }
    MGK_DEVICE void* v(int stage) const { return base + kVectors + (stage * kThreads + threadIdx.x) * 16; }
    MGK_DEVICE float* k_scale(int stage) const {
        return reinterpret_cast<float*>(base + 2 * kVectors) + stage * kThreads + threadIdx.x;
    }
    MGK_DEVICE float* v_scale(int stage) const { return k_scale(stage) + kStages * kThreads; }
};

template <int N>
struct State {
    float m, w, o[N];
    MGK_DEVICE void clear() {
        m = -INFINITY;
        w = 0;
        MGK_UNROLL
        for (int i = 0; i < N; ++i) o[i] = 0;
    }
};

// What two disjoint sets of positions are multiplied by when they are put together; an empty set has m = −∞.
struct Decay {
    float m, a, b;
    MGK_DEVICE Decay(float m1, float m2) : m(fmaxf(m1, m2)) {
        const float origin = m == -INFINITY ? 0.0f : m;
        a = exp2f(m1 - origin);
        b = exp2f(m2 - origin);
    }
    MGK_DEVICE float operator()(float x1, float x2) const { return x1 * a + x2 * b; }  // commutes: no contraction
};

template <int N>
MGK_DEVICE void see_position(State<N>& s, float score, const float (&v)[N], float v_scale) {
    const float m = fmaxf(s.m, score);
    const float decay = exp2f(s.m - m);
    const float weight = exp2f(score - m);
    s.w = fmaf(s.w, decay, weight);
    const float scaled = weight * v_scale;
    MGK_UNROLL
    for (int i = 0; i < N; ++i) s.o[i] = fmaf(scaled, v[i], s.o[i] * decay);
    s.m = m;
}

template <class KV, int D>
MGK_DEVICE void fetch(const AttentionArguments& a, const Pipeline<Shape<KV, D>::kScaled>& pipeline, const int32_t* table, int head, int start,
                      int pass, int end) {
    using S = Shape<KV, D>;
    const int position = start + pass * S::kPositions + int(threadIdx.x) / S::kLanes;
    const bool valid = pass < S::kPasses && position < end;
    const int64_t page = valid ? table[position / kPage] : 0;
    const int64_t slot = (page * a.rows.num_heads + head) * kPage + position % kPage;
    const int64_t at = slot * D + int(threadIdx.x) % S::kLanes * S::kVector;
    const int stage = pass % kStages;
    copy_async<16>(pipeline.k(stage), static_cast<const KV*>(a.pages.k) + at, valid);
    copy_async<16>(pipeline.v(stage), static_cast<const KV*>(a.pages.v) + at, valid);
    if (S::kScaled) {
        copy_async<4>(pipeline.k_scale(stage), a.pages.k_scales + slot, valid);
        copy_async<4>(pipeline.v_scale(stage), a.pages.v_scales + slot, valid);
    }
    commit_copies();
}

// Positions start … min(start + 256, end) − 1 for a tile of queries, of which query i sees those below limits[i].
template <class KV, int D, int kTile>
MGK_DEVICE void attend_split(const AttentionArguments& a, const Pipeline<Shape<KV, D>::kScaled>& pipeline, const int32_t* table, int head,
                             int start, int end, const int (&limits)[kTile],
                             const float (&q)[kTile][Shape<KV, D>::kVector],
                             State<Shape<KV, D>::kVector> (&states)[kTile]) {
    using S = Shape<KV, D>;
    MGK_UNROLL
    for (int i = 0; i < kTile; ++i) states[i].clear();
    MGK_UNROLL
    for (int pass = 0; pass < kStages - 1; ++pass) fetch<KV, D>(a, pipeline, table, head, start, pass, end);
    const int num_passes = (min(end - start, kSplit) + S::kPositions - 1) / S::kPositions;
    for (int pass = 0; pass < num_passes; ++pass) {
        fetch<KV, D>(a, pipeline, table, head, start, pass + kStages - 1, end);
        wait_copies<kStages - 1>();
        const int stage = pass % kStages;
        const int position = start + pass * S::kPositions + int(threadIdx.x) / S::kLanes;
        float k[S::kVector], v[S::kVector];
        load<S::kVector>(static_cast<const KV*>(pipeline.k(stage)), k);
        load<S::kVector>(static_cast<const KV*>(pipeline.v(stage)), v);
        const float k_scale = S::kScaled ? *pipeline.k_scale(stage) : 1.0f;
        const float v_scale = S::kScaled ? *pipeline.v_scale(stage) : 1.0f;
        MGK_UNROLL
        for (int i = 0; i < kTile; ++i) {
            float score = 0;
            MGK_UNROLL
            for (int j = 0; j < S::kVector; ++j) score = fmaf(q[i][j], k[j], score);
            score = reduce_lanes<1, S::kLanes>(score, Add()) * k_scale;
            if (position < limits[i]) see_position(states[i], score, v, v_scale);
        }
    }
    wait_copies<0>();
}

// The states of all groups of the block as one. Thread d < D returns (m, w) and channel d's o.
template <class KV, int D>
MGK_DEVICE State<1> merge_groups(State<Shape<KV, D>::kVector> s, float* scratch) {
    using S = Shape<KV, D>;
    constexpr int kWarps = kThreads / kWarp, kStride = D + 2;
    const int lane = threadIdx.x % kWarp;
    MGK_UNROLL
    for (int offset = S::kLanes; offset < kWarp; offset *= 2) {
        const Decay join(s.m, __shfl_xor_sync(kFullWarp, s.m, offset));
        s.w = join(s.w, __shfl_xor_sync(kFullWarp, s.w, offset));
        MGK_UNROLL
        for (int i = 0; i < S::kVector; ++i) s.o[i] = join(s.o[i], __shfl_xor_sync(kFullWarp, s.o[i], offset));
        s.m = join.m;
    }
    float* mine = scratch + threadIdx.x / kWarp * kStride;
    if (lane < S::kLanes) {
        MGK_UNROLL
        for (int i = 0; i < S::kVector; ++i) mine[lane * S::kVector + i] = s.o[i];
        if (lane == 0) mine[D] = s.m;
        if (lane == 0) mine[D + 1] = s.w;
    }
    __syncthreads();
    State<1> total;
    total.clear();
    if (threadIdx.x < D) {
        MGK_UNROLL
        for (int warp = 0; warp < kWarps; ++warp) {
            const float* theirs = scratch + warp * kStride;
            const Decay join(total.m, theirs[D]);
            total.w = join(total.w, theirs[D + 1]);
            total.o[0] = join(total.o[0], theirs[threadIdx.x]);
            total.m = join.m;
        }
    }
    __syncthreads();  // before the scratch is used again
    return total;
}

MGK_DEVICE void merge(State<1>& total, const State<1>& split) {
    const Decay join(total.m, split.m);
    total.w = join(total.w, split.w);
    total.o[0] = join(total.o[0], split.o[0]);
    total.m = join.m;
}

MGK_DEVICE void write_result(const AttentionArguments& a, int64_t token, int head, int dim, const State<1>& s) {
    const int64_t at = (token * a.rows.num_heads + head) * dim + threadIdx.x;
    const float y = s.w == 0 ? 0.0f : s.o[0] / s.w;
    if (a.type == Type::fp32) {
        static_cast<float*>(a.out)[at] = y;
    } else if (a.type == Type::bf16) {
        from_float(y, static_cast<BFloat16*>(a.out)[at]);
    } else {
        from_float(y, static_cast<Half*>(a.out)[at]);
    }
}

// The lane's part of a query, times scale · log2 e.
template <int N>
MGK_DEVICE void load_query(const AttentionArguments& a, int64_t token, int head, int channel, float (&q)[N]) {
    const int64_t at = token * a.token_stride + head * a.head_stride + channel;
    const float factor = a.scale * kLog2E;
    MGK_UNROLL
    for (int i = 0; i < N; ++i) {  // element by element: a view's strides need not be multiples of 16 bytes
        float x;
        if (a.type == Type::fp32) {
            x = static_cast<const float*>(a.query)[at + i];
        } else if (a.type == Type::bf16) {
            x = to_float(static_cast<const BFloat16*>(a.query)[at + i]);
        } else {
            x = to_float(static_cast<const Half*>(a.query)[at + i]);
        }
        q[i] = x * factor;
    }
}

// How many positions the query at `token` sees.
MGK_DEVICE int visible(const AttentionArguments& a, int row, int token) {
    const int len = a.rows.kv_lens[row];
    return a.causal ? len + token + 1 - a.rows.query_offsets[row + 1] : len;
}

template <class KV, int D>
__global__ void __launch_bounds__(kThreads) decode_split(const AttentionArguments a) {
    using S = Shape<KV, D>;
    const int token = blockIdx.x, head = blockIdx.y, split = blockIdx.z;
    const int row = find_row<1, 0>(a.rows.query_offsets, int(a.rows.num_rows), token);
    const int end = visible(a, row, token), start = split * kSplit;
    if (start >= end) return;
    const Pipeline<S::kScaled> pipeline{shared_memory()};
    float q[1][S::kVector];
    load_query(a, token, head, int(threadIdx.x) % S::kLanes * S::kVector, q[0]);
    State<S::kVector> states[1];
    const int limits[1] = {end};
    const int32_t* table = a.rows.page_table + row * a.rows.max_pages;
    attend_split<KV, D>(a, pipeline, table, head, start, end, limits, q, states);
    float* scratch = reinterpret_cast<float*>(pipeline.base + pipeline.kBytes);
    const State<1> total = merge_groups<KV, D>(states[0], scratch);
    const int64_t at = (int64_t(token) * a.rows.num_heads + head) * a.num_splits + split;
    if (threadIdx.x < D) a.sums[at * D + threadIdx.x] = total.o[0];
    if (threadIdx.x == 0) a.states[2 * at] = total.m;
    if (threadIdx.x == 0) a.states[2 * at + 1] = total.w;
}

template <int D>
__global__ void __launch_bounds__(D) merge_splits(const AttentionArguments a) {
    const int token = blockIdx.x, head = blockIdx.y;
    const int row = find_row<1, 0>(a.rows.query_offsets, int(a.rows.num_rows), token);
    const int num_splits = (visible(a, row, token) + kSplit - 1) / kSplit;
    const int64_t base = (int64_t(token) * a.rows.num_heads + head) * a.num_splits;
    State<1> total;
    total.clear();
    for (int split = 0; split < num_splits; ++split) {
        const int64_t at = base + split;
        merge(total, State<1>{a.states[2 * at], a.states[2 * at + 1], {a.sums[at * D + threadIdx.x]}});
    }
    write_result(a, token, head, D, total);
}

template <class KV, int D>
__global__ void __launch_bounds__(kThreads) prefill(const AttentionArguments a) {
    using S = Shape<KV, D>;
    constexpr int kTile = S::kTile;
    const int tile = blockIdx.x, head = blockIdx.y;
    const int row = find_row<kTile, 1>(a.rows.query_offsets, int(a.rows.num_rows), tile);
    const int begin = a.rows.query_offsets[row], finish = a.rows.query_offsets[row + 1];
    const int first = begin + (tile - begin / kTile - row) * kTile;
    if (first >= finish) return;
    const Pipeline<S::kScaled> pipeline{shared_memory()};
    float* scratch = reinterpret_cast<float*>(pipeline.base + pipeline.kBytes);
    const int32_t* table = a.rows.page_table + row * a.rows.max_pages;
    float q[kTile][S::kVector];
    int limits[kTile];
    State<1> totals[kTile];
    MGK_UNROLL
    for (int i = 0; i < kTile; ++i) {
        const int token = min(first + i, finish - 1);  // past the row's last query: that query again, not written
        load_query(a, token, head, int(threadIdx.x) % S::kLanes * S::kVector, q[i]);
        limits[i] = visible(a, row, token);
        totals[i].clear();
    }
    const int end = limits[kTile - 1];
    for (int start = 0; start < end; start += kSplit) {
        State<S::kVector> states[kTile];
        attend_split<KV, D>(a, pipeline, table, head, start, end, limits, q, states);
        MGK_UNROLL
        for (int i = 0; i < kTile; ++i) merge(totals[i], merge_groups<KV, D>(states[i], scratch));
    }
    MGK_UNROLL
    for (int i = 0; i < kTile; ++i) {
        if (threadIdx.x < D && first + i < finish) write_result(a, first + i, head, D, totals[i]);
    }
}

template <class KV, int D>
void run(const AttentionArguments& a, void* stream) {
    using S = Shape<KV, D>;
    const RaggedRows& r = a.rows;
    const size_t shared_bytes = Pipeline<S::kScaled>::kBytes + kThreads / kWarp * (D + 2) * sizeof(float);
    const unsigned heads = unsigned(r.num_heads);
    if (!a.states) {
        const dim3 grid(unsigned(r.num_tokens / S::kTile + r.num_rows), heads);
        return launch("paged_attention", prefill<KV, D>, grid, kThreads, shared_bytes, stream, a);
    }
    const dim3 splits(unsigned(r.num_tokens), heads, unsigned(a.num_splits)), queries(unsigned(r.num_tokens), heads);
    launch("paged_attention", decode_split<KV, D>, splits, kThreads, shared_bytes, stream, a);
    launch("paged_attention", merge_splits<D>, queries, D, 0, stream, a);
}

template <int D>
void run(const AttentionArguments& a, void* stream) {
    if (a.pages.type == Type::int8) return run<int8_t, D>(a, stream);
    with_float_type(a.pages.type, [&](auto kv) { run<decltype(kv), D>(a, stream); });
}

}  // namespace

void paged_attention(const AttentionArguments& a, void* stream) {
    if (a.rows.num_tokens == 0) return;
    switch (a.rows.head_dim) {
        case 32: return run<32>(a, stream);
        case 64: return run<64>(a, stream);
        case 128: return run<128>(a, stream);
        default: throw LaunchError("paged_attention: head_dim is none of 32, 64, 128");
    }
}

}  // namespace cuda
}  // namespace mgk
