// threads.cpp: how threads share a product: evenly by what it costs, and what one has not begun is
// done by another that has nothing left.

#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include "native.h"
#include "work.h"

namespace {

using gossamer::Even;
using gossamer::Range;
using gossamer::Share;
using gossamer::Tile;
using gossamer::Work;

// y of a sparse product, as far as the first of two threads makes it; NaN elsewhere.
std::vector<float> first_half(int64_t rows, int64_t n, int64_t k, double density,
                              std::mt19937& random) {
  const Operands operands(Weight(n, k, density, 1, random), Side::kEnd);
  const Matrix x = random_matrix(rows, k, random);
  std::vector<float> y(static_cast<size_t>(rows * n), NAN);
  const gossamer_input input{x.x.data(), GOSSAMER_FLOAT32, rows, k, nullptr, 0, 0, 0};
  const gossamer_output output{y.data(), n, 0, nullptr, GOSSAMER_NONE, nullptr, nullptr};
  const gossamer_sparse w = operands.sparse();
  require_ok(gossamer_spmm(&input, &w, &output,
                           [](int64_t begin, int64_t end, int64_t, gossamer_body body,
                              void* context) { body(begin, begin + (end - begin) / 2, context); }));
  return y;
}

void check_halves(std::mt19937& random) {
  // Two chunks that cost about the same: a thread each, whichever costs more.
  const size_t n = 512;
  for (int round = 0; round < 8; ++round) {
    const std::vector<float> y = first_half(64, n, 96, 0.5, random);
    for (size_t i = 0; i < y.size(); ++i)
      require((y[i] == y[i]) == (i % n < n / 2), "spmm: half of the work is not one of two chunks");
  }
  // 196 rows are three tiles of 64 and one of 4: half of them are not two tiles.
  int64_t done = 0;
  for (const float value : first_half(196, 32, 512, 0.9, random)) done += value == value;
  require(done == 32 * 64 + 16 * 64, "spmm: the first of two threads has not three half tiles");
}

// Whoever takes, and in whatever order: each item once, never more than a tile at a time.
void check_takes(std::mt19937& random) {
  for (int round = 0; round < 200; ++round) {
    const auto upto = [&](uint32_t most) { return static_cast<int64_t>(random() % (most + 1)); };
    const Work work{1, 64 * 20, 64, 1 + upto(9)};
    const int64_t begin = upto(90), end = begin + upto(90);
    std::vector<int> met(200, 0);
    Share share;
    share.open({begin, end});
    for (Range some; (some = share.take(work, upto(1) == 1)).begin < some.end;) {
      require(some.begin / work.units == (some.end - 1) / work.units, "a share: of two tiles");
      for (int64_t i = some.begin; i < some.end; ++i) ++met[static_cast<size_t>(i)];
    }
    for (int64_t i = 0; i < 200; ++i)
      require(met[static_cast<size_t>(i)] == (i >= begin && i < end), "a share: an item is lost");
  }
}

void two_threads(int64_t begin, int64_t end, int64_t, gossamer_body body, void* context) {
  std::thread other([=] { body((begin + end) / 2, end, context); });
  body(begin, (begin + end) / 2, context);
  other.join();
}

// One of two threads stops at its first tile until the other has done all the rest.
void check_help() {
  const Work work{3, 7 * 64, 64, 3};
  std::mutex mutex;
  std::condition_variable change;
  std::thread::id slow;
  std::vector<int> met(static_cast<size_t>(work.tiles() * work.units), 0);
  int64_t done = 0;
  const auto body = [&](const Tile& tile) {
    std::unique_lock<std::mutex> lock(mutex);
    const int64_t count = tile.units.end - tile.units.begin, all = static_cast<int64_t>(met.size());
    for (int64_t unit = tile.units.begin; unit < tile.units.end; ++unit)
      ++met[size_t((tile.image * 7 + tile.rows.begin / 64) * work.units + unit)];
    const auto wait_until = [&](auto reached) {
      require(change.wait_for(lock, std::chrono::seconds(30), reached), "a thread was not helped");
    };
    if (slow == std::thread::id()) {
      slow = std::this_thread::get_id();
      wait_until([&] { return done == all - count; });
    }
    done += count;
    change.notify_all();
    return true;
  };
  const Even before;
  require(gossamer::Run<Even, decltype(body)>(work, before, body)(1e12, two_threads), "no memory");
  for (const int times : met) require(times == 1, "two threads: an item was not done once");
}

}  // namespace

void check_threads(std::mt19937& random) {
  check_halves(random);
  check_takes(random);
  check_help();
}
