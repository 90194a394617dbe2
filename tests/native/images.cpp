// images.cpp: blocked images, through the C ABI and as kernels alone, against plain loops.

#include "kernels.h"
#include "native.h"

namespace {

using namespace gossamer;

int64_t blocks_of(int64_t channels) { return (channels + 3) / 4; }

// Byte (image, channel, pixel) of a blocked image.
int64_t place(int64_t channels, int64_t pixels, int64_t image, int64_t channel, int64_t pixel) {
  return ((image * blocks_of(channels) + channel / 4) * pixels + pixel) * 4 + channel % 4;
}

// How y is quantized, and what is added to it.
const Quantized kY(0x1p-5f, 131), kResidual(0x1p-7f, 19);

// The images of a product with a range, in every form, and what comes of them.
struct Images {
  const Product& p;
  const gossamer_conv& c;
  int64_t pixels, out_pixels;
  std::vector<uint8_t> residual;
  std::vector<double> expected_y;  // as bytes, before they are rounded

  explicit Images(const Product& product)
      : p(product), c(*product.conv), pixels(c.height * c.width), out_pixels(c.out_h * c.out_w) {
    std::mt19937 random(4);
    const int64_t n = p.weight.n;
    for (int64_t at = 0; at < c.images * blocks_of(n) * out_pixels * 4; ++at) {
      const int64_t plane = at / 4 / out_pixels, o = plane % blocks_of(n) * 4 + at % 4,
                    line = plane / blocks_of(n) * out_pixels + at / 4 % out_pixels;
      residual.push_back(static_cast<uint8_t>(o < n ? random() : kResidual.zero));
      expected_y.push_back(o < n ? expected_byte(line, o, residual.back()) : kY.zero);
    }
  }
  double expected_byte(int64_t line, int64_t o, int byte) const {
    const float more = static_cast<float>(byte - kResidual.zero) * kResidual.scale;
    const Expected e = expected(p.lines[size_t(line)], p.weight, o, Arithmetic::kInt8,
                                p.bias[size_t(o)] + more, p.activation);
    return std::clamp(e.y / kY.scale + kY.zero, 0.0, 255.0);
  }

