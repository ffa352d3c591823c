#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace glm {
namespace emulator {

// Memory between two inaccessible stretches, ending at the second but for its alignment.
class Guarded {
 public:
  Guarded(size_t bytes, size_t alignment) : bytes_(bytes), slack_((alignment - bytes % alignment) % alignment) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inner_ = (bytes_ + slack_ + page - 1) / page * page;
    void* all = mmap(nullptr, inner_ + 2 * kBeside, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) {
      std::perror("mmap");
      std::abort();
    }
    all_ = static_cast<unsigned char*>(all);
    protect(PROT_READ | PROT_WRITE);
    begin_ = all_ + kBeside + inner_ - slack_ - bytes_;
    std::memset(begin_ + bytes_, kCanary, slack_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(all_, inner_ + 2 * kBeside); }

  unsigned char* begin() const { return begin_; }
  unsigned char* end() const { return begin_ + bytes_; }
  size_t bytes() const { return bytes_; }
  void protect(int access) { mprotect(all_ + kBeside, inner_, access); }
  bool intact() const {
    return std::all_of(end(), end() + slack_, [](unsigned char byte) { return byte == kCanary; });
  }
  bool near(const void* address) const {
    return all_ <= static_cast<const unsigned char*>(address) && address < all_ + inner_ + 2 * kBeside;
  }

 private:
  static constexpr unsigned char kCanary = 0xc5;
  static constexpr size_t kBeside = 1 << 20;  // whole pages; takes addresses, not memory

  size_t bytes_, slack_, inner_ = 0;
  unsigned char *all_ = nullptr, *begin_ = nullptr;
};

}  // namespace emulator
}  // namespace glm
