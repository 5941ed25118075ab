// A whole step of the transformer in one call: embedding, all layers, final norm and heads, for a ragged batch of rows.
//
// Pre-norm blocks without biases (MusicGen's): LN → self-attention → +, (LN → cross-attention → +,) LN → fc1, GELU, fc2
// → +. The model points at memory that its owner keeps alive; its scratch grows to the largest step seen and stays.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "norm.h"
#include "team.h"

namespace mgk {
namespace MGK_ISA {

struct NormWeights {
    const float* weight;
    const float* bias;
};

struct LayerWeights {
    NormWeights self_norm, cross_norm, ffn_norm;  // cross_norm unused without cross-attention
    PackedMatrix qkv, self_out;                   // [3·dim, dim], [dim, dim]
    PackedMatrix cross_q, cross_kv, cross_out;    // [dim, dim], [2·dim, dim], [dim, dim]; codes null without
    PackedMatrix fc1, fc2;                        // [ffn, dim], [dim, ffn]
};

struct LayeredPages {  // the pages of all layers; strides in bytes between layers
    KVPages first;
    int64_t stride, scale_stride;
    KVPages layer(int64_t index) const;
};

struct StepInput {
    int64_t num_tokens;
    const int32_t* codes;         // [num_tokens, num_codebooks], read where prefix_index is −1
    const int32_t* prefix_index;  // [num_tokens] into prefix, or −1; null: all are codes
    const float* prefix;          // [num_prefix, dim]
    int64_t num_prefix;
    RaggedRows rows;
    LayeredPages pages;
    RaggedRows cross_rows;  // query_offsets as in rows; page_table null without cross-attention
    LayeredPages cross_pages;
    const int32_t* logit_tokens;  // [num_logits], which tokens' logits are wanted
    int64_t num_logits;
    float* logits;  // [num_logits, num_codebooks · num_codes]
};

class Model {
public:
    EmbeddingTables embedding{};
    std::vector<LayerWeights> layers;
    NormWeights final_norm{};
    PackedMatrix heads{};
    int32_t dim = 0, num_heads = 0, ffn_dim = 0;
    float eps = 1e-5f;

    // Throws ArgumentError before anything is written.
    void step(const StepInput& in, int num_threads);
    // Keys and values of the cross-attention for all layers: states are [num_tokens, dim], ragged as `rows` says.
    void write_cross(const float* states, int64_t num_tokens, const RaggedRows& rows, const LayeredPages& pages,
                     int num_threads);

private:
    struct Rows {  // normalised (or mixed) rows, as the next matrix wants them
        float* x;
        QuantisedRows quantised;
    };
    void check(const StepInput& in) const;
    void reserve(int64_t tokens, int num_threads);
    void embed(const StepInput& in, int64_t token);
    Rows normalise(Team& team, int member, int64_t tokens, const NormWeights& norm, bool quantised);
    void project(Team& team, int member, const PackedMatrix& w, const Rows& in, int64_t tokens, float* y, const float* residual, bool gelu,
                 const QuantisedRows* quantised);
    void attend_rows(Team& team, int member, const RaggedRows& rows, const KVPages& pages, const float* q, int64_t stride, bool causal,
                     bool quantised, int64_t num_tokens);
    void run(Team& team, int member, const StepInput& in);
    void layer(Team& team, int member, const StepInput& in, int64_t index);

    std::mutex one_step_;
    int64_t capacity_ = 0;
    int threads_ = 0;
    std::vector<float> hidden_, qkv_;
    struct Buffer {
        std::vector<float> x, scales;
        std::vector<QuantCode> codes;
        std::vector<int32_t> sums;
        void resize(int64_t rows, int64_t width);
        Rows view(int64_t first_row, int64_t width, int64_t rows);
    };
    Buffer normed_, mixed_, wide_;
};

}  // namespace MGK_ISA
}  // namespace mgk
