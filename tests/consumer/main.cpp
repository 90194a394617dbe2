// consumer: multiplies by packed weights that Python wrote, with neither Python nor torch.
//
//   consumer FOLDER ROWS K N
//
// FOLDER holds the buffers of one Int8 and one SparseInt8 weight as raw bytes, named int8.<buffer>
// and sparse.<buffer>, and x and bias. Results are printed as hexadecimal floats, one a line: they
// lose no bit.

#include <gossamer.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

template <typename T>
std::vector<T> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const T* data = reinterpret_cast<const T*>(bytes.data());
  return {data, data + bytes.size() / sizeof(T)};
}

void require(int status) {
  if (status != GOSSAMER_OK) throw std::runtime_error(gossamer_error());
}

// Two threads of our own: the library starts none.
void on_two_threads(int64_t begin, int64_t end, int64_t, gossamer_body body, void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  std::thread other(body, begin, middle, context);
  body(middle, end, context);
  other.join();
}

void print(const std::vector<float>& y) {
  for (const float value : y) std::printf("%a\n", static_cast<double>(value));
}

void run(const std::string& folder, int64_t rows, int64_t k, int64_t n) {
  const auto x = read<float>(folder + "/x"), bias = read<float>(folder + "/bias");
  const gossamer_input input{x.data(), GOSSAMER_FLOAT32, rows, k, nullptr, 0, 0, 0};
  std::vector<float> y(static_cast<size_t>(rows * n));
  const gossamer_output output{y.data(), n, 0, bias.data(), GOSSAMER_GELU, nullptr, nullptr};

  const auto panels = read<int8_t>(folder + "/int8.panels");
  const auto scale = read<float>(folder + "/int8.scale");
  const auto wsum = read<int32_t>(folder + "/int8.wsum");
  const gossamer_int8 dense{n, k, panels.data(), scale.data(), wsum.data()};
  require(gossamer_gemm_int8(&input, &dense, &output, on_two_threads));
  print(y);

  const auto columns = read<uint8_t>(folder + "/sparse.columns");
  const auto index_rows = read<uint16_t>(folder + "/sparse.rows");
  const auto cells = read<int32_t>(folder + "/sparse.cells");
  const auto values = read<int8_t>(folder + "/sparse.values");
  const auto sparse_scale = read<float>(folder + "/sparse.scale");
  const auto sparse_wsum = read<int32_t>(folder + "/sparse.wsum");
  gossamer_sparse_int8 sparse{{n, k, int64_t(columns.size()), int64_t(index_rows.size() / 2),
                               columns.data(), index_rows.data(), cells.data()},
                              values.data(),
                              sparse_scale.data(),
                              sparse_wsum.data()};
  const auto cell_count = int64_t(cells.size() / 2) - 1;
  require(gossamer_check_index(&sparse.index, cell_count, 4));
  require(gossamer_spmm_int8(&input, &sparse, &output, nullptr));
  print(y);

  sparse.index.entries -= 2;
  if (gossamer_check_index(&sparse.index, cell_count, 4) == GOSSAMER_OK)
    throw std::runtime_error("no error");
  std::printf("index: %s\n", gossamer_error());
  gossamer_int8 deep = dense;
  deep.k = 65537;
  if (gossamer_gemm_int8(&input, &deep, &output, nullptr) == GOSSAMER_OK)
    throw std::runtime_error("no error");
  std::printf("deep: %s\n", gossamer_error());
  std::printf("isa: %s, version: %s\n", gossamer_isa(), gossamer_version());
}

}  // namespace

int main(int count, char** arguments) try {
  if (count != 5) throw std::runtime_error("usage: consumer FOLDER ROWS K N");
  run(arguments[1], std::atoll(arguments[2]), std::atoll(arguments[3]), std::atoll(arguments[4]));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
