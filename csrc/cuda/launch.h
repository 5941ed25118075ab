// The CUDA operations: plain pointers and sizes in, work on a stream out. musicgen_kernels says what each computes.
//
// Every launcher only enqueues kernels: no synchronisation, no allocation, so a CUDA graph can capture it. Shapes have
// been checked in Python; valid values (pages, lengths, codes) are up to the caller. A failed launch throws LaunchError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mgk {
namespace cuda {

struct LaunchError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Type : int64_t { fp32 = 0, bf16 = 1, fp16 = 2, int8 = 3 };
enum class WeightKind : int64_t { fp32 = 0, bf16 = 1, int8 = 2, int4 = 3 };

constexpr int kPage = 16;    // positions a page
constexpr int kSplit = 256;  // positions a split

struct Pages {  // one layer, [num_pages, num_heads, 16, head_dim]
    void* k;
    void* v;
    float* k_scales;  // [num_pages, num_heads, 16], int8 only
    float* v_scales;
    Type type;
};

struct RaggedRows {  // tokens of row b: query_offsets[b] … query_offsets[b + 1] − 1, the last of its kv_lens[b]
    const int32_t* page_table;  // [num_rows, max_pages]
    const int32_t* query_offsets;
    const int32_t* kv_lens;
    int64_t num_rows, max_pages, num_tokens, num_heads, head_dim;
};

struct AppendArguments {
    const void* keys;  // [num_tokens, num_heads, head_dim], strides in elements, last axis contiguous
    const void* values;
    Pages pages;
    RaggedRows rows;
    Type type;
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
};
void append_paged_kv(const AppendArguments& arguments, void* stream);

struct AttentionArguments {
    const void* query;  // as keys
    void* out;          // [num_tokens, num_heads, head_dim], of the query's type
    float* states;      // [num_tokens, num_heads, num_splits, 2], or null: splits one after another in one kernel
    float* sums;        // [num_tokens, num_heads, num_splits, head_dim]
    Pages pages;
    RaggedRows rows;
    Type type;
    int64_t token_stride, head_stride, num_splits;
    bool causal;
    float scale;
};
void paged_attention(const AttentionArguments& arguments, void* stream);

struct SampleArguments {
    const float* logits;         // [num_rows, num_codebooks, num_codes]
    const int32_t* row_offsets;  // [num_requests + 1]
    const int32_t* slots;        // [num_requests], and so on
    const int32_t* steps;
    const int32_t* num_frames;
    const int64_t* seeds;
    const float* guidance;
    const float* guidance_beta;
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const int32_t* delays;  // [num_codebooks]
    int32_t* sequences;     // [num_slots, num_codebooks, max_steps]
    int32_t* out;           // [num_requests, num_codebooks]
    int64_t num_requests, num_codebooks, num_codes, max_steps;
};
void delayed_sample_step(const SampleArguments& arguments, void* stream);

struct LayerNormArguments {
    const void* x;  // [num_rows, dim]
    const float* weight;
    const float* bias;
    float* residual;  // [num_rows, dim] or null; mutated
    void* out;        // of out_type
    int64_t num_rows, dim;
    Type type, out_type;
    float eps;
};
void layer_norm(const LayerNormArguments& arguments, void* stream);

struct EmbedArguments {
    const int32_t* codes;      // [num_tokens, num_codebooks]
    const void* tables;        // [num_codebooks, num_entries, dim]
    const int32_t* positions;  // [num_tokens]
    const float* sinusoids;    // [any, dim]
    float* out;                // [num_tokens, dim]
    int64_t num_tokens, num_codebooks, num_entries, dim;
    Type type;
};
void embed_codes(const EmbedArguments& arguments, void* stream);

struct LinearArguments {
    const void* x;         // [num_rows, in_features]
    const void* codes;     // [out_features, in_features] in "rows" order (musicgen_kernels.packing)
    const uint16_t* scales;  // [out_features, in_features / group_len] bfloat16, or null
    const float* bias;     // [out_features] or null
    const void* residual;  // [num_rows, out_features] of out_type, or null
    void* out;             // [num_rows, out_features] of out_type
    int64_t num_rows, out_features, in_features, group_len;
    Type type, out_type;
    WeightKind kind;
    bool gelu;
};
void linear(const LinearArguments& arguments, void* stream);

}  // namespace cuda
}  // namespace mgk
