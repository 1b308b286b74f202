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

enum class Type : int { f32, bf16, f16, i32, u32, boolean };

struct Array {
  void* data;
  Type type;
  int rank;
  int64_t dims[8];
};

// Runs body(context, unit) for each unit of [0, count), on several threads.
struct Parallel {
  void* pool;
  void (*run)(void* pool, int64_t count, void (*body)(void*, int64_t), void* context);
};

// One pass. The order of arguments and results, and the numbers of the program, are
// those of `Problem` (problem.h) and of program.py.
struct Call {
  const Array* args;
  const Array* rets;
  const int64_t* program;
  double keep_scale;   // 1 / (1 - dropout rate)
  double logit_scale;  // inner products are multiplied by it
  Parallel parallel;
};

struct Kernel {
  void (*forward)(const Call&);
  void (*backward)(const Call&);
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
