// Layer normalisation and the input embedding, one row at a time.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mgk {
namespace MGK_ISA {

// dim is any positive number.
void layer_norm_row(const float* x, const float* weight, const float* bias, float eps, int64_t dim, float* y);

enum class TableKind : int { fp32 = 0, bf16 = 1, fp16 = 2 };

struct EmbeddingTables {
    const char* tables;      // [num_codebooks, num_codes + 1, dim]
    const float* sinusoids;  // [max_positions, dim]
    TableKind kind;
    int32_t num_codebooks, num_codes;
    int64_t dim, max_positions;
};

void embed_row(const EmbeddingTables& e, const int32_t* codes, int64_t position, float* y);

void layer_norm(const float* x, const float* weight, const float* bias, float* residual, float eps, int64_t rows,
                int64_t dim, float* y, int num_threads);
void embed_codes(const EmbeddingTables& e, const int32_t* codes, const int32_t* positions, int64_t rows, float* y,
                 int num_threads);

}  // namespace MGK_ISA
}  // namespace mgk
