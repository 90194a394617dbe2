// chain.cpp: several calls of operators as one. Between two kernels of a network lie 30 to 40 us of an
// interpreter and a dispatcher, whose code and data the kernels have pushed out of the caches. A chain
// is kept with the weights that it reads, which need not pass the interpreter each time (ResNet-50 in
// 1x4 blocks, 56 layers, avx512vnni: 8.6 ms one by one, 6.6 so).
//
//   calls   for each call 2 * o, o the place of its operator in kOperations, or 2 * o + 1 if its result
//           leaves the chain, itself or written over; and then for each argument, by kind:
//           T, O  2 * p, the value p; 2 * p + 1, the same, which nobody reads after this; kNothing
//           W, V  kNext, the next of the weights; V: or kNothing
//           I     the integer
//           L, P  their number and the integers; P: or kNothing
//   weights the tensors that kNext stands for, in order
//   values  the images that were given, and behind them the results of all calls so far; that of an
//           operator in place is its residual
//
// Returned are the results that no call has read for the last time.

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "include/gossamer.h"
#include "torch/operators.h"
#include "torch/tensor.h"

namespace gossamer {
namespace {

// In the order of _OPERATORS in python/gossamer/fuse/chain.py.
const Operation* const kOperations[] = {
    &kSpmm<false>,
    &kSpmm<true>,
    &kConvInt8<false>,
    &kConvInt8<true>,
    &kConvSpmmInt8<false>,
    &kConvSpmmInt8<true>,
    &kMaxPool,
    &kMean,
    &kBlock,
    &kUnblock,
    &kGemmInt8,
    &kSpmmInt8,
};
constexpr int64_t kNothing = -1, kNext = -2;

template <typename T>
StableIValue on_stack(T* pointer) {
  return reinterpret_cast<StableIValue>(pointer);
}

// A call: its arguments as Arguments reads them, but for the values, which each run puts there.
struct Call {
  struct Value {
    size_t argument;
    int64_t which;
  };
  const Operation* operation;
  bool leaves;
  std::vector<StableIValue> arguments;
  std::vector<Value> values;
  std::vector<AtenTensorHandle> weights;

  // The kernels before it have pushed out of the caches what torch knows of its tensors, and that is
  // found one line after the other. A hint: a handle points to a pointer to most of it.
  void fetch() const {
    for (AtenTensorHandle weight : weights) {
      const char* own;
      std::memcpy(&own, weight, sizeof own);
      for (int line = 0; line < 256; line += 64) __builtin_prefetch(own + line);
    }
  }
};

// Calls, and what they read. Many threads may run one at a time.
class Chain {
 public:
  Chain(std::vector<Handle> weights, const std::vector<int64_t>& calls)
      : weights_(std::move(weights)) {
    for (Reader reader{*this, calls}; reader.place < calls.size();) calls_.push_back(reader.call());
  }
  Chain(const Chain&) = delete;
  const std::vector<Call>& calls() const { return calls_; }

 private:
  struct Reader {
    Chain& chain;
    const std::vector<int64_t>& calls;
    size_t place = 0, weight = 0;

    int64_t next() {
      if (place == calls.size()) fail("chain has calls that end before their arguments");
      return calls[place++];
    }

    Call call() {
      const int64_t code = next(), which = code / 2;
      if (code < 0 || which >= static_cast<int64_t>(std::size(kOperations)))
        fail("chain has no operator " + std::to_string(code));
      Call found{kOperations[which], code % 2 != 0, {}, {}, {}};
      for (const char* kind = found.operation->kinds; *kind; ++kind) {
        const int64_t item = next();
        const bool tensor = *kind == 'T' || *kind == 'O';
        if (tensor && (*kind == 'T' || item != kNothing))
          found.values.push_back({found.arguments.size(), item});
        found.arguments.push_back(tensor ? 0 : lent(*kind, item, found));
      }
      if (found.operation->in_place && found.values.back().which % 2 == 0)
        fail("chain writes over a value that is read later");
      return found;
    }

    StableIValue lent(char kind, int64_t item, Call& found) {
      if (kind == 'I') return static_cast<StableIValue>(item);
      if (kind == 'L' || kind == 'P') return list(kind, item);
      if (kind == 'V' && item == kNothing) return 0;
      if (item != kNext) fail("chain has a weight that is " + std::to_string(item));
      if (weight == chain.weights_.size())
        fail("chain has calls that read more weights than there are");
      AtenTensorHandle handle = chain.weights_[weight++].get();
      found.weights.push_back(handle);
      const StableIValue own = on_stack(handle);
      return kind == 'V' ? on_stack(&chain.boxes_.emplace_back(own)) : own;
    }

    StableIValue list(char kind, int64_t size) {
      if (kind == 'P' && size == kNothing) return 0;
      Arguments::List& integers = chain.lists_.emplace_back();
      while (size-- > 0) integers.push_back(next());
      return on_stack(&integers);
    }
  };

  std::vector<Handle> weights_;
  std::deque<StableIValue> boxes_;
  std::deque<Arguments::List> lists_;
  std::vector<Call> calls_;
};

Handle same_as(const Handle& handle) {
  AtenTensorHandle same = nullptr;
  require(aoti_torch_new_tensor_handle(handle.get(), &same), "new_tensor_handle");
  return Handle(same);
}

// Memory for results that do not leave the chain. What was let go last is taken first: it is still in
// the caches.
class Buffers final : public Memory {
 public:
  Tensor result(const Layout& like) override {
    int64_t bytes = like.dtype == aoti_torch_dtype_uint8()     ? 1
                    : like.dtype == aoti_torch_dtype_float32() ? 4
                                                               : 2;
    for (const int64_t size : like.sizes) bytes *= size;
    last_ = take(static_cast<size_t>(bytes));
    return Tensor::over(last_->memory.get(), like);
  }
  // The one of the last result.
  struct Buffer {
    std::unique_ptr<void, decltype(&std::free)> memory;
    size_t bytes;
  };
  Buffer* last() const { return last_; }
  void let_go(Buffer* buffer) {
    if (buffer) free_.push_back(buffer);
  }

