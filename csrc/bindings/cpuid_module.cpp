// Which instruction sets this processor and system offer. Compiled for the baseline, so that it runs anywhere.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

namespace py = pybind11;

// The levels that can run here, the best first; __builtin_cpu_supports also asks whether the system saves the registers.
static py::list supported_levels() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    py::list levels;
    if (avx512) levels.append("avx512");
    if (avx2) levels.append("avx2");
    levels.append("baseline");
    return levels;
}

PYBIND11_MODULE(_cpuid, module) {
    module.doc() = "Which instruction-set levels this machine can run.";
    module.def("supported_levels", &supported_levels, "The levels that can run here, the best first.");
}
