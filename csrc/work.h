// work.h: how a product is cut into tiles of rows x units of outputs, and how threads share them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <mutex>

#include "error.h"
#include "isa.h"

namespace gossamer {

// Scratch: one buffer a thread, kept between calls while it is small.
class Scratch {
 public:
  static constexpr int64_t kKept = int64_t{4} << 20;

  ~Scratch() { std::free(data_); }
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      release();
      data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64))));
      size_ = data_ ? bytes : 0;
    }
    return data_;
  }
  void trim() {
    if (size_ > kKept) release();
  }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  char* data_ = nullptr;
  int64_t size_ = 0;
};

inline thread_local Scratch scratch;

// Work: tiles of rows x units of outputs.
struct Work {
  int64_t images, rows;                // rows of one image; a matrix is one image
  int64_t tile;                        // rows a tile, never more than there are
  int64_t units;                       // output units: panels or chunks, or groups of them
  int64_t least = ceil_div(units, 4);  // fewest units that are worth a call of their own
  int64_t tiles() const { return rows == 0 ? 0 : images * ceil_div(rows, tile); }
};

struct Tile {
  int64_t image;
  Range rows, units;
  bool fresh = true;  // of another image than this thread's tile before: scratch has nothing of use
  bool again = false;  // the rows of this thread's tile before: what was made of them is in scratch
  bool cold = true;    // the rows of its first tile: it has read none of these weights yet
  bool more = false;   // the tile behind it is this thread's too
  int64_t count() const { return rows.end - rows.begin; }
};

// A region of work shorter than 20 us is not worth a second thread (a torch region costs about 1 us,
// waking a sleeping thread 5 to 20). At 50 G int8 MACs a second.
constexpr double kGrainMacs = 20e-6 * 50e9;

// Tile number t, all of its units.
inline Tile tile_at(const Work& work, int64_t t) {
  const int64_t per_image = ceil_div(work.rows, work.tile), row = t % per_image * work.tile;
  return {t / per_image, {row, std::min(row + work.tile, work.rows)}, {0, work.units}};
}

// What the units before `unit` cost, in any measure: threads share the whole evenly by it.
struct Even {
  int64_t operator()(int64_t unit) const { return unit; }
};
// Chunks by their entries, and by their outputs, which have to be written.
struct ByEntries {
  const gossamer_index& w;
  int64_t blocks;

  int64_t operator()(int64_t unit) const {
    const int64_t chunks = chunk_count(w.n);
    int64_t cost = unit * chunk_rows(w.n);
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t* cell = w.cells + 2 * b * chunks;
      cost += cell[2 * unit + 1] - cell[1];
    }
    return cost;
  }
};

// Items (a unit of a tile each) by what they cost: a unit what lies between before(unit) and
// before(unit + 1) for each of the tile's rows, of 196 pixels the last of four tiles has 4.
template <typename Before>
class Costs {
 public:
  Costs(const Work& work, const Before& before)
      : work_(work),
        before_(before),
        whole_((work.rows - 1) / work.tile),
        last_(weight(work.rows - whole_ * work.tile)),
        image_(before(work.units) * (whole_ * weight(work.tile) + last_)) {}

  int64_t cost() const { return work_.images * image_; }
  // The first item whose middle lies at `at` or behind it: of two that are nearly equal, each half
  // has one.
  int64_t item(int64_t at) const {
    const int64_t each = before_(work_.units) * weight(work_.tile);
    const int64_t t = std::min(at % image_ / each, whole_), place = at % image_ - t * each;
    const int64_t rows = t < whole_ ? weight(work_.tile) : last_;
    int64_t low = 0, high = work_.units;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const int64_t twice = before_(middle) + before_(middle + 1);
      rows* twice < 2 * place ? low = middle + 1 : high = middle;
    }
    return (at / image_ * (whole_ + 1) + t) * work_.units + low;
  }

 private:
  static int64_t weight(int64_t rows) { return round_up(rows, 8); }

  const Work& work_;
  const Before& before_;
  int64_t whole_, last_, image_;
};

