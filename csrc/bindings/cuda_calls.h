// The CUDA operations by name, with their arguments as three lists (addresses, integers, reals) in the order of
// musicgen_kernels/cuda.py. The Python module and the host harness's replay of recorded calls both go through here.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

namespace mgk {
namespace cuda {

class Call {
public:
    Call(std::vector<uintptr_t> addresses, std::vector<int64_t> integers, std::vector<double> reals)
        : addresses_(std::move(addresses)), integers_(std::move(integers)), reals_(std::move(reals)) {}

    // Runs the operation. Throws LaunchError, or std::invalid_argument for a name or number of arguments that is none.
    void run(const std::string& operation, void* stream) {
        if (operation == "append_paged_kv") return append(stream);
        if (operation == "paged_attention") return attention(stream);
        if (operation == "delayed_sample_step") return sample(stream);
        if (operation == "layer_norm") return norm(stream);
        if (operation == "embed_codes") return embed(stream);
        if (operation == "linear") return product(stream);
        throw std::invalid_argument("no CUDA operation " + operation);
    }

private:
    template <class T>
    void next(T*& pointer) {
        pointer = reinterpret_cast<T*>(take(addresses_, address_));
    }
    void next(int64_t& integer) { integer = take(integers_, integer_); }
    void next(bool& flag) { flag = take(integers_, integer_) != 0; }
    void next(Type& type) { type = Type(take(integers_, integer_)); }
    void next(WeightKind& kind) { kind = WeightKind(take(integers_, integer_)); }
    void next(float& real) { real = float(take(reals_, real_)); }

    template <class T>
    static T take(const std::vector<T>& list, size_t& index) {
        if (index >= list.size()) throw std::invalid_argument("too few arguments for a CUDA operation");
        return list[index++];
    }
    template <class... Fields>
    void read(Fields&... fields) {
        (next(fields), ...);
    }
    void finish() const {
        if (address_ != addresses_.size() || integer_ != integers_.size() || real_ != reals_.size()) {
            throw std::invalid_argument("too many arguments for a CUDA operation");
        }
    }
    void read_paged(Pages& p, RaggedRows& r) {
        read(p.k, p.v, p.k_scales, p.v_scales, r.page_table, r.query_offsets, r.kv_lens);
        read(p.type, r.num_rows, r.max_pages, r.num_tokens, r.num_heads, r.head_dim);
    }

    void append(void* stream) {
        AppendArguments a{};
        read(a.keys, a.values);
        read_paged(a.pages, a.rows);
        read(a.type, a.k_token_stride, a.k_head_stride, a.v_token_stride, a.v_head_stride);
        finish();
        append_paged_kv(a, stream);
    }
    void attention(void* stream) {
        AttentionArguments a{};
        read(a.query, a.out, a.states, a.sums);
        read_paged(a.pages, a.rows);
        read(a.type, a.token_stride, a.head_stride, a.num_splits, a.causal, a.scale);
        finish();
        paged_attention(a, stream);
    }
    void sample(void* stream) {
        SampleArguments a{};
        read(a.logits, a.row_offsets, a.slots, a.steps, a.num_frames, a.seeds, a.guidance, a.guidance_beta);
        read(a.temperature, a.top_k, a.top_p, a.delays, a.sequences, a.out);
        read(a.num_requests, a.num_codebooks, a.num_codes, a.max_steps);
        finish();
        delayed_sample_step(a, stream);
    }
    void norm(void* stream) {
        LayerNormArguments a{};
        read(a.x, a.weight, a.bias, a.residual, a.out, a.num_rows, a.dim, a.type, a.out_type, a.eps);
        finish();
        layer_norm(a, stream);
    }
    void embed(void* stream) {
        EmbedArguments a{};
        read(a.codes, a.tables, a.positions, a.sinusoids, a.out);
        read(a.num_tokens, a.num_codebooks, a.num_entries, a.dim, a.type);
        finish();
        embed_codes(a, stream);
    }
    void product(void* stream) {
        LinearArguments a{};
        read(a.x, a.codes, a.scales, a.bias, a.residual, a.out);
        read(a.num_rows, a.out_features, a.in_features, a.group_len, a.type, a.out_type, a.kind, a.gelu);
        finish();
        linear(a, stream);
    }

    std::vector<uintptr_t> addresses_;
    std::vector<int64_t> integers_;
    std::vector<double> reals_;
    size_t address_ = 0, integer_ = 0, real_ = 0;
};

}  // namespace cuda
}  // namespace mgk
