// Paged attention on the CPU. Lanes are positions for the scores (keys are stored transposed, so that a score needs no sum
// across lanes) and head elements for the values.
//
// int8 pages stay integers: the query is rounded to 15 bits once, a page's scores are exact sums of 16-bit pairs; the
// weights times the values' scales are rounded to 15 bits of the split's largest, and their sums are exact again.
//
// A single query is bound by memory: several pages are read side by side, line by line, because pages lie anywhere and
// one core's outstanding misses do not fill the bandwidth with a single run of a few KB (measured with 16 KB runs in
// random order: 12 GB/s for one at a time, 18 for four, 24 for four with prefetches; 31 for reading in order). int8 pages
// add up in integers, in whatever order, so more of them fit the registers of AVX2 than of floats.
#include "attention.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <string>

#include "error.h"
#include "team.h"
#include "vector_math.h"

namespace mgk {
namespace MGK_ISA {

namespace {

#if defined(MGK_LEVEL_AVX512)
constexpr int kChains = 4, kQueries = 4, kValueLanes = 64, kStreams = 4, kInt8Streams = 4;
#elif defined(MGK_LEVEL_AVX2)
constexpr int kChains = 2, kQueries = 2, kValueLanes = 32, kStreams = 2, kInt8Streams = 4;
#else
constexpr int kChains = 2, kQueries = 2, kValueLanes = 16, kStreams = 1, kInt8Streams = 1;
#endif
constexpr int kMaxGroup = 8;  // heads that one walk over the pages serves
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kQuant = 32767.0f;

template <KVKind kind> struct Element { using type = uint16_t; };
template <> struct Element<KVKind::fp32> { using type = float; };
template <> struct Element<KVKind::int8> { using type = int8_t; };

template <KVKind kind> MGK_INLINE F16 load_element(const typename Element<kind>::type* p) {
    if constexpr (kind == KVKind::fp32) return load(p);
    else if constexpr (kind == KVKind::bf16) return load_bf16(p);
    else return load_fp16(p);
}

// Into the second-level cache: the first level is too small for what is fetched (measured 24 instead of 16 GB/s on two
// threads).
MGK_INLINE void prefetch_line(const char* next, int64_t offset) {
    if (offset % 64 == 0) _mm_prefetch(next + offset, _MM_HINT_T1);
}

template <KVKind kind, int dim, int queries> struct Pass {
    using T = typename Element<kind>::type;
    static constexpr int64_t page_bytes = int64_t(kPage) * dim * sizeof(T);
    static constexpr bool quantised = kind == KVKind::int8;
    static constexpr int streams = quantised ? kInt8Streams : kStreams;  // pages that a single query reads side by side

    const KVPages& pages;
    const int32_t* table;
    int64_t head;
    int64_t lens[queries];
    alignas(64) float query[queries][dim];          // times scale · log2 e
    alignas(64) int16_t query_codes[queries][dim];  // int8 pages: the same, rounded
    float query_scale[queries];
    alignas(64) float score[queries][kSplit];
    alignas(64) float value[queries][dim];
    alignas(64) float parts[quantised ? 1 : kStreams][queries][dim];  // of one split: page n adds to part n mod kStreams
    alignas(64) int16_t weight_codes[quantised ? queries : 1][kSplit];  // int8 values: weight · scale
    alignas(64) int32_t sums[quantised ? queries : 1][dim];
    float unit[queries];
    F16 mass[queries];
    float largest[queries];

    Pass(const KVPages& pages_, const int32_t* table_, int64_t head_) : pages(pages_), table(table_), head(head_) {}

    const T* keys(int64_t page) const { return reinterpret_cast<const T*>(pages.k + pages.offset(table[page], head)); }
    const T* values(int64_t page) const { return reinterpret_cast<const T*>(pages.v + pages.offset(table[page], head)); }
    int64_t scale_offset(int64_t page) const { return (table[page] * int64_t(pages.num_heads) + head) * kPage; }

    void start(const float* q, int64_t stride, float scale) {
        for (int i = 0; i < queries; ++i) {
            F16 top = zero();
            for (int d = 0; d < dim; d += kLanes) {
                const F16 x = load(q + i * stride + d) * set1(scale * kLog2E);
                store(&query[i][d], x);
                store(&value[i][d], zero());
                top = max(top, abs(x));
            }
            mass[i] = zero();
            largest[i] = -kInfinity;
            if constexpr (quantised) {
                const float peak = max_lanes(top);
                const F16 inverse = set1(peak > 0.0f ? kQuant / peak : 0.0f);
                query_scale[i] = peak / kQuant;
                for (int d = 0; d < dim; d += kLanes)
                    store_int16(&query_codes[i][d], round_to_int(load(&query[i][d]) * inverse));
            }
        }
    }

    // Scores of `num` pages from `page` on, in units of log2; `next` is what is fetched meanwhile, of each page one.
    template <int num> MGK_INLINE void score_pages(int64_t page, int64_t in_split, const char* const* next) {
        const T* k[num];
        for (int s = 0; s < num; ++s) k[s] = keys(page + s);
        if constexpr (quantised) {
            I16 sum[num][queries];
            for (int s = 0; s < num; ++s)
                for (int i = 0; i < queries; ++i) sum[s][i] = int_zero();
            for (int pair = 0; pair < dim / 2; ++pair)
                for (int s = 0; s < num; ++s) {
                    prefetch_line(next[s], pair * 32);
                    const I16 key = widen_bytes(k[s] + pair * 32);
                    for (int i = 0; i < queries; ++i)
                        sum[s][i] = dot_pairs(key, set1_pair(&query_codes[i][2 * pair]), sum[s][i]);
                }
            for (int s = 0; s < num; ++s) {
                const F16 scales = load(pages.k_scales + scale_offset(page + s));
                _mm_prefetch(reinterpret_cast<const char*>(pages.v_scales + scale_offset(page + s)), _MM_HINT_T0);
                for (int i = 0; i < queries; ++i)
                    store(&score[i][(in_split + s) * kPage], to_float(sum[s][i]) * (scales * set1(query_scale[i])));
            }
        } else {
            F16 sum[num][queries][kChains];
            for (int s = 0; s < num; ++s)
                for (int i = 0; i < queries; ++i)
                    for (int c = 0; c < kChains; ++c) sum[s][i][c] = zero();
            for (int d = 0; d < dim; d += kChains)
                for (int s = 0; s < num; ++s)
                    for (int c = 0; c < kChains; ++c) {
                        prefetch_line(next[s], (d + c) * kPage * int64_t(sizeof(T)));
                        const F16 key = load_element<kind>(k[s] + (d + c) * kPage);
                        for (int i = 0; i < queries; ++i) sum[s][i][c] = fma(key, set1(query[i][d + c]), sum[s][i][c]);
                    }
            for (int s = 0; s < num; ++s)
                for (int i = 0; i < queries; ++i) {
                    F16 total = sum[s][i][0] + sum[s][i][1];
                    if constexpr (kChains == 4) total = total + (sum[s][i][2] + sum[s][i][3]);
                    store(&score[i][(in_split + s) * kPage], total);
                }
        }
    }

    // Scores to weights 2^(score − largest), for int8 values times their scales and in codes; rescales what was gathered
    // before. `first` is the split's first position.
    void weigh(int i, int64_t first, int64_t num_pages) {
        F16 top = set1(largest[i]);
        for (int64_t page = 0; page < num_pages; ++page) {
            const int64_t valid = lens[i] - first - page * kPage;
            F16 s = load(&score[i][page * kPage]);
            if (valid < kPage) {
                s = first_lanes(valid < 0 ? 0 : int(valid), s, set1(-kInfinity));
                store(&score[i][page * kPage], s);
            }
            top = max(top, s);
        }
        const float peak = max_lanes(top);
        const F16 shift = set1(peak), rescale = exp2(set1(largest[i] - peak));
        largest[i] = peak;
        mass[i] = mass[i] * rescale;
        for (int d = 0; d < dim; d += kLanes) store(&value[i][d], load(&value[i][d]) * rescale);
        F16 top_weight = zero();
        for (int64_t page = 0; page < num_pages; ++page) {
            F16 weight = exp2(load(&score[i][page * kPage]) - shift);
            mass[i] = mass[i] + weight;
            if constexpr (quantised) {
                const int64_t valid = lens[i] - first - page * kPage;
                weight = weight * load(pages.v_scales + scale_offset(first / kPage + page));
                if (valid < kPage) weight = first_lanes(valid < 0 ? 0 : int(valid), weight, zero());
                top_weight = max(top_weight, weight);
            }
            store(&score[i][page * kPage], weight);
        }
        if constexpr (quantised) weights_to_codes(i, max_lanes(top_weight), num_pages);
    }

    // Weights · scales as 15-bit codes of the split's largest, `peak`.
    void weights_to_codes(int i, float peak, int64_t num_pages) {
        const F16 inverse = set1(peak > 0.0f ? kQuant / peak : 0.0f);
        unit[i] = peak / kQuant;
        for (int64_t page = 0; page < num_pages; ++page)
            store_int16(&weight_codes[i][page * kPage], round_to_int(load(&score[i][page * kPage]) * inverse));
    }

    void start_values() {
        for (int i = 0; i < queries; ++i)
            for (int d = 0; d < dim; d += kLanes) {
                if constexpr (quantised) int_store(&sums[i][d], int_zero());
                else
                    for (int s = 0; s < kStreams; ++s) store(&parts[s][i][d], zero());
            }
    }

    // Weighted values of the first `count` positions of `num` pages; kValueLanes head elements at a time.
    template <int num> MGK_INLINE void add_pages(int64_t page, int64_t in_split, int count, const char* const* next) {
        constexpr int lanes = kValueLanes < dim ? kValueLanes : dim, vectors = lanes / kLanes;
        float (*to)[queries][dim] = &parts[in_split % kStreams];
        const T* v[num];
        for (int s = 0; s < num; ++s) v[s] = values(page + s);
        for (int part = 0; part < dim; part += lanes) {
            F16 sum[num][queries][vectors];
            for (int s = 0; s < num; ++s)
                for (int i = 0; i < queries; ++i)
                    for (int c = 0; c < vectors; ++c) sum[s][i][c] = load(&to[s][i][part + c * kLanes]);
            for (int p = 0; p < count; ++p)
                for (int s = 0; s < num; ++s) {
                    for (int64_t line = 0; line < int64_t(lanes * sizeof(T)); line += 64)
                        prefetch_line(next[s], (p * dim + part) * int64_t(sizeof(T)) + line);
                    F16 row[vectors];
                    for (int c = 0; c < vectors; ++c) row[c] = load_element<kind>(v[s] + p * dim + part + c * kLanes);
                    for (int i = 0; i < queries; ++i) {
                        const F16 weight = set1(score[i][(in_split + s) * kPage + p]);
                        for (int c = 0; c < vectors; ++c) sum[s][i][c] = fma(row[c], weight, sum[s][i][c]);
                    }
                }
            for (int s = 0; s < num; ++s)
                for (int i = 0; i < queries; ++i)
                    for (int c = 0; c < vectors; ++c) store(&to[s][i][part + c * kLanes], sum[s][i][c]);
        }
    }

    template <int num> MGK_INLINE void add_int8_pages(int64_t page, int64_t in_split, const char* const* next) {
        constexpr int lanes = kValueLanes < dim ? kValueLanes : dim, vectors = lanes / kLanes;
        const int8_t* v[num];
        for (int s = 0; s < num; ++s) v[s] = reinterpret_cast<const int8_t*>(values(page + s));
        for (int part = 0; part < dim; part += lanes) {
            I16 sum[queries][vectors];
            for (int i = 0; i < queries; ++i)
                for (int c = 0; c < vectors; ++c) sum[i][c] = int_load(&sums[i][part + c * kLanes]);
            for (int p = 0; p < kPage; p += 2)
                for (int s = 0; s < num; ++s) {
                    for (int64_t line = 0; line < lanes * 2; line += 64) prefetch_line(next[s], p * dim + part * 2 + line);
                    I16 row[vectors];
                    for (int c = 0; c < vectors; ++c) row[c] = widen_bytes(v[s] + p * dim + (part + c * kLanes) * 2);
                    for (int i = 0; i < queries; ++i) {
                        const I16 weight = set1_pair(&weight_codes[i][(in_split + s) * kPage + p]);
                        for (int c = 0; c < vectors; ++c) sum[i][c] = dot_pairs(row[c], weight, sum[i][c]);
                    }
                }
            for (int i = 0; i < queries; ++i)
                for (int c = 0; c < vectors; ++c) int_store(&sums[i][part + c * kLanes], sum[i][c]);
        }
    }

    void end_values() {
        for (int i = 0; i < queries; ++i)
            for (int d = 0; d < dim; d += kLanes) {
                F16 total = load(&value[i][d]);
                if constexpr (quantised) {
                    total = fma(to_float(int_load(&sums[i][d])), set1(unit[i]), total);
                } else {
                    F16 sum = load(&parts[0][i][d]);
                    for (int s = 1; s < kStreams; ++s) sum = sum + load(&parts[s][i][d]);
                    total = total + sum;
                }
                store(&value[i][d], total);
            }
    }

    void finish(float* out, int64_t out_stride) const {
        for (int i = 0; i < queries; ++i) {
            const F16 total = set1(sum_lanes(mass[i]));
            for (int d = 0; d < dim; d += kLanes)
                store(out + i * out_stride + d, lens[i] == 0 ? zero() : load(&value[i][d]) / total);
        }
    }
};

// `groups` heads that lie side by side in every page, for the same queries; their pages are walked together, so that
// memory is read in longer runs.
template <KVKind kind, int dim, int queries> struct HeadGroup {
    using P = Pass<kind, dim, queries>;
    alignas(P) char memory[kMaxGroup][sizeof(P)];
    int groups;
    int64_t first_page, end_page;  // of the split
    int64_t all_pages;

    P& pass(int64_t g) { return *reinterpret_cast<P*>(memory[g]); }

    // What comes `streams` pages later in the walk over a split's keys, its values and the next split's keys.
    MGK_INLINE const char* ahead(P& p, int64_t page, bool is_keys) {
        int64_t later = page + P::streams;
        if (is_keys && later >= end_page) {
            later -= end_page - first_page;
            return reinterpret_cast<const char*>(p.values(later < end_page ? later : end_page - 1));
        }
        if (is_keys ? later < end_page : later >= end_page && later < all_pages) {
            if constexpr (P::quantised)
                _mm_prefetch(reinterpret_cast<const char*>(p.pages.k_scales + p.scale_offset(later)), _MM_HINT_T0);
            return reinterpret_cast<const char*>(p.keys(later));
        }
        return reinterpret_cast<const char*>(p.values(later < end_page ? later : page));
    }

    // Keys or values of `num` pages for all heads; `valid` positions of the split are in use.
    template <int num> MGK_INLINE void step(int64_t page, bool is_keys, int64_t valid) {
        const int64_t in_split = page - first_page, left = valid - in_split * kPage;
        for (int g = 0; g < groups; ++g) {
            const char* next[num];
            for (int s = 0; s < num; ++s) next[s] = ahead(pass(g), page + s, is_keys);
            if (is_keys) pass(g).template score_pages<num>(page, in_split, next);
            else if constexpr (P::quantised) pass(g).template add_int8_pages<num>(page, in_split, next);
            else pass(g).template add_pages<num>(page, in_split, int(left < kPage ? left : kPage), next);
        }
    }

    // A single query is memory-bound and takes several whole pages at once; many are bound by arithmetic and registers.
    void walk(bool is_keys, int64_t valid) {
        int64_t page = first_page;
        if constexpr (queries == 1)
            for (; (page - first_page + P::streams) * kPage <= valid; page += P::streams)
                step<P::streams>(page, is_keys, valid);
        for (; page < end_page; ++page) step<1>(page, is_keys, valid);
    }

    void run(const KVPages& pages, const int32_t* table, int64_t head, const int64_t (&lens)[queries], const float* q,
             int64_t q_stride, float scale, float* out, int64_t out_stride) {
        int64_t longest = 0;
        for (int64_t length : lens) longest = length > longest ? length : longest;
        all_pages = (longest + kPage - 1) / kPage;
        for (int g = 0; g < groups; ++g) {
            P* p = new (memory[g]) P(pages, table, head + g);
            for (int i = 0; i < queries; ++i) p->lens[i] = lens[i];
            p->start(q + g * dim, q_stride, scale);
        }
        for (int64_t first = 0; first < longest; first += kSplit) {
            const int64_t valid = longest - first < kSplit ? longest - first : kSplit;
            first_page = first / kPage;
            end_page = first_page + (valid + kPage - 1) / kPage;
            walk(true, valid);
            for (int g = 0; g < groups; ++g) {
                for (int i = 0; i < queries; ++i) pass(g).weigh(i, first, end_page - first_page);
                pass(g).start_values();
            }
            walk(false, valid);
            for (int g = 0; g < groups; ++g) pass(g).end_values();
        }
        for (int g = 0; g < groups; ++g) pass(g).finish(out + g * dim, out_stride);
    }
};

template <KVKind kind, int dim>
void attend_kind(const KVPages& pages, const AttendItem& item, float scale) {
    auto run = [&](auto& group, int64_t done, int64_t head, auto& lens) {
        for (int64_t& length : lens) length = item.first_len + (item.causal ? done + (&length - lens) : 0);
        group.run(pages, item.table, head, lens, item.q + done * item.q_stride + (head - item.head) * item.q_head_stride,
                  item.q_stride, scale, item.out + done * item.out_stride + (head - item.head) * dim, item.out_stride);
    };
    int64_t done = 0;
    for (; done + kQueries <= item.count; done += kQueries) {  // many queries: compute-bound, one head at a time
        HeadGroup<kind, dim, kQueries> group;
        group.groups = 1;
        int64_t lens[kQueries];
        for (int64_t g = 0; g < item.num_heads; ++g) run(group, done, item.head + g, lens);
    }
    for (; done < item.count; ++done) {
        HeadGroup<kind, dim, 1> group;
        int64_t lens[1];
        const bool together = item.q_head_stride == dim;
        for (int64_t g = 0; g < item.num_heads; g += group.groups) {
            const int64_t left = item.num_heads - g;
            group.groups = together ? int(left < kMaxGroup ? left : kMaxGroup) : 1;
            run(group, done, item.head + g, lens);
        }
    }
}

template <int dim> void attend_dim(const KVPages& pages, const AttendItem& item, float scale) {
    switch (pages.kind) {
        case KVKind::fp32: return attend_kind<KVKind::fp32, dim>(pages, item, scale);
        case KVKind::bf16: return attend_kind<KVKind::bf16, dim>(pages, item, scale);
        case KVKind::fp16: return attend_kind<KVKind::fp16, dim>(pages, item, scale);
        case KVKind::int8: return attend_kind<KVKind::int8, dim>(pages, item, scale);
    }
}

float quantise_head(const float* x, int dim, int8_t* codes) {
    float top = 0.0f;
    for (int d = 0; d < dim; ++d) top = std::fmax(top, std::fabs(x[d]));
    const float scale = top / 127.0f, divisor = scale == 0.0f ? 1.0f : scale;
    for (int d = 0; d < dim; ++d) codes[d] = int8_t(std::nearbyintf(x[d] / divisor));
    return scale;
}

void append_int8(const KVPages& pages, int64_t page, int64_t slot, int64_t head, const float* k, const float* v) {
    const int dim = pages.head_dim;
    int8_t codes[kMaxHeadDim];
    const int64_t scale = (page * pages.num_heads + head) * kPage + slot;
    int8_t* key = reinterpret_cast<int8_t*>(pages.k + pages.offset(page, head));
    pages.k_scales[scale] = quantise_head(k, dim, codes);
    for (int d = 0; d < dim; ++d) key[(d / 2 * kPage + slot) * 2 + d % 2] = codes[d];
    int8_t* value = reinterpret_cast<int8_t*>(pages.v + pages.offset(page, head)) + slot / 2 * dim * 2 + slot % 2;
    pages.v_scales[scale] = quantise_head(v, dim, codes);
    for (int d = 0; d < dim; ++d) value[d * 2] = codes[d];
}

template <class T, class Convert>
void append_float(const KVPages& pages, int64_t page, int64_t slot, int64_t head, const float* k, const float* v,
                  Convert convert) {
    const int dim = pages.head_dim;
    T* key = reinterpret_cast<T*>(pages.k + pages.offset(page, head)) + slot;
    T* value = reinterpret_cast<T*>(pages.v + pages.offset(page, head)) + slot * dim;
    for (int d = 0; d < dim; ++d) key[d * kPage] = convert(k[d]);
    for (int d = 0; d < dim; ++d) value[d] = convert(v[d]);
}

}  // namespace

void check_rows(const RaggedRows& rows, int64_t num_queries, int64_t num_pages, bool causal) {
    check_range("query_offsets", 0, rows.query_offsets[0], 0, 1);
    for (int64_t b = 0; b < rows.num_rows; ++b) {
        const int64_t begin = rows.query_offsets[b], end = rows.query_offsets[b + 1], length = rows.kv_lens[b];
        check_range("query_offsets", b + 1, end, begin, num_queries + 1);
        if (begin == end) continue;
        check_range("kv_lens", b, length, causal ? end - begin : 0, rows.max_pages * kPage + 1);
        for (int64_t page = 0; page * kPage < length; ++page)
            check_range("page_table", b * rows.max_pages + page, rows.table(b)[page], 0, num_pages);
    }
    check_range("query_offsets", rows.num_rows, rows.query_offsets[rows.num_rows], num_queries, num_queries + 1);
}

void append_position(const KVPages& pages, const int32_t* table, int64_t position, int64_t head, const float* k,
                     const float* v) {
    const int64_t page = table[position / kPage], slot = position % kPage;
    switch (pages.kind) {
        case KVKind::fp32: return append_float<float>(pages, page, slot, head, k, v, [](float x) { return x; });
        case KVKind::bf16: return append_float<uint16_t>(pages, page, slot, head, k, v, to_bf16);
        case KVKind::fp16: return append_float<uint16_t>(pages, page, slot, head, k, v, to_fp16);
        case KVKind::int8: return append_int8(pages, page, slot, head, k, v);
    }
}

void attend(const KVPages& pages, const AttendItem& item, float scale) {
    if (pages.head_dim == 32) return attend_dim<32>(pages, item, scale);
    return attend_dim<64>(pages, item, scale);
}

int64_t heads_per_item(int64_t num_rows, int64_t num_heads, int num_threads) {
    int64_t heads = kMaxGroup;
    while (heads > 1 && (num_heads % heads != 0 || num_rows * (num_heads / heads) < 2 * num_threads)) heads /= 2;
    return heads;
}

void append_paged_kv(const KVPages& pages, const RaggedRows& rows, const float* k, const float* v, int64_t k_stride,
                     int64_t k_head_stride, int64_t v_stride, int64_t v_head_stride, int num_threads) {
    const int64_t heads = pages.num_heads;
    parallel(num_threads, [&](Team& team, int member) {
        team.for_each(member, rows.num_rows * heads, [&](int64_t item) {
            const int64_t b = item / heads, head = item % heads, count = rows.num_queries(b);
            for (int64_t j = 0; j < count; ++j) {
                const int64_t token = rows.query_offsets[b] + j;
                append_position(pages, rows.table(b), rows.kv_lens[b] - count + j, head,
                                k + token * k_stride + head * k_head_stride, v + token * v_stride + head * v_head_stride);
            }
        });
    });
}

void paged_attention(const KVPages& pages, const RaggedRows& rows, bool causal, const float* q, int64_t q_stride,
                     int64_t q_head_stride, float scale, float* out, int num_threads) {
    const int64_t heads = pages.num_heads, dim = pages.head_dim;
    if (dim != 32 && dim != 64) throw ArgumentError("head_dim", "32 or 64", std::to_string(dim));
    const int64_t together = heads_per_item(rows.num_rows, heads, num_threads), groups = heads / together;
    parallel(num_threads, [&](Team& team, int member) {
        team.for_each(member, rows.num_rows * groups, [&](int64_t i) {
            const int64_t b = i / groups, head = i % groups * together, count = rows.num_queries(b);
            if (count == 0) return;
            const int64_t first = rows.query_offsets[b], length = rows.kv_lens[b];
            attend(pages,
                   {rows.table(b), head, together, causal ? length - count + 1 : length, count, causal,
                    q + first * q_stride + head * q_head_stride, q_stride, q_head_stride, out + (first * heads + head) * dim,
                    heads * dim},
                   scale);
        });
    });
}

}  // namespace MGK_ISA
}  // namespace mgk
