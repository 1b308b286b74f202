// The library's face: XLA's handlers, and what load.py asks. Compiled for the baseline.

#include <algorithm>
#include <cstdint>

#include "isa.h"
#include "kernel.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace attnlab {
namespace {

// A stub, until there is a kernel: output = query.
ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer query,
                   ffi::Result<ffi::AnyBuffer> output) {
  const Kernel* kernel = chosen().isa.kernel;
  if (kernel == nullptr) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, chosen().refusal);
  }
  if (query.size_bytes() != output->size_bytes()) {
    return ffi::Error::InvalidArgument("query and output differ in size");
  }
  const auto* from = static_cast<const uint8_t*>(query.untyped_data());
  auto* to = static_cast<uint8_t*>(output->untyped_data());
  const int64_t size = static_cast<int64_t>(query.size_bytes());
  constexpr int64_t kUnit = 4096;
  parallel_for(pool, (size + kUnit - 1) / kUnit, [&](int64_t unit, int64_t) {
    const int64_t start = unit * kUnit;
    kernel->copy(from + start, to + start, std::min(kUnit, size - start));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace attnlab

#define ATTNLAB_EXPORT extern "C" __attribute__((visibility("default")))

ATTNLAB_EXPORT XLA_FFI_Error* AttnlabForward(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(AttnlabForward, attnlab::forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

ATTNLAB_EXPORT XLA_FFI_Error* AttnlabBackward(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(AttnlabBackward, attnlab::forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// The instruction set that runs, or "" where the one asked for cannot.
ATTNLAB_EXPORT const char* attnlab_isa() { return attnlab::chosen().isa.name; }

// Those that were built and that this processor has, comma-separated, the lowest first.
ATTNLAB_EXPORT const char* attnlab_isas() {
  return attnlab::chosen().runnable.c_str();
}

// Why attnlab_isa() is "".
ATTNLAB_EXPORT const char* attnlab_refusal() {
  return attnlab::chosen().refusal.c_str();
}

// What it was built from, and with.
ATTNLAB_EXPORT const char* attnlab_source_hash() { return ATTNLAB_SOURCE_HASH; }
ATTNLAB_EXPORT const char* attnlab_compiler() {
#if defined(__clang__)
  return __VERSION__;
#else
  return "GCC " __VERSION__;
#endif
}
