// shim.h: the functions of torch's stable C ABI (torch >= 2.10) that ops.cpp calls, declared by
// hand.
//
// torch promises that their signatures do not change; tests/test_shim.py compiles this file beside
// torch's own header, where a wrong one is an error. CMake reads the SHIM lines to make the library
// that stands in for torch at link time, so each stands on a line of its own.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct StableListOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using StableListHandle = StableListOpaque*;
using StableIValue = uint64_t;
using AOTITorchError = int32_t;

#define SHIM(type, name, arguments) type name arguments

// clang-format off
SHIM(AOTITorchError, aoti_torch_library_init_fragment, (const char* ns, const char* file, uint32_t line, TorchLibraryHandle* library));
SHIM(AOTITorchError, aoti_torch_library_init_impl, (const char* ns, const char* key, const char* file, uint32_t line, TorchLibraryHandle* library));
SHIM(AOTITorchError, aoti_torch_library_def, (TorchLibraryHandle library, const char* schema));
SHIM(AOTITorchError, torch_library_impl, (TorchLibraryHandle library, const char* name, void (*fn)(StableIValue*, uint64_t, uint64_t), uint64_t abi_version));
SHIM(AOTITorchError, aoti_torch_get_data_ptr, (AtenTensorHandle tensor, void** data));
SHIM(AOTITorchError, aoti_torch_get_dim, (AtenTensorHandle tensor, int64_t* dim));
SHIM(AOTITorchError, aoti_torch_get_sizes, (AtenTensorHandle tensor, int64_t** sizes));
SHIM(AOTITorchError, aoti_torch_get_strides, (AtenTensorHandle tensor, int64_t** strides));
SHIM(AOTITorchError, aoti_torch_get_dtype, (AtenTensorHandle tensor, int32_t* dtype));
SHIM(AOTITorchError, aoti_torch_get_device_type, (AtenTensorHandle tensor, int32_t* type));
SHIM(AOTITorchError, aoti_torch_empty_strided, (int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* tensor));
SHIM(AOTITorchError, aoti_torch_create_tensor_from_blob, (void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* tensor));
SHIM(AOTITorchError, aoti_torch_delete_tensor_object, (AtenTensorHandle tensor));
SHIM(AOTITorchError, aoti_torch_new_tensor_handle, (AtenTensorHandle tensor, AtenTensorHandle* same));
SHIM(AOTITorchError, torch_new_list_reserve_size, (size_t size, StableListHandle* list));
SHIM(AOTITorchError, torch_list_push_back, (StableListHandle list, StableIValue item));
SHIM(AOTITorchError, torch_list_size, (StableListHandle list, size_t* size));
SHIM(AOTITorchError, torch_list_get_item, (StableListHandle list, size_t index, StableIValue* item));
SHIM(AOTITorchError, torch_delete_list, (StableListHandle list));
SHIM(AOTITorchError, torch_parallel_for, (int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context));
SHIM(int32_t, aoti_torch_dtype_float32, ());
SHIM(int32_t, aoti_torch_dtype_bfloat16, ());
SHIM(int32_t, aoti_torch_dtype_float16, ());
SHIM(int32_t, aoti_torch_dtype_uint8, ());
SHIM(int32_t, aoti_torch_dtype_int8, ());
SHIM(int32_t, aoti_torch_dtype_uint16, ());
SHIM(int32_t, aoti_torch_dtype_int32, ());
SHIM(int32_t, aoti_torch_device_type_cpu, ());
// clang-format on

#undef SHIM

}  // extern "C"
