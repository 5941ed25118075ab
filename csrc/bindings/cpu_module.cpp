// Python bindings of the CPU kernels of one ISA level. Shapes, dtypes and devices have been checked in Python; values
// (indices, lengths) are checked here, before anything is written.
#include <pybind11/pybind11.h>

#include "attention.h"
#include "error.h"
#include "linear.h"
#include "model.h"
#include "norm.h"
#include "probe.h"
#include "sampling.h"
#include "team.h"

namespace py = pybind11;
using namespace mgk;
using namespace mgk::MGK_ISA;

namespace {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

void raise_argument_error(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const ArgumentError& e) {
        const py::object type = py::module_::import("musicgen_kernels.errors").attr("KernelArgumentError");
        PyErr_SetObject(type.ptr(), type(e.argument, e.expected, e.got).ptr());
    }
}

void bind_sampling(py::module_& module) {
    module.def("delayed_sample_step", [](const py::tuple& pointers, const py::tuple& sizes, int num_threads) {
        int i = 0, j = 0;
        auto pointer = [&] { return pointers[i++].cast<uintptr_t>(); };
        auto size = [&] { return sizes[j++].cast<int64_t>(); };
        SampleArguments a{};
        a.logits = at<const float>(pointer());
        a.row_offsets = at<const int32_t>(pointer());
        a.slots = at<const int32_t>(pointer());
        a.steps = at<const int32_t>(pointer());
        a.num_frames = at<const int32_t>(pointer());
        a.seeds = at<const int64_t>(pointer());
        a.guidance = at<const float>(pointer());
        a.guidance_beta = at<const float>(pointer());
        a.temperature = at<const float>(pointer());
        a.top_k = at<const int32_t>(pointer());
        a.top_p = at<const float>(pointer());
        a.delays = at<const int32_t>(pointer());
        a.sequences = at<int32_t>(pointer());
        a.out = at<int32_t>(pointer());
        a.num_requests = size();
        a.num_rows = size();
        a.num_slots = size();
        a.num_steps = size();
        a.num_codebooks = int32_t(size());
        a.num_codes = int32_t(size());
        py::gil_scoped_release release;
        delayed_sample_step(a, num_threads);
    });
    module.def("sample_uniforms", [](int64_t seed, int step, int codebook, int num_codes, uintptr_t out) {
        sample_uniforms(seed, step, codebook, num_codes, at<float>(out));
    });
}

PackedMatrix packed_matrix(uintptr_t data, int64_t scales_offset, int kind, int n, int k, int group) {
    constexpr int header = 64;
    const uint8_t* bytes = at<const uint8_t>(data);
    return {bytes + header, reinterpret_cast<const uint16_t*>(bytes + scales_offset), WeightKind(kind), n, k, group};
}

void bind_linear(py::module_& module) {
    module.def("linear", [](uintptr_t data, int64_t scales_offset, int kind, int n, int k, int group, uintptr_t x,
                            uintptr_t bias, uintptr_t residual, uintptr_t y, int64_t rows, bool gelu, int num_threads) {
        const PackedMatrix w = packed_matrix(data, scales_offset, kind, n, k, group);
        const LinearOutput out{at<float>(y), at<const float>(bias), at<const float>(residual), n, n, gelu, nullptr};
        py::gil_scoped_release release;
        linear(w, at<const float>(x), out, rows, num_threads);
    });
}

void bind_norm(py::module_& module) {
    module.def("layer_norm", [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, float eps, int64_t rows,
                                int64_t dim, uintptr_t y, int num_threads) {
        py::gil_scoped_release release;
        layer_norm(at<const float>(x), at<const float>(weight), at<const float>(bias), at<float>(residual), eps, rows, dim,
                   at<float>(y), num_threads);
    });
    module.def("embed_codes", [](uintptr_t tables, int kind, int num_codebooks, int num_codes, int64_t dim,
                                 uintptr_t sinusoids, int64_t max_positions, uintptr_t codes, uintptr_t positions,
                                 int64_t rows, uintptr_t y, int num_threads) {
        const EmbeddingTables e{at<const char>(tables), at<const float>(sinusoids), TableKind(kind),
                                num_codebooks, num_codes, dim, max_positions};
        py::gil_scoped_release release;
        embed_codes(e, at<const int32_t>(codes), at<const int32_t>(positions), rows, at<float>(y), num_threads);
    });
}

