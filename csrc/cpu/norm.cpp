// Layer normalisation (mean first, then the variance around it) and the input embedding.
#include "norm.h"

#include <cmath>

#include "error.h"
#include "team.h"

namespace mgk {
namespace MGK_ISA {

namespace {

constexpr int64_t kSmall = 65536;  // elements below which one thread is faster

template <class Term> float sum_over(int64_t dim, Term term) {
    F16 sums[2] = {zero(), zero()};
    int64_t i = 0;
    for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
        sums[0] = sums[0] + term(i);
        sums[1] = sums[1] + term(i + kLanes);
    }
    for (; i + kLanes <= dim; i += kLanes) sums[0] = sums[0] + term(i);
    return sum_lanes(sums[0] + sums[1]);
}

}  // namespace

void layer_norm_row(const float* x, const float* weight, const float* bias, float eps, int64_t dim, float* y) {
    const int64_t even = dim / kLanes * kLanes;
    float sum = sum_over(even, [&](int64_t i) { return load(x + i); });
    for (int64_t i = even; i < dim; ++i) sum += x[i];
    const float mean = sum / float(dim);
    const F16 centre = set1(mean);
    float squares = sum_over(even, [&](int64_t i) {
        const F16 d = load(x + i) - centre;
        return d * d;
    });
    for (int64_t i = even; i < dim; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / float(dim) + eps);
    const F16 scales = set1(scale);
    for (int64_t i = 0; i < even; i += kLanes)
        store(y + i, (load(x + i) - centre) * scales * load(weight + i) + load(bias + i));
    for (int64_t i = even; i < dim; ++i) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

void embed_row(const EmbeddingTables& e, const int32_t* codes, int64_t position, float* y) {
    const float* sinusoid = e.sinusoids + position * e.dim;
    const int64_t table_size = (int64_t(e.num_codes) + 1) * e.dim, even = e.dim / kLanes * kLanes;
    auto add_up = [&](auto element, auto vector) {
        for (int64_t i = 0; i < even; i += kLanes) {
            F16 sum = vector(codes[0] * e.dim + i);
            for (int32_t k = 1; k < e.num_codebooks; ++k) sum = sum + vector(k * table_size + codes[k] * e.dim + i);
            store(y + i, sum + load(sinusoid + i));
        }
        for (int64_t i = even; i < e.dim; ++i) {
            float sum = element(codes[0] * e.dim + i);
            for (int32_t k = 1; k < e.num_codebooks; ++k) sum += element(k * table_size + codes[k] * e.dim + i);
            y[i] = sum + sinusoid[i];
        }
    };
    const float* wide = reinterpret_cast<const float*>(e.tables);
    const uint16_t* narrow = reinterpret_cast<const uint16_t*>(e.tables);
    auto fp16_element = [&](int64_t i) {
        alignas(64) uint16_t half[kLanes] = {narrow[i]};
        alignas(64) float value[kLanes];
        store(value, load_fp16(half));
        return value[0];
    };
    switch (e.kind) {
        case TableKind::fp32: return add_up([&](int64_t i) { return wide[i]; }, [&](int64_t i) { return load(wide + i); });
        case TableKind::bf16:
            return add_up([&](int64_t i) { return from_bf16(narrow[i]); }, [&](int64_t i) { return load_bf16(narrow + i); });
        case TableKind::fp16: return add_up(fp16_element, [&](int64_t i) { return load_fp16(narrow + i); });
    }
}

void layer_norm(const float* x, const float* weight, const float* bias, float* residual, float eps, int64_t rows,
                int64_t dim, float* y, int num_threads) {
    parallel(rows * dim < kSmall ? 1 : num_threads, [&](Team& team, int member) {
        team.for_each(member, rows, [&](int64_t row) {
            const float* input = x + row * dim;
            if (residual != nullptr) {
                float* sum = residual + row * dim;
                for (int64_t i = 0; i < dim; ++i) sum[i] += input[i];
                input = sum;
            }
            layer_norm_row(input, weight, bias, eps, dim, y + row * dim);
        });
    });
}

void embed_codes(const EmbeddingTables& e, const int32_t* codes, const int32_t* positions, int64_t rows, float* y,
                 int num_threads) {
    for (int64_t row = 0; row < rows; ++row) {
        check_range("positions", row, positions[row], 0, e.max_positions);
        for (int32_t k = 0; k < e.num_codebooks; ++k)
            check_range("codes", row * e.num_codebooks + k, codes[row * e.num_codebooks + k], 0, e.num_codes + 1);
    }
    parallel(rows * e.dim < kSmall ? 1 : num_threads, [&](Team& team, int member) {
        team.for_each(member, rows, [&](int64_t row) { embed_row(e, codes + row * e.num_codebooks, positions[row], y + row * e.dim); });
    });
}

}  // namespace MGK_ISA
}  // namespace mgk
