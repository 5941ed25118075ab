// Attention over pages of 16 positions in the CPU layout (musicgen_kernels.pages describes it).
//
// A query's result is a function of its row's positions alone: splits of 256 positions, in each split all scores, then
// their maximum, then the weighted values, then a merge with what came before. Several queries may share a pass over
// the pages (prefill); each still sees exactly the operations it would see alone.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mgk {
namespace MGK_ISA {

constexpr int kPage = 16;
constexpr int kSplit = 256;
constexpr int kMaxHeadDim = 64;

enum class KVKind : int { fp32 = 0, bf16 = 1, fp16 = 2, int8 = 3 };

struct KVPages {  // one layer
    char* k;
    char* v;
    float* k_scales;  // [num_pages, num_heads, 16], int8 only
    float* v_scales;
    KVKind kind;
    int64_t num_pages;
    int32_t num_heads, head_dim;
    int64_t element_bytes() const { return kind == KVKind::fp32 ? 4 : kind == KVKind::int8 ? 1 : 2; }
    // In bytes from the start of k or v: 64 bits, a store may be larger than 4 GiB.
    int64_t offset(int64_t page, int64_t head) const {
        return (page * num_heads + head) * kPage * head_dim * element_bytes();
    }
};

// Queries of a step: those of row b are query_offsets[b] … query_offsets[b+1]−1, the last of its kv_lens[b] positions.
struct RaggedRows {
    const int32_t* page_table;  // [num_rows, max_pages]
    const int32_t* query_offsets;
    const int32_t* kv_lens;
    int64_t num_rows, max_pages;
    const int32_t* table(int64_t row) const { return page_table + row * max_pages; }
    int64_t num_queries(int64_t row) const { return query_offsets[row + 1] - query_offsets[row]; }
};

// Throws ArgumentError if an offset, length or page is out of range. causal: a row's queries are its last positions.
void check_rows(const RaggedRows& rows, int64_t num_queries, int64_t num_pages, bool causal);

// One head of one position: k and v are head_dim floats.
void append_position(const KVPages& pages, const int32_t* table, int64_t position, int64_t head, const float* k,
                     const float* v);

// Queries of one row for some heads that lie side by side.
struct AttendItem {
    const int32_t* table;
    int64_t head, num_heads;
    int64_t first_len, count;  // query i sees first_len + i positions (causal) or first_len (not)
    bool causal;
    const float* q;  // of the first query and head
    int64_t q_stride, q_head_stride;
    float* out;
    int64_t out_stride;
};
void attend(const KVPages& pages, const AttendItem& item, float scale);

// How many heads to give to one item, so that every thread still gets several.
int64_t heads_per_item(int64_t num_rows, int64_t num_heads, int num_threads);

void append_paged_kv(const KVPages& pages, const RaggedRows& rows, const float* k, const float* v, int64_t k_stride,
                     int64_t k_head_stride, int64_t v_stride, int64_t v_head_stride, int num_threads);
void paged_attention(const KVPages& pages, const RaggedRows& rows, bool causal, const float* q, int64_t q_stride,
                     int64_t q_head_stride, float scale, float* out, int num_threads);

}  // namespace MGK_ISA
}  // namespace mgk
