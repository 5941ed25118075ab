// The Python face of the CPU kernels of one ISA level: addresses and sizes in, errors out. Shapes, dtypes and devices have
// been checked in Python; values (indices, lengths) are checked here, before anything is written.
#include <pybind11/pybind11.h>

#include "error.h"
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

}  // namespace

PYBIND11_MODULE(MGK_MODULE, module) {
    module.doc() = "The CPU kernels, compiled for one instruction-set level; see musicgen_kernels.cpu.";
    py::register_local_exception_translator(&raise_argument_error);
    bind_sampling(module);
}
