// y = residual + act(x Wᵀ + bias) with packed weights in "tiles" order (musicgen_kernels.packing describes it).
//
// One item is two tiles of 16 output rows. For any thread and any number of rows of x, every output is one chain of
// operations over K in ascending order, which makes a row's result independent of the rows around it.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mgk {
namespace MGK_ISA {

enum class WeightKind : int { fp32 = 0, bf16 = 1, int8 = 2, int4 = 3 };

constexpr int kTile = 16;       // output rows side by side
constexpr int kQuantBlock = 32; // inputs that share a scale of x, for int8 and int4 weights

struct PackedMatrix {
    const uint8_t* codes;
    const uint16_t* scales;  // bf16 [n/16, k/group, 16]
    WeightKind kind;
    int32_t n, k, group;
    bool quantised() const { return kind == WeightKind::int8 || kind == WeightKind::int4; }
};

// Rows of x rounded to 8 bits in blocks of 32. Baseline: 16-bit codes, because it multiplies 16-bit pairs.
#if defined(MGK_LEVEL_BASELINE)
using QuantCode = int16_t;
#else
using QuantCode = int8_t;
#endif
// A group of rows (2, 4 or 8, as many as there are) is interleaved four inputs at a time, so that the inner loop finds
// them side by side and a decode step's two rows stay small enough for the first-level cache.
constexpr int kRowGroup = 8;
struct QuantisedRows {
    QuantCode* codes;  // [rows/group, k/4, group, 4]
    float* scales;     // [rows/group, k/32, group]
    int32_t* negative_sums;  // [rows/group, k/32, group], minus the sum of a block's codes: an offset is then one shift
    int64_t k;
    int32_t group;
    int64_t code_at(int64_t row, int64_t input) const {
        return row / group * group * k + input * group + row % group * 4;  // input a multiple of 4
    }
    int64_t block_at(int64_t row, int64_t block) const {
        return (row / group * (k / kQuantBlock) + block) * group + row % group;
    }
    static int32_t group_of(int64_t rows) { return rows <= 2 ? 2 : rows <= 4 ? 4 : kRowGroup; }
    static int64_t padded(int64_t rows) { return (rows + kRowGroup - 1) / kRowGroup * kRowGroup; }
};

struct LinearInput {
    const float* x;  // [rows, ...], for fp32 and bf16 weights
    int64_t stride;  // elements between rows
    QuantisedRows quantised;
};

struct LinearOutput {
    float* y;
    const float* bias;      // [n] or null
    const float* residual;  // like y, or null; may be y
    int64_t y_stride, residual_stride;
    bool gelu;
    const QuantisedRows* quantised;  // null, or where the result is also stored rounded to 8 bits (n a multiple of 32)
};

int64_t linear_items(const PackedMatrix& w);
// x points at the block's 32 elements.
void quantise_block(const float* x, const QuantisedRows& out, int64_t row, int64_t block);
void quantise_row(const float* x, const QuantisedRows& out, int64_t row);
void linear_item(const PackedMatrix& w, const LinearInput& in, const LinearOutput& out, int64_t rows, int64_t item);

// The whole operation on [rows, k] → [rows, n], with threads and memory of its own.
void linear(const PackedMatrix& w, const float* x, const LinearOutput& out, int64_t rows, int num_threads);

}  // namespace MGK_ISA
}  // namespace mgk
