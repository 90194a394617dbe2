// tensor.h: what torch hands to an operator (tensors, optionals, lists on a stack), read through
// shim.h.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "torch/shim.h"

namespace gossamer {

constexpr uint64_t kTorch210 = uint64_t{2} << 56 | uint64_t{10} << 48;

[[noreturn]] inline void fail(const std::string& message) {
  throw std::runtime_error("gossamer: " + message);
}
inline void require(AOTITorchError status, const char* what) {
  if (status != 0) fail(std::string(what) + " failed inside torch");
}
// What a tensor is but for its memory.
struct Layout {
  std::vector<int64_t> sizes, strides;
  int32_t dtype;
};

inline std::string shape_of(const int64_t* sizes, size_t dim) {
  std::string text = "(";
  for (size_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

// A tensor that torch gave for one call: sizes and pointers read once. Of one that is lent, the handle
// stays with its owner.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle, bool lent = false) : handle_(lent ? nullptr : handle) {
    require(aoti_torch_get_dim(handle, &dim), "get_dim");
    require(aoti_torch_get_sizes(handle, &sizes), "get_sizes");
    require(aoti_torch_get_strides(handle, &strides), "get_strides");
    require(aoti_torch_get_dtype(handle, &dtype), "get_dtype");
    require(aoti_torch_get_data_ptr(handle, &data), "get_data_ptr");
  }
  static Tensor empty(const Layout& like) {
    AtenTensorHandle handle = nullptr;
    require(aoti_torch_empty_strided(static_cast<int64_t>(like.sizes.size()), like.sizes.data(),
                                     like.strides.data(), like.dtype, aoti_torch_device_type_cpu(),
                                     0, &handle),
            "empty_strided");
    return Tensor(handle);
  }
  // In memory that outlives it.
  static Tensor over(void* memory, const Layout& like) {
    AtenTensorHandle handle = nullptr;
    require(aoti_torch_create_tensor_from_blob(
                memory, static_cast<int64_t>(like.sizes.size()), like.sizes.data(),
                like.strides.data(), 0, like.dtype, aoti_torch_device_type_cpu(), 0, &handle),
            "create_tensor_from_blob");
    return Tensor(handle);
  }
  Tensor(Tensor&& other) noexcept { *this = static_cast<Tensor&&>(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    dim = other.dim, sizes = other.sizes, strides = other.strides, dtype = other.dtype,
    data = other.data;
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  StableIValue release() {
    const StableIValue value = reinterpret_cast<StableIValue>(handle_);
    handle_ = nullptr;
    return value;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim; ++i) n *= sizes[i];
    return n;
  }
  bool contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }
  std::string shape() const { return shape_of(sizes, static_cast<size_t>(dim)); }
  // Whether it could have been made `like` this.
  bool is(const Layout& like) const {
    bool alike = dtype == like.dtype && dim == static_cast<int64_t>(like.sizes.size());
    for (size_t i = 0; alike && i < like.sizes.size(); ++i)
      alike = sizes[i] == like.sizes[i] && (sizes[i] == 1 || strides[i] == like.strides[i]);
    return alike;
  }

  int64_t dim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  void* data = nullptr;

 private:
  AtenTensorHandle handle_ = nullptr;
};

// A tensor's handle alone, which costs less than what Tensor reads of it.
struct DeleteTensor {
  void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
};
using Handle = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

// Memory for results, as a caller has it.
class Memory {
 public:
  virtual Tensor result(const Layout& like) = 0;

 protected:
  ~Memory() = default;
};

// Reads the arguments of one call off torch's stack, in order. What it takes its caller owns; what
// is left when a check fails is freed, by its kind: T tensor, O optional tensor, W weight, V optional
// weight, I integer, L list, P optional list, H list of tensors.
//
// lent: weights and lists stay with who keeps them for many calls, and lists are vectors. memory: for
// the result, if it is not to be torch's.
class Arguments {
 public:
  using List = std::vector<int64_t>;

