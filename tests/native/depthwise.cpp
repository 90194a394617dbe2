// depthwise.cpp: depthwise convolutions of blocked images, through the C ABI and as kernels alone,
// against plain loops.

#include "kernels.h"
#include "native.h"

namespace {

using namespace gossamer;

const Quantized kX(0x1p-5f, 77), kY(0x1p-4f, 131), kResidual(0x1p-6f, 19);

// Images of n channels under windows of k taps, and the bytes that come of them before rounding.
struct Windows {
  gossamer_conv c;
  Weight weight;
  std::vector<float> bias;
  std::vector<uint8_t> q, residual;
  std::vector<double> expected;
  gossamer_activation activation;

  Windows(const gossamer_conv& conv, gossamer_activation act, std::mt19937& random)
      : c(conv),
        weight(conv.channels, conv.kernel_h * conv.kernel_w, 1, 1, random),
        activation(act) {
    for (int64_t o = 0; o < n(); ++o) bias.push_back(static_cast<float>(o % 9) / 4 - 1);
    for (int64_t at = 0; at < c.images * plane_bytes(c.height * c.width); ++at)
      q.push_back(static_cast<uint8_t>(random()));
    for (int64_t at = 0; at < y_bytes(); ++at) {
      const int64_t pixel = at / 4 % out_pixels(), block = at / 4 / out_pixels(),
                    o = block % blocks() * 4 + at % 4;
      residual.push_back(static_cast<uint8_t>(o < n() ? random() : kResidual.zero));
      expected.push_back(o < n() ? byte(block, at % 4, o, pixel, residual.back()) : kY.zero);
    }
  }
  int64_t n() const { return c.channels; }
  int64_t blocks() const { return ceil_div(n(), 4); }
  int64_t out_pixels() const { return c.out_h * c.out_w; }
  int64_t plane_bytes(int64_t pixels) const { return blocks() * pixels * 4; }
  int64_t y_bytes() const { return c.images * plane_bytes(out_pixels()); }

  // In floats, without the residual.
  double value(int64_t image, int64_t o, int64_t pixel) const {
    return y_of(image * blocks() + o / 4, o % 4, o, pixel, kResidual.zero);
  }
  double byte(int64_t block, int64_t lane, int64_t o, int64_t pixel, int other) const {
    return std::clamp(y_of(block, lane, o, pixel, other) / kY.scale + kY.zero, 0.0, 255.0);
  }
  double y_of(int64_t block, int64_t lane, int64_t o, int64_t pixel, int other) const {
    int64_t sum = 0;
    for (int64_t tap = 0; tap < weight.k; ++tap) {
      const int64_t row =
                        pixel / c.out_w * c.stride_h - c.pad_top + tap / c.kernel_w * c.dilation_h,
                    column =
                        pixel % c.out_w * c.stride_w - c.pad_left + tap % c.kernel_w * c.dilation_w;
      if (row < 0 || row >= c.height || column < 0 || column >= c.width) continue;
      const int64_t at = ((block * c.height + row) * c.width + column) * 4 + lane;
      sum += (q[size_t(at)] - kX.zero) * weight.at(o, tap);
    }
    double y = double(sum) * kX.scale * weight.scale[size_t(o)] + bias[size_t(o)];
    y += (other - kResidual.zero) * kResidual.scale;
    if (activation == GOSSAMER_RELU || activation == GOSSAMER_RELU6) y = std::max(y, 0.0);
    if (activation == GOSSAMER_RELU6) y = std::min(y, 6.0);
    return y;
  }
};

// Every operand between pages that cannot be touched.
struct Guards {
  const Windows& windows;
  Guarded<uint8_t> q, residual, y;
  Guarded<int8_t> panels;
  Guarded<float> scale, bias;
  Guarded<int32_t> wsum;
  gossamer_int8 w;
  gossamer_blocked blocked;

  Guards(const Windows& all, Side side)
      : windows(all),
        q(all.q, side),
        residual(all.residual, side),
        y(all.y_bytes(), side),
        panels(all.weight.panels(), side),
        scale(all.weight.scale, side),
        bias(all.bias, side),
        wsum(all.weight.sums(), side),
        w{all.n(), all.weight.k, panels.data(), scale.data(), wsum.data()},
        blocked{kY.scale, kY.zero, residual.data(), kResidual.scale, kResidual.zero} {}

