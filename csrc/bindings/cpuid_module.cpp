// Detects the instruction sets of this processor and system, and requests huge pages for large tensors. Compiled for the
// baseline, so that it runs anywhere.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <string>
#include <vector>

namespace py = pybind11;

// The supported levels, best first; __builtin_cpu_supports also checks that the system saves the registers.
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

// Requests 2 MiB pages for the aligned part of [address, address + bytes); true if the system accepted. Weights and keys
// are read once per step, and exceed what a TLB covers with 4 KiB pages.
static bool advise_huge_pages(uintptr_t address, size_t bytes) {
    constexpr uintptr_t huge = uintptr_t(1) << 21;
    const uintptr_t begin = (address + huge - 1) / huge * huge, end = (address + bytes) / huge * huge;
    return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
}

PYBIND11_MODULE(_cpuid, module) {
    module.doc() = "Which instruction-set levels this machine can run.";
    module.def("supported_levels", &supported_levels, "The levels that can run here, the best first.");
    module.def("advise_huge_pages", &advise_huge_pages, "Ask for 2 MiB pages in a range; true if the system took it.");
}