  float at(int64_t image, int64_t channel, int64_t pixel) const {
    return p.x.at(image, pixel * c.channels + channel);
  }
  std::vector<uint8_t> blocked() const {
    std::vector<uint8_t> q(static_cast<size_t>(c.images * blocks_of(c.channels) * pixels * 4),
                           static_cast<uint8_t>(p.given.zero));
    for (int64_t i = 0; i < c.images; ++i)
      for (int64_t ch = 0; ch < c.channels; ++ch)
        for (int64_t x = 0; x < pixels; ++x)
          q[size_t(place(c.channels, pixels, i, ch, x))] = p.given(at(i, ch, x));
    return q;
  }
  std::vector<char> planar() const {
    const int64_t size = size_of(p.dtype);
    std::vector<char> bytes(static_cast<size_t>(c.images * c.channels * pixels * size));
    for (int64_t i = 0; i < c.images; ++i)
      for (int64_t ch = 0; ch < c.channels; ++ch)
        for (int64_t x = 0; x < pixels; ++x)
          encode(at(i, ch, x), p.dtype,
                 &bytes[size_t(((i * c.channels + ch) * pixels + x) * size)]);
    return bytes;
  }
  gossamer_input view(const void* data, gossamer_dtype dtype, int planar) const {
    return {data, dtype, c.images, c.channels * pixels, &c, p.given.scale, p.given.zero, planar};
  }
};

void check_block(const Images& images, Side side, gossamer_parallel_for parallel_for) {
  const Product& p = images.p;
  const std::vector<uint8_t> expected = images.blocked();
  const Guarded<char> last(p.encoded_x(), side), planar(images.planar(), side);
  for (const bool is_planar : {false, true}) {
    Guarded<uint8_t> q(static_cast<int64_t>(expected.size()), side);
    const gossamer_input x =
        images.view(is_planar ? planar.data() : last.data(), p.dtype, is_planar);
    require_ok(gossamer_block(&x, images.c.channels, images.pixels, q.data(), parallel_for));
    require(q.values() == expected, "block: another byte");
  }
  const Guarded<uint8_t> q(expected, side);
  Guarded<float> y(images.c.images * images.c.channels * images.pixels, side);
  const gossamer_input input = images.view(q.data(), GOSSAMER_UINT8, 0);
  require_ok(gossamer_unblock(&input, images.c.channels, images.pixels, y.data(), GOSSAMER_FLOAT32,
                              parallel_for));
  for (int64_t i = 0; i < images.c.images; ++i)
    for (int64_t ch = 0; ch < images.c.channels; ++ch)
      for (int64_t x = 0; x < images.pixels; ++x) {
        const int byte = expected[size_t(place(images.c.channels, images.pixels, i, ch, x))];
        require(y.data()[(i * images.c.channels + ch) * images.pixels + x] ==
                    static_cast<float>(byte - p.given.zero) * p.given.scale,
                "unblock: another float");
      }
  Guarded<float> means(images.c.images * images.c.channels, side);
  require_ok(gossamer_mean(&input, images.c.channels, images.pixels, means.data(), parallel_for));
  for (int64_t i = 0; i < images.c.images; ++i)
    for (int64_t ch = 0; ch < images.c.channels; ++ch) {
      int64_t sum = 0;
      for (int64_t x = 0; x < images.pixels; ++x)
        sum += expected[size_t(place(images.c.channels, images.pixels, i, ch, x))] - p.given.zero;
      const double step = double(p.given.scale) / double(images.pixels);
      require(means.data()[i * images.c.channels + ch] == static_cast<float>(double(sum) * step),
              "mean: another float");
    }
}

// body(pixel of the image) for what lies under the window of an output pixel.
template <typename Body>
void each_tap(const gossamer_conv& c, int64_t pixel, Body body) {
  for (int64_t tap = 0; tap < c.kernel_h * c.kernel_w; ++tap) {
    const int64_t row = pixel / c.out_w * c.stride_h - c.pad_top + tap / c.kernel_w * c.dilation_h,
                  column =
                      pixel % c.out_w * c.stride_w - c.pad_left + tap % c.kernel_w * c.dilation_w;
    if (row >= 0 && row < c.height && column >= 0 && column < c.width) body(row * c.width + column);
  }
}

void check_max_pool_of_floats(const Images& images, Side side, gossamer_parallel_for parallel_for) {
  const gossamer_conv& c = images.c;
  const int64_t planes = c.images * c.channels;
  for (const bool planar : {true, false}) {
    std::vector<float> values(static_cast<size_t>(planes * images.pixels));
    for (int64_t at = 0; at < planes * images.pixels; ++at) {
      const int64_t image = at / images.pixels / c.channels,
                    channel = at / images.pixels % c.channels, pixel = at % images.pixels;
      const int64_t innermost = (image * images.pixels + pixel) * c.channels + channel;
      values[size_t(planar ? at : innermost)] = images.at(image, channel, pixel);
    }
    const Guarded<float> x(values, side);
    Guarded<float> y(planes * images.out_pixels, side);
    const gossamer_input input = images.view(x.data(), GOSSAMER_FLOAT32, planar);
    require_ok(gossamer_max_pool(&input, y.data(), parallel_for));
    for (int64_t at = 0; at < planes * images.out_pixels; ++at) {
      const int64_t plane = at / images.out_pixels, pixel = at % images.out_pixels;
      float largest = -INFINITY;
      each_tap(c, pixel, [&](int64_t at_pixel) {
        const float value = images.at(plane / c.channels, plane % c.channels, at_pixel);
        largest = std::max(largest, value);
      });
      require(y.data()[at] == largest, "max_pool: not the largest float");
    }
  }
}

void check_max_pool(const Images& images, Side side, gossamer_parallel_for parallel_for) {
  const gossamer_conv& c = images.c;
  const std::vector<uint8_t> bytes = images.blocked();
  const Guarded<uint8_t> q(bytes, side);
  Guarded<uint8_t> y(c.images * blocks_of(c.channels) * images.out_pixels * 4, side);
  const gossamer_input input = images.view(q.data(), GOSSAMER_UINT8, 0);
  require_ok(gossamer_max_pool(&input, y.data(), parallel_for));
  for (int64_t at = 0; at < c.images * blocks_of(c.channels) * images.out_pixels * 4; ++at) {
    const int64_t plane = at / 4 / images.out_pixels, pixel = at / 4 % images.out_pixels;
    int largest = 0;
    each_tap(c, pixel, [&](int64_t at_pixel) {
      const int64_t from = (plane * images.pixels + at_pixel) * 4 + at % 4;
      largest = std::max<int>(largest, bytes[static_cast<size_t>(from)]);
    });
    require(y.data()[at] == largest, "max_pool: not the largest");
  }
  check_max_pool_of_floats(images, side, parallel_for);
}

// One convolution between blocked images: what its bytes must be near to, and are.
class Chain {
 public:
  Chain(const Images& images, Arithmetic arithmetic, const Operands& operands, Side side)
      : images_(images),
        arithmetic_(arithmetic),
        operands_(operands),
        side_(side),
        q_(images.blocked(), side),
        residual_(images.residual, side),
        bias_(images.p.bias, side),
        quantized_{kY.scale, kY.zero, residual_.data(), kResidual.scale, kResidual.zero} {}