// (k, v, k_scales, v_scales, kind, num_pages, num_heads, head_dim)
KVPages kv_pages(const py::tuple& t) {
    return {at<char>(t[0].cast<uintptr_t>()), at<char>(t[1].cast<uintptr_t>()), at<float>(t[2].cast<uintptr_t>()),
            at<float>(t[3].cast<uintptr_t>()), KVKind(t[4].cast<int>()), t[5].cast<int64_t>(), t[6].cast<int>(),
            t[7].cast<int>()};
}

// (page_table, query_offsets, kv_lens, num_rows, max_pages)
RaggedRows ragged_rows(const py::tuple& t) {
    return {at<const int32_t>(t[0].cast<uintptr_t>()), at<const int32_t>(t[1].cast<uintptr_t>()),
            at<const int32_t>(t[2].cast<uintptr_t>()), t[3].cast<int64_t>(), t[4].cast<int64_t>()};
}

void bind_attention(py::module_& module) {
    module.def("append_paged_kv", [](const py::tuple& cache, const py::tuple& batch, uintptr_t k, int64_t k_stride,
                                     int64_t k_head_stride, uintptr_t v, int64_t v_stride, int64_t v_head_stride,
                                     int64_t num_tokens, int num_threads) {
        const KVPages pages = kv_pages(cache);
        const RaggedRows rows = ragged_rows(batch);
        py::gil_scoped_release release;
        check_rows(rows, num_tokens, pages.num_pages, true);
        append_paged_kv(pages, rows, at<const float>(k), at<const float>(v), k_stride, k_head_stride, v_stride,
                        v_head_stride, num_threads);
    });
    module.def("paged_attention", [](const py::tuple& cache, const py::tuple& batch, bool causal, uintptr_t q,
                                     int64_t q_stride, int64_t q_head_stride, float scale, uintptr_t out,
                                     int64_t num_tokens, int num_threads) {
        const KVPages pages = kv_pages(cache);
        const RaggedRows rows = ragged_rows(batch);
        py::gil_scoped_release release;
        check_rows(rows, num_tokens, pages.num_pages, causal);
        paged_attention(pages, rows, causal, at<const float>(q), q_stride, q_head_stride, scale, at<float>(out), num_threads);
    });
}

// (data, scales_offset, kind, n, k, group); the empty tuple stands for no matrix.
PackedMatrix packed_matrix(const py::object& object) {
    const py::tuple t = object.cast<py::tuple>();
    if (t.empty()) return {};
    return packed_matrix(t[0].cast<uintptr_t>(), t[1].cast<int64_t>(), t[2].cast<int>(), t[3].cast<int>(), t[4].cast<int>(),
                         t[5].cast<int>());
}

NormWeights norm_weights(const py::object& object) {
    const py::tuple t = object.cast<py::tuple>();
    if (t.empty()) return {};
    return {at<const float>(t[0].cast<uintptr_t>()), at<const float>(t[1].cast<uintptr_t>())};
}

// (pages of the first layer, bytes between layers, bytes between layers of the scales); empty: none
LayeredPages layered_pages(const py::tuple& t) {
    if (t.empty()) return {};
    return {kv_pages(t[0].cast<py::tuple>()), t[1].cast<int64_t>(), t[2].cast<int64_t>()};
}

