// table.cpp: the kernels of one Isa.

#include GOSSAMER_SIMD
#include "kernels.h"

#define GOSSAMER_TEXT_(name) #name
#define GOSSAMER_TEXT(name) GOSSAMER_TEXT_(name)

namespace gossamer {
namespace GOSSAMER_ISA {

QuantizeRows quantize_rows;
GemmInt8 gemm_int8;
GemmW8 gemm_w8;
GemmInt4 gemm_int4;
Spmm spmm;
SpmmInt8 spmm_int8;
Sddmm sddmm;
Im2col im2col;
ConvInt8 conv_int8;
ConvInt8 winograd;
ConvSpmmInt8 conv_spmm_int8;
Block block;
Unblock unblock;
MaxPool max_pool;
Mean mean;
Ceilings ceilings;

const Kernels kernels = {GOSSAMER_TEXT(GOSSAMER_ISA),
                         kLanes,
                         kWideK,
                         kWinogradCost,
                         quantize_rows,
                         gemm_int8,
                         gemm_w8,
                         gemm_int4,
                         spmm,
                         spmm_int8,
                         sddmm,
                         im2col,
                         conv_int8,
                         winograd,
                         conv_spmm_int8,
                         block,
                         unblock,
                         max_pool,
                         mean,
                         ceilings};

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