  std::vector<uint8_t> through_the_abi(gossamer_parallel_for parallel_for) const {
    Guarded<uint8_t> y(bytes(), side_);
    const gossamer_input x = images_.view(q_.data(), GOSSAMER_UINT8, 0);
    const gossamer_output to{y.data(),    n(),    0, bias_.data(), images_.p.activation,
                             &quantized_, nullptr};
    const gossamer_int8 dense = operands_.int8();
    const gossamer_sparse_int8 sparse = operands_.sparse_int8();
    require_ok(arithmetic_ == Arithmetic::kInt8
                   ? gossamer_conv_int8(&x, &dense, &to, parallel_for)
                   : gossamer_conv_spmm_int8(&x, &sparse, &to, parallel_for));
    compare(y.values(), images_.c.images, {0, images_.out_pixels});
    return y.values();
  }

  // Some pixels of the first image, by the kernel alone.
  void alone(const Kernels& table, Range pixels) const {
    const int64_t k = images_.p.weight.k, count = pixels.end - pixels.begin;
    const bool is_dense = arithmetic_ == Arithmetic::kInt8;
    Guarded<uint8_t> y(bytes(), side_);
    Guarded<char> scratch(
        is_dense ? conv_int8_scratch(k, count) : conv_spmm_int8_scratch(n(), k, count), side_);
    const ImageTile x = tile(pixels);
    const ImageDestination to = destination(y);
    if (is_dense) {
      table.conv_int8(x, operands_.int8(), {0, ceil_div(n(), kPanel)}, to, scratch.data());
    } else {
      table.conv_spmm_int8(x, operands_.sparse_int8(), {0, chunk_count(n())}, to, scratch.data());
    }
    compare(y.values(), 1, pixels);
  }

  // Some rows of the first `count` images; panels one by one, the pixels of the first serve all.
  void winograd(const Kernels& table, int64_t count, Range rows) const {
    const gossamer_conv& c = images_.c;
    Guarded<uint8_t> y(bytes(), side_);
    Guarded<char> scratch(winograd_scratch(c, count, rows.end - rows.begin).end * 4, side_);
    ImageTile x = tile({rows.begin * c.out_w, rows.end * c.out_w});
    x.images = count;
    for (int64_t p = 0; p < ceil_div(n(), kPanel); ++p, x.gathered = true)
      table.winograd(x, operands_.int8(), {p, p + 1}, destination(y), scratch.data());
    compare(y.values(), count, x.pixels);
  }

 private:
  int64_t n() const { return images_.p.weight.n; }
  int64_t image_bytes() const { return blocks_of(n()) * images_.out_pixels * 4; }
  int64_t bytes() const { return images_.c.images * image_bytes(); }
  ImageTile tile(Range pixels) const {
    return {q_.data(), images_.c, {images_.p.given.scale, images_.p.given.zero}, pixels};
  }
  ImageDestination destination(Guarded<uint8_t>& y) const {
    return {{y.data(), images_.out_pixels, GOSSAMER_FLOAT32, bias_.data(), images_.p.activation},
            false,
            &quantized_,
            false,
            image_bytes()};
  }
  // `pixels` of the first `count` images; the others were not written.
  void compare(const std::vector<uint8_t>& y, int64_t count, Range pixels) const {
    for (size_t at = 0; at < y.size(); ++at) {
      const int64_t word = static_cast<int64_t>(at / 4), pixel = word % images_.out_pixels;
      const bool written = word < count * blocks_of(n()) * images_.out_pixels &&
                           pixel >= pixels.begin && pixel < pixels.end;
      const double want = written ? images_.expected_y[at] : Guarded<uint8_t>::kFill;
      require(fabs(y[at] - want) <= (written ? 0.502 : 0), "conv: another byte");
    }
  }

