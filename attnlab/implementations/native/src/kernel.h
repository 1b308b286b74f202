// What kernel.cc exports, once for each instruction set that it is compiled for.
//
// Rules for kernel.cc and for what it includes:
// * everything of its own is in namespace attnlab::ATTNLAB_ISA, so that no two
//   instruction sets share a symbol;
// * nothing runs when the library is loaded (no dynamic initialisers): the processor may
//   lack the instructions;
// * inline functions and templates of the standard library are shared between the
//   instruction sets; the linker keeps the first, and build.py links the lowest first.

#ifndef ATTNLAB_KERNEL_H_
#define ATTNLAB_KERNEL_H_

#include <cstdint>

namespace attnlab {

struct Kernel {
  // A stub, until there is a kernel: copies bytes.
  void (*copy)(const uint8_t* from, uint8_t* to, int64_t size);
};

// ATTNLAB_ISAS(X), from build.py, is X(isa) for each instruction set, the lowest first.
#define ATTNLAB_DECLARE(isa) \
  namespace isa {            \
  extern const Kernel kernel; \
  }
ATTNLAB_ISAS(ATTNLAB_DECLARE)
#undef ATTNLAB_DECLARE

}  // namespace attnlab

#endif  // ATTNLAB_KERNEL_H_
