// module.cpp: gossamer._C: CPU information, the check of an index, and the C ABI on raw pointers,
// which lets a microbenchmark call a product with neither torch's dispatcher nor an allocation in
// between.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gossamer.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(int status) {
  if (status != GOSSAMER_OK) throw std::invalid_argument(gossamer_error());
}

std::string isa() {
  const char* name = gossamer_isa();
  if (!name) throw std::invalid_argument(gossamer_error());
  return name;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const char* const* name = gossamer_isas(); *name; ++name) names.push_back(*name);
  return names;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if defined(__x86_64__)
#define GOSSAMER_FEATURE(name) \
  if (__builtin_cpu_supports(name)) names.push_back(name)
  GOSSAMER_FEATURE("sse4.2");
  GOSSAMER_FEATURE("avx");
  GOSSAMER_FEATURE("avx2");
  GOSSAMER_FEATURE("fma");
  GOSSAMER_FEATURE("f16c");
  GOSSAMER_FEATURE("avxvnni");
  GOSSAMER_FEATURE("avx512f");
  GOSSAMER_FEATURE("avx512bw");
  GOSSAMER_FEATURE("avx512dq");
  GOSSAMER_FEATURE("avx512vl");
  GOSSAMER_FEATURE("avx512vnni");
#undef GOSSAMER_FEATURE
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) names.push_back("asimddp");
#endif
  return names;
}

gossamer_index index_at(int64_t n, int64_t k, int64_t entries, int64_t row_count, Address columns,
                        Address rows, Address cells) {
  return {n,
          k,
          entries,
          row_count,
          pointer<const uint8_t>(columns),
          pointer<const uint16_t>(rows),
          pointer<const int32_t>(cells)};
}

// float32 rows, no bias, no activation, this thread.
struct Call {
  gossamer_input x;
  gossamer_output y;
  Call(Address x, int64_t rows, int64_t k, Address y, int64_t n)
      : x{pointer<const void>(x), GOSSAMER_FLOAT32, rows, k, nullptr, 0, 0, 0},
        y{pointer<void>(y), n, 0, nullptr, GOSSAMER_NONE, nullptr, nullptr} {}
};

void define_products(py::module_& m) {
  const auto free_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "gemm_int8",
      [](Address x, int64_t rows, int64_t k, Address panels, Address scale, Address wsum, Address y,
         int64_t n) {
        const Call call(x, rows, k, y, n);
        const gossamer_int8 w{n, k, pointer<const int8_t>(panels), pointer<const float>(scale),
                              pointer<const int32_t>(wsum)};
        require(gossamer_gemm_int8(&call.x, &w, &call.y, nullptr));
      },
      free_gil);
  m.def(
      "gemm_w8",
      [](Address x, int64_t rows, int64_t k, Address panels, Address scale, Address y, int64_t n) {
        const Call call(x, rows, k, y, n);
        const gossamer_int8 w{n, k, pointer<const int8_t>(panels), pointer<const float>(scale),
                              nullptr};
        require(gossamer_gemm_w8(&call.x, &w, &call.y, nullptr));
      },
      free_gil);
  m.def(
      "gemm_int4",
      [](Address x, int64_t rows, int64_t k, Address panels, Address group_scale, Address scale,
         Address wsum, int64_t group, Address y, int64_t n) {
        const Call call(x, rows, k, y, n);
        const gossamer_int4 w{n,
                              k,
                              group,
                              pointer<const uint8_t>(panels),
                              pointer<const int8_t>(group_scale),
                              pointer<const float>(scale),
                              pointer<const int32_t>(wsum)};
        require(gossamer_gemm_int4(&call.x, &w, &call.y, nullptr));
      },
      free_gil);
  m.def(
      "spmm",
      [](Address x, int64_t rows, int64_t k, Address values, Address columns, Address index_rows,
         Address cells, int64_t entries, int64_t row_count, Address y, int64_t n) {
        const Call call(x, rows, k, y, n);
        const gossamer_sparse w{index_at(n, k, entries, row_count, columns, index_rows, cells),
                                pointer<const float>(values)};
        require(gossamer_spmm(&call.x, &w, &call.y, nullptr));
      },
      free_gil);
  m.def(
      "spmm_int8",
      [](Address x, int64_t rows, int64_t k, Address values, Address columns, Address index_rows,
         Address cells, int64_t entries, int64_t row_count, Address scale, Address wsum, Address y,
         int64_t n) {
        const Call call(x, rows, k, y, n);
        const gossamer_sparse_int8 w{index_at(n, k, entries, row_count, columns, index_rows, cells),
                                     pointer<const int8_t>(values), pointer<const float>(scale),
                                     pointer<const int32_t>(wsum)};
        require(gossamer_spmm_int8(&call.x, &w, &call.y, nullptr));
      },
      free_gil);
}