  const Images& images_;
  Arithmetic arithmetic_;
  const Operands& operands_;
  Side side_;
  Guarded<uint8_t> q_, residual_;
  Guarded<float> bias_;
  gossamer_blocked quantized_;
};

// Floats of either layout, and bytes, give the same floats.
void check_inputs(const Images& images, Arithmetic arithmetic, const Operands& operands,
                  Side side) {
  const Product& p = images.p;
  const Guarded<char> last(p.encoded_x(), side), planar(images.planar(), side);
  const Guarded<uint8_t> q(images.blocked(), side);
  const Guarded<float> bias(p.bias, side);
  std::vector<char> first;
  for (const gossamer_input& x :
       {images.view(last.data(), p.dtype, 0), images.view(planar.data(), p.dtype, 1),
        images.view(q.data(), GOSSAMER_UINT8, 0)}) {
    if (x.dtype == GOSSAMER_UINT8 && p.dtype != GOSSAMER_FLOAT32) continue;
    Guarded<char> y(p.y_extent() * size_of(p.dtype), side);
    const gossamer_output to{y.data(),     p.weight.n, p.planar, bias.data(),
                             p.activation, nullptr,    nullptr};
    const gossamer_int8 dense = operands.int8();
    const gossamer_sparse_int8 sparse = operands.sparse_int8();
    require_ok(arithmetic == Arithmetic::kInt8 ? gossamer_gemm_int8(&x, &dense, &to, nullptr)
                                               : gossamer_spmm_int8(&x, &sparse, &to, nullptr));
    require(first.empty() || y.values() == first, "conv: another layout, other bits");
    first = y.values();
  }
}

// All steps on the Isa in use; the bytes of the convolutions.
std::vector<uint8_t> check_steps(const Images& images, Side side,
                                 gossamer_parallel_for parallel_for) {
  const Operands operands(images.p.weight, side);
  std::vector<uint8_t> all;
  check_block(images, side, parallel_for);
  check_max_pool(images, side, parallel_for);
  for (const Arithmetic arithmetic : {Arithmetic::kInt8, Arithmetic::kSparseInt8}) {
    check_inputs(images, arithmetic, operands, side);
    const std::vector<uint8_t> y =
        Chain(images, arithmetic, operands, side).through_the_abi(parallel_for);
    all.insert(all.end(), y.begin(), y.end());
  }
  return all;
}

void check_kernels_alone(const Images& images, Side side) {
  if (images.c.images == 0) return;
  const Operands operands(images.p.weight, side);
  const int64_t pixels = images.out_pixels;
  for (const Arithmetic arithmetic : {Arithmetic::kInt8, Arithmetic::kSparseInt8}) {
    const Chain chain(images, arithmetic, operands, side);
    for (const Kernels* table : tables_here()) {
      const int64_t most =
          arithmetic == Arithmetic::kInt8 ? kMaxPixels + kRestPixels : sparse_pixels(table->lanes);
      chain.alone(*table, {0, std::min(pixels, most)});
      chain.alone(*table, {std::max<int64_t>(0, pixels - 7), pixels});
      const gossamer_conv& c = images.c;
      if (arithmetic != Arithmetic::kInt8 || !is_winograd(c)) continue;
      chain.winograd(*table, c.images, {0, c.out_h});
      chain.winograd(*table, 1, {c.out_h / 2, c.out_h});
    }
  }
}

}  // namespace

std::vector<uint8_t> check_images(const Product& p, gossamer_parallel_for parallel_for) {
  const Images images(p);
  std::vector<uint8_t> first;
  for (const Side side : kSides) {
    for (const char* const* isa = gossamer_isas(); *isa; ++isa) {
      require_ok(gossamer_use_isa(*isa));
      const std::vector<uint8_t> y = check_steps(images, side, parallel_for);
      require(first.empty() || y == first, std::string(*isa) + ": not the bytes of the other Isas");
      first = y;
    }
    check_kernels_alone(images, side);
  }
  return first;
}