// The items that a thread has not begun. It takes them from the front; threads that are done with
// their own take them from the back, for no two cores are equally fast, nor any prediction of costs.
// Each has a cache line of its own: one that two cores lock goes to and fro.
class alignas(64) Share {
 public:
  void open(Range items) {
    const std::lock_guard<std::mutex> lock(mutex_);
    left_ = items;
  }
  // Up to a tile of them, and of the last tile one half after the other.
  Range take(const Work& work, bool front) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t count = left_.end - left_.begin, units = work.units;
    if (count == 0) return left_;
    const int64_t some =
        count > units ? units : std::min(count, std::max((count + 1) / 2, work.least));
    Range taken = left_;
    if (front) {
      taken.end = std::min(left_.begin / units * units + units, left_.begin + some);
      left_.begin = taken.end;
    } else {
      taken.begin = std::max((left_.end - 1) / units * units, left_.end - some);
      left_.end = taken.begin;
    }
    return taken;
  }

 private:
  std::mutex mutex_;
  Range left_{0, 0};
};

// Calls body(tile), which says whether it had the memory, for ranges of units that cover all tiles.
// `macs` is what all of it costs.
template <typename Before, typename Body>
class Run {
 public:
  Run(const Work& work, const Before& before, Body& body)
      : work_(work), costs_(work, before), body_(body) {}

  // Whether all threads had the memory.
  bool operator()(double macs, gossamer_parallel_for parallel_for) {
    const int64_t cost = costs_.cost();
    const double grain = std::ceil(kGrainMacs * static_cast<double>(cost) / std::max(macs, 1.0));
    if (!parallel_for || grain >= static_cast<double>(cost)) {
      part(0, cost);
    } else {
      const gossamer_body each = [](int64_t from, int64_t to, void* run) {
        static_cast<Run*>(run)->part(from, to);
      };
      parallel_for(0, cost, static_cast<int64_t>(grain), each, this);
    }
    return !failed_;
  }

 private:
  // The items of a thread, and the tiles that it met.
  struct Met {
    Range own;
    int64_t first = -1, last = -1;
  };

  // What one thread does.
  void part(int64_t from, int64_t to) {
    const Range items{costs_.item(from), costs_.item(to)};
    Met met{items};
    // Alone, there is nobody to share with.
    const int64_t own = to - from == costs_.cost() ? kShares : opened_++;
    if (own >= kShares) {
      walk(items, met);
    } else {
      const auto empty = [&](Share& share, bool front) {
        for (Range some; (some = share.take(work_, front)).begin < some.end;) walk(some, met);
      };
      shares_[own].open(items);
      empty(shares_[own], true);
      const int64_t opened = std::min<int64_t>(opened_, kShares);
      for (int64_t i = 1; i < opened; ++i) empty(shares_[(own + i) % opened], false);
    }
    scratch.trim();
  }

  void walk(Range items, Met& met) {
    for (int64_t units = work_.units; items.begin < items.end;) {
      const int64_t t = items.begin / units, first = items.begin % units,
                    end = std::min(units, first + items.end - items.begin);
      Tile tile = tile_at(work_, t);
      tile.units = {first, end};
      if (met.first < 0) met.first = t;
      tile.again = t == met.last;
      tile.fresh = met.last < 0 || tile.image != tile_at(work_, met.last).image;
      tile.cold = t == met.first;
      tile.more = t * units >= met.own.begin && (t + 1) * units < met.own.end;
      if (!body_(tile)) failed_ = true;
      met.last = t;
      items.begin += end - first;
    }
  }

  static constexpr int64_t kShares = 32;  // of more threads, the others share nothing

  const Work& work_;
  const Costs<Before> costs_;
  Body& body_;
  std::atomic<bool> failed_{false};
  std::atomic<int64_t> opened_{0};
  Share shares_[kShares];
};

template <typename Before, typename Body>
int run(const Work& work, double macs, Before before, gossamer_parallel_for parallel_for,
        Body body) {
  if (work.tiles() * work.units == 0) return GOSSAMER_OK;
  if (Run<Before, Body>(work, before, body)(macs, parallel_for)) return GOSSAMER_OK;
  fail("out of memory: the scratch buffer of a thread could not be allocated");
  return GOSSAMER_NO_MEMORY;
}

}  // namespace gossamer