 private:
  Buffer* take(size_t bytes) {
    for (size_t i = free_.size(); i-- > 0;) {
      Buffer* const buffer = free_[i];
      if (buffer->bytes < bytes) continue;
      free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
      return buffer;
    }
    bytes = (bytes + 63) / 64 * 64;
    Buffer& made = all_.emplace_back(Buffer{{std::aligned_alloc(64, bytes), &std::free}, bytes});
    if (!made.memory && bytes > 0) fail("out of memory: a result could not be allocated");
    return &made;
  }

  std::deque<Buffer> all_;
  std::vector<Buffer*> free_;
  Buffer* last_ = nullptr;
};

// The calls of a chain, one after the other.
class Run {
 public:
  Run(const Chain& chain, std::vector<Handle> values) : given_(values.size()) {
    for (Handle& value : values) values_.push_back({std::move(value), nullptr});
    for (const Call& each : chain.calls()) {
      each.fetch();
      call(each);
    }
  }
  StableIValue results() {
    StableListHandle list = nullptr;
    require(torch_new_list_reserve_size(1, &list), "new_list");
    for (size_t i = given_; i < values_.size(); ++i) {
      Handle& tensor = values_[i].tensor;
      if (!tensor) continue;
      if (values_[i].buffer) fail("chain has a result that leaves it and is not said to");
      require(torch_list_push_back(list, on_stack(tensor.release())), "push");
    }
    return on_stack(list);
  }

 private:
  struct Value {
    Handle tensor;
    Buffers::Buffer* buffer;  // null: the memory is torch's
  };

  void call(const Call& call) {
    const Operation& operation = *call.operation;
    read_.clear();
    for (const Call::Value& value : call.values) read_.push_back(take(value.which));
    // An operator in place writes over the last value that it reads.
    Value result{nullptr, nullptr};
    if (operation.in_place)
      result = {same_as(read_.back().tensor), std::exchange(read_.back().buffer, nullptr)};
    stack_ = call.arguments;
    for (size_t i = 0; i < read_.size(); ++i) {
      const size_t argument = call.values[i].argument;
      const StableIValue own = on_stack(read_[i].tensor.release());
      stack_[argument] = operation.kinds[argument] == 'O' ? on_stack(new StableIValue(own)) : own;
    }
    StableIValue made = 0;
    {
      Arguments arguments(stack_.data(), operation.kinds, true, call.leaves ? nullptr : &buffers_);
      operation.run(arguments, &made);
    }
    if (!operation.in_place) {
      result.tensor.reset(reinterpret_cast<AtenTensorHandle>(made));
      if (!call.leaves) result.buffer = buffers_.last();
    }
    for (const Value& value : read_) buffers_.let_go(value.buffer);
    values_.push_back(std::move(result));
  }

  // For the last time: with its buffer.
  Value take(int64_t item) {
    const size_t place = static_cast<size_t>(item) / 2;
    if (item < 0 || place >= values_.size() || !values_[place].tensor)
      fail("chain has no value for argument " + std::to_string(item));
    Value& value = values_[place];
    if (item % 2) return {std::move(value.tensor), std::exchange(value.buffer, nullptr)};
    return {same_as(value.tensor), nullptr};
  }

  Buffers buffers_;
  std::vector<Value> values_, read_;
  std::vector<StableIValue> stack_;
  const size_t given_;
};

// All chains that are kept, by the numbers that stand for them outside.
class Chains {
 public:
  int64_t keep(std::shared_ptr<const Chain> chain) {
    const std::lock_guard<std::mutex> lock(mutex_);
    chains_[++last_] = std::move(chain);
    return last_;
  }
  // It lives on while it runs.
  std::shared_ptr<const Chain> find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = chains_.find(number);
    if (found == chains_.end()) fail("no chain is kept as " + std::to_string(number));
    return found->second;
  }
  // Unless another thread runs it, the tensors go here too.
  void drop(int64_t number) {
    std::shared_ptr<const Chain> dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = chains_.find(number);
    if (found == chains_.end()) return;
    dropped.swap(found->second);
    chains_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Chain>> chains_;
  int64_t last_ = 0;
};

Chains& chains() {
  static Chains* const all = new Chains;  // never destroyed: torch may be gone by then
  return *all;
}

}  // namespace

// (weights, calls) -> chain
void chain_keep(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, "HL");
  std::vector<Handle> weights = arguments.handles();
  auto kept = std::make_shared<const Chain>(std::move(weights), arguments.integers());
  stack[0] = static_cast<StableIValue>(chains().keep(std::move(kept)));
}

// (values, chain) -> results
void chain(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, "HI");
  std::vector<Handle> values = arguments.handles();
  const std::shared_ptr<const Chain> kept = chains().find(arguments.integer());
  stack[0] = Run(*kept, std::move(values)).results();
}

}  // namespace gossamer

// No operator: garbage is collected at any time, while a tracer looks on, too. An unknown number is
// none's.
extern "C" GOSSAMER_API void gossamer_drop_chain(int64_t number) {
  gossamer::chains().drop(number);
}
