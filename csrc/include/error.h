// An invalid argument detected in C++; raised in Python as musicgen_kernels.KernelArgumentError.
#pragma once

#include <stdexcept>
#include <string>

namespace mgk {

struct ArgumentError : std::invalid_argument {
    std::string argument, expected, got;
    ArgumentError(std::string argument_, std::string expected_, std::string got_)
        : std::invalid_argument(argument_ + ": expected " + expected_ + ", got " + got_),
          argument(std::move(argument_)), expected(std::move(expected_)), got(std::move(got_)) {}
};

// Throws an error naming the entry unless low ≤ value < end.
inline void check_range(const char* argument, long index, long value, long low, long end) {
    if (value >= low && value < end) return;
    throw ArgumentError(std::string(argument) + "[" + std::to_string(index) + "]",
                        std::to_string(low) + " to " + std::to_string(end - 1), std::to_string(value));
}

}  // namespace mgk