  // `rows` of the first image if there is one; else all was written.
  void compare(const Range* rows) const {
    const std::vector<uint8_t> got = y.values();
    const int64_t plane = windows.out_pixels(), width = windows.c.out_w;
    for (size_t at = 0; at < got.size(); ++at) {
      const int64_t word = static_cast<int64_t>(at) / 4, row = word % plane / width;
      const bool written =
          !rows || (word < windows.blocks() * plane && row >= rows->begin && row < rows->end);
      const double want = written ? windows.expected[at] : Guarded<uint8_t>::kFill;
      require(fabs(got[at] - want) <= (written ? 0.502 : 0), "depthwise: another byte");
    }
  }
};

std::vector<uint8_t> through_the_abi(const Windows& windows, Side side,
                                     gossamer_parallel_for parallel_for) {
  Guards guards(windows, side);
  const gossamer_input x{guards.q.data(), GOSSAMER_UINT8, windows.c.images, 0,
                         &windows.c,      kX.scale,       kX.zero,          0};
  const gossamer_output to{guards.y.data(),    windows.n(),     0,      guards.bias.data(),
                           windows.activation, &guards.blocked, nullptr};
  require_ok(gossamer_conv_int8(&x, &guards.w, &to, parallel_for));
  guards.compare(nullptr);
  return guards.y.values();
}

void kernel_alone(const Kernels& table, const Windows& windows, Side side, Range rows) {
  Guards guards(windows, side);
  const gossamer_conv& c = windows.c;
  const Range pixels{rows.begin * c.out_w, rows.end * c.out_w};
  Guarded<char> scratch(depthwise_scratch(c, guards.w.k, pixels.end - pixels.begin), side);
  const ImageTile x{guards.q.data(), c, {kX.scale, kX.zero}, pixels};
  const ImageDestination to{{guards.y.data(), windows.out_pixels(), GOSSAMER_FLOAT32,
                             guards.bias.data(), windows.activation},
                            false,
                            &guards.blocked};
  table.conv_int8(x, guards.w, {0, ceil_div(guards.w.n, kPanel)}, to, scratch.data());
  guards.compare(&rows);
}

// Rows of the first image as floats, in either layout.
void floats_alone(const Kernels& table, const Windows& windows, Side side, Range rows,
                  bool planar) {
  Guards guards(windows, side);
  const gossamer_conv& c = windows.c;
  const int64_t n = windows.n(), plane = windows.out_pixels();
  const Range pixels{rows.begin * c.out_w, rows.end * c.out_w};
  Guarded<char> scratch(depthwise_scratch(c, guards.w.k, pixels.end - pixels.begin), side);
  Guarded<float> y(n * plane, side);
  const ImageTile x{guards.q.data(), c, {kX.scale, kX.zero}, pixels};
  const ImageDestination to{
      {y.data(), planar ? plane : n, GOSSAMER_FLOAT32, guards.bias.data(), windows.activation},
      planar,
      nullptr};
  table.conv_int8(x, guards.w, {0, ceil_div(n, kPanel)}, to, scratch.data());
  for (int64_t o = 0; o < n; ++o) {
    for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel) {
      const double got = y.data()[planar ? o * plane + pixel : pixel * n + o],
                   want = windows.value(0, o, pixel);
      require(fabs(got - want) <= 1e-5 * (1 + fabs(want)), "depthwise: another float");
    }
  }
}

gossamer_conv conv_of(int64_t images, int64_t channels, int64_t height, int64_t width,
                      int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t dilation,
                      int64_t pad) {
  const auto out = [&](int64_t size, int64_t kernel) {
    return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
  };
  return {images,
          height,
          width,
          channels,
          kernel_h,
          kernel_w,
          stride,
          stride,
          dilation,
          dilation,
          pad,
          pad,
          out(height, kernel_h),
          out(width, kernel_w)};
}

}  // namespace

void check_depthwise(gossamer_parallel_for parallel_for, std::mt19937& random) {
  const gossamer_conv shapes[] = {
      conv_of(2, 5, 9, 11, 3, 3, 1, 1, 1),   conv_of(1, 37, 7, 7, 3, 3, 2, 1, 1),
      conv_of(1, 18, 30, 33, 3, 3, 1, 1, 1), conv_of(1, 8, 31, 70, 3, 3, 2, 1, 1),
      conv_of(1, 4, 14, 14, 5, 5, 1, 1, 2),  conv_of(3, 2, 13, 17, 5, 5, 2, 1, 2),
      conv_of(1, 6, 12, 10, 2, 3, 3, 1, 0),  conv_of(1, 3, 19, 15, 3, 2, 2, 3, 4),
      conv_of(1, 33, 1, 1, 3, 3, 1, 1, 1),   conv_of(1, 16, 5, 600, 3, 3, 1, 1, 1),
      conv_of(1, 7, 4, 4, 1, 1, 1, 1, 0),    conv_of(1, 4, 3, 3, 2, 2, 1, 1, 4),
      conv_of(1, 4, 40, 40, 7, 7, 5, 2, 11), conv_of(0, 4, 5, 5, 3, 3, 1, 1, 1),
  };
  int count = 0;
  for (const gossamer_conv& c : shapes) {
    const gossamer_activation acts[] = {GOSSAMER_NONE, GOSSAMER_RELU, GOSSAMER_RELU6};
    const Windows windows(c, acts[count++ % 3], random);
    std::vector<uint8_t> first;
    for (const Side side : kSides) {
      for (const char* const* isa = gossamer_isas(); *isa; ++isa) {
        require_ok(gossamer_use_isa(*isa));
        const std::vector<uint8_t> y = through_the_abi(windows, side, parallel_for);
        require(first.empty() || y == first,
                std::string(*isa) + ": not the bytes of the other Isas");
        first = y;
      }
      for (const Kernels* table : tables_here()) {
        if (c.images == 0) continue;
        kernel_alone(*table, windows, side, {0, c.out_h});
        kernel_alone(*table, windows, side, {c.out_h / 2, c.out_h / 2 + 1});
        for (const bool planar : {false, true}) {
          floats_alone(*table, windows, side, {0, c.out_h}, planar);
          floats_alone(*table, windows, side, {c.out_h - 1, c.out_h}, planar);
        }
      }
    }
  }
}
