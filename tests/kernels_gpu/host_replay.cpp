// Replays recorded calls of the CUDA operations on the host build of the kernels, under a sanitizer, and compares every
// buffer with what it held after the recording: bit for bit, as all builds round alike.
//
//   host_replay FILE...
//
// A file (little endian): "MGKR", number of buffers (int64); of each its size and its bytes before; then the operation's
// name (length, characters), the three lists of arguments (each its length first; an address is a buffer's number and an
// offset, −1 for none), then each buffer's bytes after. Buffers are allocations of their exact size.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "cuda_calls.h"

namespace {

class Reader {
public:
    explicit Reader(const char* path) : file_(path, std::ios::binary) {
        if (!file_) stop("cannot be opened");
    }
    [[noreturn]] static void stop(const char* what) {
        std::fprintf(stderr, "host_replay: a recording %s\n", what);
        std::exit(2);
    }
    void bytes(void* to, size_t size) {
        if (!file_.read(static_cast<char*>(to), std::streamsize(size))) stop("is cut short");
    }
    int64_t integer() {
        int64_t x;
        bytes(&x, sizeof x);
        return x;
    }
    double real() {
        double x;
        bytes(&x, sizeof x);
        return x;
    }

private:
    std::ifstream file_;
};

struct Buffer {
    std::unique_ptr<unsigned char, void (*)(void*)> data{nullptr, std::free};
    size_t size = 0;
};

int replay(const char* path) {
    Reader in(path);
    char magic[4];
    in.bytes(magic, 4);
    if (std::memcmp(magic, "MGKR", 4) != 0) Reader::stop("does not begin with MGKR");
    std::vector<Buffer> buffers(size_t(in.integer()));
    for (Buffer& b : buffers) {
        b.size = size_t(in.integer());
        b.data.reset(static_cast<unsigned char*>(std::malloc(b.size ? b.size : 1)));
        in.bytes(b.data.get(), b.size);
    }
    std::string operation(size_t(in.integer()), ' ');
    in.bytes(&operation[0], operation.size());
    std::vector<uintptr_t> addresses(size_t(in.integer()));
    for (uintptr_t& address : addresses) {
        const int64_t buffer = in.integer(), offset = in.integer();
        address = buffer < 0 ? 0 : reinterpret_cast<uintptr_t>(buffers[size_t(buffer)].data.get() + offset);
    }
    std::vector<int64_t> integers(size_t(in.integer()));
    for (int64_t& x : integers) x = in.integer();
    std::vector<double> reals(size_t(in.integer()));
    for (double& x : reals) x = in.real();
    mgk::cuda::Call(addresses, integers, reals).run(operation, nullptr);
    for (const Buffer& b : buffers) {
        std::vector<unsigned char> after(b.size);
        in.bytes(after.data(), b.size);
        if (b.size && std::memcmp(after.data(), b.data.get(), b.size) != 0) {
            std::fprintf(stderr, "host_replay: %s: %s: other bits than in the recording\n", path, operation.c_str());
            return 1;
        }
    }
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    int status = 0;
    for (int i = 1; i < count; ++i) status |= replay(arguments[i]);
    std::printf("%d recordings replayed\n", count - 1);
    return status;
}
