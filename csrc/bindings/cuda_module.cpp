// Python bindings of the CUDA kernels. Shapes, dtypes and devices have been checked in Python. With MGK_HOST_CUDA it is
// the host build of the same kernels, for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_calls.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of musicgen_kernels; see musicgen_kernels.cuda for their arguments.";
#if defined(MGK_HOST_CUDA)
    module.attr("device_type") = "cpu";
#else
    module.attr("device_type") = "cuda";
#endif
    py::register_exception<mgk::cuda::LaunchError>(module, "LaunchError", PyExc_RuntimeError);
    module.def("run",
               [](const std::string& operation, std::vector<uintptr_t> addresses, std::vector<int64_t> integers,
                  std::vector<double> reals, uintptr_t stream) {
                   mgk::cuda::Call call(std::move(addresses), std::move(integers), std::move(reals));
                   py::gil_scoped_release release;
                   call.run(operation, reinterpret_cast<void*>(stream));
               });
}
