// chain.cpp: several calls of operators as one. Between two kernels of a network lie 20 to 30 us of an
// interpreter and a dispatcher, whose code and data the kernels have pushed out of the caches: 19 of
// them go away here (ResNet-50 in 1x4 blocks, 54 layers: 8.8 -> 7.8 ms).
//
//   calls   for each call the place of its operator in kCallees, and then for each argument, by kind:
//           T, O  2 * p, the value p; 2 * p + 1, the same, which nobody reads after this;
//                 kNext, the next of the weights; kNothing
//           I     the integer
//           L, P  their number and the integers; P: or kNothing
//   values  the images that were given, and behind them the results of all calls so far; that of an
//           operator in place is its residual
//
// Returned are the results that no call has read for the last time.

#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "torch/operators.h"
#include "torch/tensor.h"

namespace gossamer {
namespace {

struct Callee {
  const char* kinds;
  void (*run)(StableIValue*, uint64_t, uint64_t);
  bool in_place;
};
// In the order of _OPERATORS in python/gossamer/fuse/chain.py.
const Callee kCallees[] = {
    {kSpmm<false>, spmm<false>, false},
    {kSpmm<true>, spmm<true>, true},
    {kConvInt8<false>, conv_int8<false>, false},
    {kConvInt8<true>, conv_int8<true>, true},
    {kConvSpmmInt8<false>, conv_spmm_int8<false>, false},
    {kConvSpmmInt8<true>, conv_spmm_int8<true>, true},
    {kMaxPool, max_pool, false},
    {kMean, mean, false},
};
constexpr int64_t kNothing = -1, kNext = -2;

Handle same_as(const Handle& handle) {
  AtenTensorHandle same = nullptr;
  require(aoti_torch_new_tensor_handle(handle.get(), &same), "new_tensor_handle");
  return Handle(same);
}

template <typename T>
StableIValue on_stack(T* pointer) {
  return reinterpret_cast<StableIValue>(pointer);
}

// The arguments of a call, as torch would lay them on its stack. The operator takes them; those of a
// call that is not made are freed.
class Stack {
 public:
  explicit Stack(const char* kinds) : kinds_(kinds) {}
  Stack(const Stack&) = delete;
  ~Stack() {
    const std::string pushed(kinds_, items_.size());
    Arguments unused(items_.data(), pushed.c_str());
  }
  void push(StableIValue item) { items_.push_back(item); }
  StableIValue run(void (*operation)(StableIValue*, uint64_t, uint64_t)) {
    std::vector<StableIValue> items;
    items.swap(items_);
    operation(items.data(), items.size(), 1);
    return items[0];
  }

 private:
  const char* kinds_;
  std::vector<StableIValue> items_;
};

class Chain {
 public:
  Chain(std::vector<Handle> values, std::vector<Handle> weights, const std::vector<int64_t>& calls)
      : values_(std::move(values)),
        weights_(std::move(weights)),
        calls_(calls),
        given_(values_.size()) {}

  void run() {
    while (place_ < calls_.size()) {
      const int64_t which = next();
      if (which < 0 || which >= static_cast<int64_t>(std::size(kCallees)))
        fail("chain has no operator " + std::to_string(which));
      call(kCallees[which]);
    }
  }
  StableIValue results() {
    StableListHandle list = nullptr;
    require(torch_new_list_reserve_size(1, &list), "new_list");
    for (size_t i = given_; i < values_.size(); ++i)
      if (values_[i]) require(torch_list_push_back(list, on_stack(values_[i].release())), "push");
    return on_stack(list);
  }

 private:
  int64_t next() {
    if (place_ == calls_.size()) fail("chain has calls that end before their arguments");
    return calls_[place_++];
  }

  void call(const Callee& callee) {
    Stack stack(callee.kinds);
    Handle read;  // the last value, of which an operator in place writes over
    for (const char* kind = callee.kinds; *kind; ++kind) {
      const int64_t item = next();
      if (*kind == 'I') {
        stack.push(static_cast<StableIValue>(item));
      } else if (*kind == 'L' || *kind == 'P') {
        push_list(stack, item, *kind == 'P');
      } else if (*kind == 'O' && item == kNothing) {
        stack.push(0);
      } else {
        Handle tensor = item == kNext ? weight() : value(item);
        if (callee.in_place && item != kNext) read = same_as(tensor);
        const StableIValue own = on_stack(tensor.release());
        stack.push(*kind == 'O' ? on_stack(new StableIValue(own)) : own);
      }
    }
    const StableIValue result = stack.run(callee.run);
    values_.push_back(callee.in_place ? std::move(read)
                                      : Handle(reinterpret_cast<AtenTensorHandle>(result)));
  }

  void push_list(Stack& stack, int64_t size, bool optional) {
    if (optional && size == kNothing) return stack.push(0);
    StableListHandle list = nullptr;
    require(torch_new_list_reserve_size(size > 0 ? size : 0, &list), "new_list");
    const StableIValue own = on_stack(list);
    stack.push(optional ? on_stack(new StableIValue(own)) : own);
    for (int64_t i = 0; i < size; ++i)
      require(torch_list_push_back(list, static_cast<StableIValue>(next())), "list_push_back");
  }

  Handle weight() {
    if (weight_ == weights_.size()) fail("chain has calls that read more weights than there are");
    return std::move(weights_[weight_++]);
  }

  Handle value(int64_t item) {
    const size_t place = static_cast<size_t>(item) / 2;
    if (item < 0 || place >= values_.size() || !values_[place])
      fail("chain has no value for argument " + std::to_string(item));
    return item % 2 ? std::move(values_[place]) : same_as(values_[place]);
  }

  std::vector<Handle> values_, weights_;
  const std::vector<int64_t>& calls_;
  size_t place_ = 0, weight_ = 0;
  const size_t given_;
};

}  // namespace

// (values, weights, calls) -> results
void chain(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, "HHL");
  std::vector<Handle> values = arguments.handles(), weights = arguments.handles();
  const std::vector<int64_t> calls = arguments.integers();
  Chain chained(std::move(values), std::move(weights), calls);
  chained.run();
  stack[0] = chained.results();
}

}  // namespace gossamer
