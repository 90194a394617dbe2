// guarded.h: a buffer with a page on each side that cannot be touched, flush with one of them.
//
// A sanitizer sees what the compiler instrumented; a vector load through an intrinsic that reads
// one element too many, it may miss. The processor does not.
#pragma once

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <vector>

// The side of the buffer that touches a guard page. The other one has up to a page of slack.
enum class Side { kEnd, kBegin };

template <typename T>
class Guarded {
 public:
  Guarded(int64_t count, Side side) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)),
                 bytes = static_cast<size_t>(count) * sizeof(T);
    usable_ = (bytes + page - 1) / page * page;
    mapped_ = usable_ + 2 * page;
    base_ =
        static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::runtime_error("mmap failed");
    first_ = base_ + page;
    protect(PROT_READ | PROT_WRITE);
    // What nobody wrote is not zero by luck.
    if (usable_) memset(first_, kFill, usable_);
    data_ = reinterpret_cast<T*>(side == Side::kBegin ? first_ : first_ + usable_ - bytes);
  }
  // A copy of `values` that only reads can touch: kernels do not write to their operands.
  Guarded(const std::vector<T>& values, Side side)
      : Guarded(static_cast<int64_t>(values.size()), side) {
    if (!values.empty()) memcpy(data_, values.data(), values.size() * sizeof(T));
    protect(PROT_READ);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }

  static constexpr int kFill = 0xa5;
  T* data() { return data_; }
  const T* data() const { return data_; }
  std::vector<T> values() const { return {data_, data_ + count_}; }

 private:
  void protect(int rights) {
    if (usable_ && mprotect(first_, usable_, rights) != 0)
      throw std::runtime_error("mprotect failed");
  }
  int64_t count_;
  size_t usable_ = 0, mapped_ = 0;
  char *base_ = nullptr, *first_ = nullptr;
  T* data_ = nullptr;
};
