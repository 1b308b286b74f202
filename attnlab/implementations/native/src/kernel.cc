// Compiled once for each instruction set; see kernel.h.

#include "kernel.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

void copy(const uint8_t* from, uint8_t* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = from[i];
}

}  // namespace

extern const Kernel kernel = {copy};

}  // namespace ATTNLAB_ISA
}  // namespace attnlab