  Arguments(StableIValue* stack, const char* kinds, bool lent = false, Memory* memory = nullptr)
      : next_(stack), kinds_(kinds), lent_(lent), memory_(memory) {}
  Arguments(const Arguments&) = delete;
  ~Arguments() {
    while (*kinds_) {
      const char kind = *kinds_;
      if (kind == 'I' || (lent_ && kind != 'T' && kind != 'O')) {
        integer();
      } else if (kind == 'T' || kind == 'W') {
        aoti_torch_delete_tensor_object(take<AtenTensorHandle>());
      } else if (kind == 'L') {
        torch_delete_list(take<StableListHandle>());
      } else if (kind == 'H') {
        handles();
      } else if (auto* box = take<StableIValue*>()) {
        kind == 'P' ? torch_delete_list(reinterpret_cast<StableListHandle>(*box))
                    : aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(*box));
        delete box;
      }
    }
  }

  int64_t integer() {
    ++kinds_;
    return static_cast<int64_t>(*next_++);
  }
  Tensor result(const Layout& like) const {
    return memory_ ? memory_->result(like) : Tensor::empty(like);
  }
  Tensor tensor() { return Tensor(take<AtenTensorHandle>()); }
  Tensor weight(const char* name, int32_t dtype, int64_t count) {
    Tensor t(take<AtenTensorHandle>(), lent_);
    if (t.dtype != dtype || !t.contiguous() || (count >= 0 && t.numel() != count)) {
      fail(std::string(name) + " of shape " + t.shape() +
           " is not what packing makes: contiguous, of its dtype" +
           (count >= 0 ? " and of " + std::to_string(count) + " elements" : ""));
    }
    return t;
  }
  // (n) floats, or none.
  std::vector<Tensor> optional_weight(const char* name, int64_t n) {
    std::vector<Tensor> floats = optional(lent_);
    for (const Tensor& f : floats) {
      if (f.dtype != aoti_torch_dtype_float32() || f.dim != 1 || f.sizes[0] != n ||
          !f.contiguous()) {
        fail(std::string(name) + " of shape " + f.shape() + " must be float32 and of shape (" +
             std::to_string(n) + ",)");
      }
    }
    return floats;
  }
  std::vector<Tensor> optional_tensor() { return optional(false); }
  List optional_integers() {
    if (lent_) {
      const auto* kept = take<const List*>();
      return kept ? *kept : List();
    }
    List values;
    if (auto* box = take<StableIValue*>()) {
      values = list(reinterpret_cast<StableListHandle>(*box));
      delete box;
    }
    return values;
  }
  List integers() { return lent_ ? *take<const List*>() : list(take<StableListHandle>()); }
  std::vector<Handle> handles() {
    std::vector<Handle> found;
    for (int64_t item : list(take<StableListHandle>()))
      found.emplace_back(reinterpret_cast<AtenTensorHandle>(item));
    return found;
  }

 private:
  template <typename T>
  T take() {
    ++kinds_;
    return reinterpret_cast<T>(*next_++);
  }
  // An optional is null or a box; one that is not lent is its reader's, as what is in it.
  std::vector<Tensor> optional(bool lent) {
    std::vector<Tensor> found;
    if (auto* box = take<StableIValue*>()) {
      found.emplace_back(reinterpret_cast<AtenTensorHandle>(*box), lent);
      if (!lent) delete box;
    }
    return found;
  }
  static List list(StableListHandle handle) {
    size_t size = 0;
    List values;
    require(torch_list_size(handle, &size), "list_size");
    values.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      require(torch_list_get_item(handle, i, &item), "list_get_item");
      values.push_back(static_cast<int64_t>(item));
    }
    require(torch_delete_list(handle), "delete_list");
    return values;
  }
  StableIValue* next_;
  const char* kinds_;
  const bool lent_;
  Memory* const memory_;
};

}  // namespace gossamer
