// The interface of kernel.cc, which is compiled once for each instruction set.
//
// Rules for kernel.cc and the headers that it includes:
// * all definitions but those below are in namespace attnlab::ATTNLAB_ISA, so that no
//   two instruction sets share a symbol;
// * there are no dynamic initialisers: they would run when the library is loaded, on
//   processors that may lack the instructions;
// * the instruction sets share inline functions and templates of the standard library:
//   the linker keeps the first copy, so build.py links the lowest set first.

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

// A thread pool: `run` calls body(context, unit) on it for each unit of [0, count).
struct Parallel {
  void* pool;
  void (*run)(void* pool, int64_t count, void (*body)(void*, int64_t), void* context);
};

// One pass. __init__.py and choosing.py order the arguments and results and write the
// program, with program.py; `Problem` (problem.h) reads it.
struct Call {
  const Array* args;
  const Array* rets;
  const int64_t* program;
  double keep_scale;   // 1 / (1 - dropout rate)
  double logit_scale;  // factor of all inner products
  Parallel parallel;
};

struct Kernel {
  void (*forward)(const Call&);
  void (*backward)(const Call&);
  void (*choose)(const Call&);  // the keys of an indexer, for each query
};

// build.py defines ATTNLAB_ISAS(X): X(isa) for each instruction set, the lowest first.
#define ATTNLAB_DECLARE(isa) \
  namespace isa {            \
  extern const Kernel kernel; \
  }
ATTNLAB_ISAS(ATTNLAB_DECLARE)
#undef ATTNLAB_DECLARE

}  // namespace attnlab

#endif  // ATTNLAB_KERNEL_H_