// -> (work, mean), see gossamer_ceiling.
PyObject* dict_of(py::handle object) {
  if (!PyDict_Check(object.ptr())) throw py::type_error("facts are about dicts");
  return object.ptr();
}
PyObject* dict_of_fact(py::handle fact) {
  if (!PyTuple_Check(fact.ptr()) || PyTuple_GET_SIZE(fact.ptr()) == 0)
    throw py::type_error("a fact is a tuple of a dict, and of keys and values");
  return PyTuple_GET_ITEM(fact.ptr(), 0);
}

// Kernels have pushed it all out of the caches. It comes back side by side, not one line after the
// other (ResNet-50: 110 -> 58 us).
void fetch(const py::list& facts, const py::list& empty) {
  for (const py::handle fact : facts) __builtin_prefetch(dict_of_fact(fact));
  for (const py::handle mapping : empty) __builtin_prefetch(mapping.ptr());
  for (const py::handle fact : facts) {
    const auto* dict = reinterpret_cast<PyDictObject*>(dict_of(dict_of_fact(fact)));
    const auto* keys = reinterpret_cast<const char*>(dict->ma_keys);
    for (int line = 0; line < 256; line += 64) __builtin_prefetch(keys + line);
  }
}

// Whether each fact, (a dict, then keys and what they stand for in it), is so, None standing for
// nothing too; and whether all of the dicts in `empty` are. One call: fuse asks before each forward.
bool holds(const py::list& facts, const py::list& empty) {
  fetch(facts, empty);
  for (const py::handle fact : facts) {
    for (Py_ssize_t i = 1; i + 1 < PyTuple_GET_SIZE(fact.ptr()); i += 2) {
      PyObject *const found = PyDict_GetItemWithError(dict_of_fact(fact),
                                                      PyTuple_GET_ITEM(fact.ptr(), i)),
                      *const wanted = PyTuple_GET_ITEM(fact.ptr(), i + 1);
      if (PyErr_Occurred()) throw py::error_already_set();
      if ((found ? found : Py_None) != wanted) return false;
    }
  }
  for (const py::handle mapping : empty)
    if (PyDict_GET_SIZE(dict_of(mapping)) != 0) return false;
  return true;
}

std::pair<double, float> ceiling(int loop, Address data, int64_t bytes, int64_t turns) {
  double work = 0;
  float mean = 0;
  require(gossamer_ceiling(static_cast<gossamer_loop>(loop), pointer<const int32_t>(data), bytes,
                           turns, &work, &mean));
  return {work, mean};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C ABI of libgossamer on raw pointers.";
  m.def("isa", &isa, "Name of the instruction set in use.");
  m.def("isas", &isas, "Names of the instruction sets this CPU can run, best first.");
  m.def("cpu_features", &cpu_features,
        "The features of this CPU that choose among instruction sets.");
  m.def("version", &gossamer_version);
  m.def("use_isa", [](const std::string& name) {
    if (gossamer_use_isa(name.c_str()) != GOSSAMER_OK) {
      throw std::invalid_argument("this CPU cannot run the instruction set '" + name + "'");
    }
  });

  m.def("cell_count", &gossamer_cell_count, py::arg("n"), py::arg("k"), py::arg("unit"));
  m.def("block_columns", &gossamer_block_columns, py::arg("unit"));
  m.def("chunk_rows", &gossamer_chunk_rows, py::arg("n"));
  m.def("check_index", [](int64_t n, int64_t k, int64_t entries, int64_t row_count, Address columns,
                          Address rows, Address cells, int64_t cell_count, int64_t unit) {
    const gossamer_index index = index_at(n, k, entries, row_count, columns, rows, cells);
    require(gossamer_check_index(&index, cell_count, unit));
  });
  define_products(m);
  m.def("holds", &holds, py::arg("facts"), py::arg("empty"));
  m.def("ceiling", &ceiling, py::arg("loop"), py::arg("data"), py::arg("bytes"), py::arg("turns"),
        py::call_guard<py::gil_scoped_release>());
}