// norms: self, cross, ffn; matrices: qkv, self_out, cross_q, cross_kv, cross_out, fc1, fc2
LayerWeights layer_weights(const py::tuple& norms, const py::tuple& matrices) {
    LayerWeights w{};
    w.self_norm = norm_weights(norms[0]);
    w.cross_norm = norm_weights(norms[1]);
    w.ffn_norm = norm_weights(norms[2]);
    w.qkv = packed_matrix(matrices[0]);
    w.self_out = packed_matrix(matrices[1]);
    w.cross_q = packed_matrix(matrices[2]);
    w.cross_kv = packed_matrix(matrices[3]);
    w.cross_out = packed_matrix(matrices[4]);
    w.fc1 = packed_matrix(matrices[5]);
    w.fc2 = packed_matrix(matrices[6]);
    return w;
}

void step(Model& model, const py::tuple& tokens, const py::tuple& rows, const py::tuple& pages, const py::tuple& cross_rows,
          const py::tuple& cross_pages, const py::tuple& logits, int num_threads) {
    StepInput in{};
    in.num_tokens = tokens[0].cast<int64_t>();
    in.codes = at<const int32_t>(tokens[1].cast<uintptr_t>());
    in.prefix_index = at<const int32_t>(tokens[2].cast<uintptr_t>());
    in.prefix = at<const float>(tokens[3].cast<uintptr_t>());
    in.num_prefix = tokens[4].cast<int64_t>();
    in.rows = ragged_rows(rows);
    in.pages = layered_pages(pages);
    if (!cross_rows.empty()) in.cross_rows = ragged_rows(cross_rows);
    in.cross_pages = layered_pages(cross_pages);
    in.logit_tokens = at<const int32_t>(logits[0].cast<uintptr_t>());
    in.num_logits = logits[1].cast<int64_t>();
    in.logits = at<float>(logits[2].cast<uintptr_t>());
    py::gil_scoped_release release;
    model.step(in, num_threads);
}

void write_cross(Model& model, uintptr_t states, int64_t num_tokens, const py::tuple& rows, const py::tuple& pages,
                 int num_threads) {
    const RaggedRows ragged = ragged_rows(rows);
    const LayeredPages layered = layered_pages(pages);
    py::gil_scoped_release release;
    model.write_cross(at<const float>(states), num_tokens, ragged, layered, num_threads);
}

void bind_model(py::module_& module) {
    py::class_<Model>(module, "Model")
        .def(py::init([](const py::tuple& sizes, const py::tuple& tables, const py::tuple& layers, const py::tuple& final_norm,
                         const py::tuple& heads) {
            auto model = std::make_unique<Model>();
            model->dim = sizes[0].cast<int>();
            model->num_heads = sizes[1].cast<int>();
            model->ffn_dim = sizes[2].cast<int>();
            model->eps = sizes[3].cast<float>();
            model->embedding = {at<const char>(tables[0].cast<uintptr_t>()), at<const float>(tables[1].cast<uintptr_t>()),
                                TableKind(tables[2].cast<int>()), tables[3].cast<int>(), tables[4].cast<int>(), model->dim,
                                tables[5].cast<int64_t>()};
            for (const py::handle& item : layers) {
                const py::tuple pair = item.cast<py::tuple>();
                model->layers.push_back(layer_weights(pair[0].cast<py::tuple>(), pair[1].cast<py::tuple>()));
            }
            model->final_norm = norm_weights(final_norm);
            model->heads = packed_matrix(py::object(heads));
            return model;
        }))
        .def("step", &step)
        .def("write_cross", &write_cross);
}

void bind_probe(py::module_& module) {
    module.def("stream_read_seconds", [](uintptr_t data, int64_t bytes, int num_threads) {
        py::gil_scoped_release release;
        return stream_read_seconds(at<const char>(data), bytes, num_threads);
    });
    module.def("fma_per_second", &fma_per_second, py::call_guard<py::gil_scoped_release>());
    module.def("int8_per_second", &int8_per_second, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(MGK_MODULE, module) {
    module.doc() = "The CPU kernels, compiled for one instruction-set level; see musicgen_kernels.cpu.";
    py::register_local_exception_translator(&raise_argument_error);
    bind_sampling(module);
    bind_linear(module);
    bind_norm(module);
    bind_attention(module);
    bind_model(module);
    bind_probe(module);
}
