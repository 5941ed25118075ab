// The whole step: one parallel region with one barrier per phase (five per layer, eight with cross-attention).
//   normalise   few rows: every thread computes all of them, which is cheaper than a barrier; many rows: distributed
//   project     items of 32 outputs, all rows at once; a result that feeds an 8-bit product is quantised in place
//   attend      items of one row and one head: append the new positions, then attend
#include "model.h"

#include <cmath>
#include <string>

#include "error.h"

namespace mgk {
namespace MGK_ISA {

namespace {
constexpr int64_t kOwnRows = 4, kOwnSpace = kRowGroup;  // up to this many rows, every thread normalises all of them
}

KVPages LayeredPages::layer(int64_t index) const {
    KVPages pages = first;
    pages.k += index * stride;
    pages.v += index * stride;
    if (pages.k_scales != nullptr) {
        pages.k_scales += index * scale_stride / int64_t(sizeof(float));
        pages.v_scales += index * scale_stride / int64_t(sizeof(float));
    }
    return pages;
}

void Model::Buffer::resize(int64_t rows, int64_t width) {
    rows = QuantisedRows::padded(rows);
    x.resize(rows * width);
    codes.resize(rows * width);
    scales.resize(rows * width / kQuantBlock);
    sums.resize(rows * width / kQuantBlock);
}

Model::Rows Model::Buffer::view(int64_t first_row, int64_t width, int64_t rows) {
    const int64_t block = first_row * width / kQuantBlock;
    return {x.data() + first_row * width,
            {codes.data() + first_row * width, scales.data() + block, sums.data() + block, width,
             QuantisedRows::group_of(rows)}};
}

void Model::reserve(int64_t tokens, int num_threads) {
    if (tokens <= capacity_ && num_threads <= threads_) return;
    capacity_ = tokens > capacity_ ? tokens : capacity_;
    threads_ = num_threads > threads_ ? num_threads : threads_;
    const int64_t own = kOwnSpace * threads_;
    hidden_.resize(capacity_ * dim);
    qkv_.resize(capacity_ * 3 * dim);
    normed_.resize(capacity_ > own ? capacity_ : own, dim);
    mixed_.resize(capacity_, dim);
    wide_.resize(capacity_, ffn_dim);
}

void Model::check(const StepInput& in) const {
    const bool cross = layers[0].cross_q.codes != nullptr;
    check_rows(in.rows, in.num_tokens, in.pages.first.num_pages, true);
    if (cross) check_rows(in.cross_rows, in.num_tokens, in.cross_pages.first.num_pages, false);
    for (int64_t b = 0; b < in.rows.num_rows; ++b)
        check_range("kv_lens", b, in.rows.kv_lens[b], 0, embedding.max_positions + 1);
    for (int64_t i = 0; i < in.num_tokens; ++i) {
        const int64_t prefix = in.prefix_index == nullptr ? -1 : in.prefix_index[i];
        check_range("prefix_index", i, prefix, -1, in.num_prefix);
        for (int32_t k = 0; prefix < 0 && k < embedding.num_codebooks; ++k)
            check_range("codes", i * embedding.num_codebooks + k, in.codes[i * embedding.num_codebooks + k], 0,
                        embedding.num_codes + 1);
    }
    for (int64_t i = 0; i < in.num_logits; ++i) check_range("logit_tokens", i, in.logit_tokens[i], 0, in.num_tokens);
}

Model::Rows Model::normalise(Team& team, int member, int64_t tokens, const NormWeights& norm, bool quantised) {
    const bool own = tokens <= kOwnRows;
    const Rows rows = normed_.view(own ? member * kOwnSpace : 0, dim, tokens);
    auto one = [&](int64_t token) {
        layer_norm_row(hidden_.data() + token * dim, norm.weight, norm.bias, eps, dim, rows.x + token * dim);
        if (quantised) quantise_row(rows.x + token * dim, rows.quantised, token);
    };
    if (own)
        for (int64_t token = 0; token < tokens; ++token) one(token);
    else
        team.for_each(member, tokens, one);
    return rows;
}

void Model::project(Team& team, int member, const PackedMatrix& w, const Rows& in, int64_t tokens, float* y, const float* residual,
                    bool gelu, const QuantisedRows* quantised) {
    const LinearInput input{in.x, w.k, in.quantised};
    const LinearOutput output{y, nullptr, residual, w.n, w.n, gelu, quantised};
    team.for_each(member, linear_items(w), [&](int64_t item) { linear_item(w, input, output, tokens, item); });
}

// q (and behind it, for causal attention, the new k and v) in rows of `stride`; the result goes to mixed_.
void Model::attend_rows(Team& team, int member, const RaggedRows& rows, const KVPages& pages, const float* q, int64_t stride, bool causal,
                        bool quantised, int64_t num_tokens) {
    const Rows out = mixed_.view(0, dim, num_tokens);
    const int64_t head_dim = pages.head_dim;
    const float scale = 1.0f / std::sqrt(float(head_dim));
    const int64_t together = heads_per_item(rows.num_rows, num_heads, team.num_threads()), groups = num_heads / together;
    team.for_each(member, rows.num_rows * groups, [&](int64_t item) {
        const int64_t b = item / groups, head = item % groups * together, count = rows.num_queries(b);
        if (count == 0) return;
        const int64_t first = rows.query_offsets[b], length = rows.kv_lens[b];
        const float* own = q + first * stride + head * head_dim;
        for (int64_t j = 0; causal && j < count; ++j)
            for (int64_t h = 0; h < together; ++h) {
                const float* k = own + j * stride + dim + h * head_dim;
                append_position(pages, rows.table(b), length - count + j, head + h, k, k + dim);
            }
        float* to = out.x + first * dim + head * head_dim;
        attend(pages,
               {rows.table(b), head, together, causal ? length - count + 1 : length, count, causal, own, stride, head_dim, to,
                dim},
               scale);
        for (int64_t j = 0; quantised && j < count; ++j)
            for (int64_t d = 0; d < together * head_dim; d += kQuantBlock)
                quantise_block(to + j * dim + d, out.quantised, first + j, (head * head_dim + d) / kQuantBlock);
    });
}

void Model::layer(Team& team, int member, const StepInput& in, int64_t index) {
    const LayerWeights& w = layers[index];
    const int64_t tokens = in.num_tokens;
    float* hidden = hidden_.data();
    Rows rows = normalise(team, member, tokens, w.self_norm, w.qkv.quantised());
    project(team, member, w.qkv, rows, tokens, qkv_.data(), nullptr, false, nullptr);
    attend_rows(team, member, in.rows, in.pages.layer(index), qkv_.data(), 3 * dim, true, w.self_out.quantised(), tokens);
    project(team, member, w.self_out, mixed_.view(0, dim, tokens), tokens, hidden, hidden, false, nullptr);
    if (w.cross_q.codes != nullptr) {
        rows = normalise(team, member, tokens, w.cross_norm, w.cross_q.quantised());
        project(team, member, w.cross_q, rows, tokens, qkv_.data(), nullptr, false, nullptr);
        attend_rows(team, member, in.cross_rows, in.cross_pages.layer(index), qkv_.data(), dim, false, w.cross_out.quantised(),
                    tokens);
        project(team, member, w.cross_out, mixed_.view(0, dim, tokens), tokens, hidden, hidden, false, nullptr);
    }
    rows = normalise(team, member, tokens, w.ffn_norm, w.fc1.quantised());
    const Rows wide = wide_.view(0, ffn_dim, tokens);
    project(team, member, w.fc1, rows, tokens, wide.x, nullptr, true, w.fc2.quantised() ? &wide.quantised : nullptr);
    project(team, member, w.fc2, wide, tokens, hidden, hidden, false, nullptr);
}

void Model::embed(const StepInput& in, int64_t token) {
    // The row of this token: rows are few, so a linear search would do, but prefill has thousands of tokens.
    int64_t low = 0, high = in.rows.num_rows;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (in.rows.query_offsets[middle] <= token ? low : high) = middle;
    }
    const int64_t position = in.rows.kv_lens[low] - (in.rows.query_offsets[low + 1] - token);
    float* to = hidden_.data() + token * dim;
    const int64_t prefix = in.prefix_index == nullptr ? -1 : in.prefix_index[token];
    if (prefix < 0) return embed_row(embedding, in.codes + token * embedding.num_codebooks, position, to);
    for (int64_t i = 0; i < dim; ++i) to[i] = in.prefix[prefix * dim + i] + embedding.sinusoids[position * dim + i];
}

void Model::run(Team& team, int member, const StepInput& in) {
    team.for_each(member, in.num_tokens, [&](int64_t token) { embed(in, token); });
    for (int64_t index = 0; index < int64_t(layers.size()); ++index) layer(team, member, in, index);
    const Rows rows = normed_.view(0, dim, in.num_logits);
    team.for_each(member, in.num_logits, [&](int64_t i) {
        const float* hidden = hidden_.data() + int64_t(in.logit_tokens[i]) * dim;
        layer_norm_row(hidden, final_norm.weight, final_norm.bias, eps, dim, rows.x + i * dim);
        if (heads.quantised()) quantise_row(rows.x + i * dim, rows.quantised, i);
    });
    project(team, member, heads, rows, in.num_logits, in.logits, nullptr, false, nullptr);
}

void Model::step(const StepInput& in, int num_threads) {
    check(in);
    if (in.num_tokens == 0) return;
    std::lock_guard<std::mutex> only(one_step_);
    reserve(in.num_tokens > in.num_logits ? in.num_tokens : in.num_logits, num_threads);
    parallel(num_threads, [&](Team& team, int member) { run(team, member, in); });
}

void Model::write_cross(const float* states, int64_t num_tokens, const RaggedRows& rows, const LayeredPages& pages,
                        int num_threads) {
    if (layers[0].cross_kv.codes == nullptr) throw ArgumentError("model", "cross-attention layers", "none");
    check_rows(rows, num_tokens, pages.first.num_pages, true);
    std::lock_guard<std::mutex> only(one_step_);
    reserve(num_tokens, num_threads);
    const Rows input = mixed_.view(0, dim, num_tokens);
    parallel(num_threads, [&](Team& team, int member) {
        team.for_each(member, num_tokens, [&](int64_t token) {
            for (int64_t i = 0; i < dim; ++i) input.x[token * dim + i] = states[token * dim + i];
            quantise_row(input.x + token * dim, input.quantised, token);
        });
        for (int64_t index = 0; index < int64_t(layers.size()); ++index) {
            project(team, member, layers[index].cross_kv, input, num_tokens, qkv_.data(), nullptr, false, nullptr);
            const KVPages own = pages.layer(index);
            team.for_each(member, rows.num_rows * num_heads, [&](int64_t item) {
                const int64_t b = item / num_heads, head = item % num_heads, count = rows.num_queries(b);
                for (int64_t j = 0; j < count; ++j) {
                    const float* k = qkv_.data() + (rows.query_offsets[b] + j) * 2 * dim + head * own.head_dim;
                    append_position(own, rows.table(b), rows.kv_lens[b] - count + j, head, k, k + dim);
                }
            });
        }
    });
}

}  // namespace MGK_ISA
}  // namespace mgk
