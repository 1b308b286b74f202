// The exported functions: XLA's FFI handlers, and those that load.py calls. This file
// is compiled for the baseline instruction set.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "isa.h"
#include "kernel.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace attnlab {
namespace {

// The kernel that attnlab_use selected, or null.
std::atomic<const Kernel*> used{nullptr};

Array array_of(void* data, ffi::DataType type, ffi::AnyBuffer::Dimensions dims) {
  // An empty array may have a null pointer, which memcpy must not get even for 0 bytes.
  static char nothing[64];
  Array array;
  array.data = data == nullptr ? nothing : data;
  array.rank = static_cast<int>(dims.size());
  std::copy(dims.begin(), dims.end(), array.dims);
  switch (type) {
    case ffi::F32: array.type = Type::f32; break;
    case ffi::BF16: array.type = Type::bf16; break;
    case ffi::F16: array.type = Type::f16; break;
    case ffi::S32: array.type = Type::i32; break;
    case ffi::U32: array.type = Type::u32; break;
    default: array.type = Type::boolean;
  }
  return array;
}

// Requests huge pages for a result. malloc maps large results anew for each call (on
// Linux, those over 32 MB), and page faults of 4 KiB each took a sixth of the time of a
// window mask over 16,384 tokens. It has no effect on systems without huge pages.
void in_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & -kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & -kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void share(void* pool, int64_t count, void (*body)(void*, int64_t), void* context) {
  parallel_for(*static_cast<ffi::ThreadPool*>(pool), count,
               [=](int64_t unit, int64_t) { body(context, unit); });
}

ffi::Error run(void (*Kernel::*pass)(const Call&), ffi::ThreadPool& pool,
               ffi::RemainingArgs& args, ffi::RemainingRets& rets,
               ffi::Span<const int64_t> program, double keep_scale, double logit_scale) {
  const Kernel* kernel = used.load();
  if (kernel == nullptr) kernel = chosen().isa.kernel;
  if (kernel == nullptr) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, chosen().refusal);
  }
  std::vector<Array> arguments, results;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto x = args.get<ffi::AnyBuffer>(i).value();
    arguments.push_back(array_of(x.untyped_data(), x.element_type(), x.dimensions()));
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto x = rets.get<ffi::AnyBuffer>(i).value();
    results.push_back(array_of(x->untyped_data(), x->element_type(), x->dimensions()));
    in_huge_pages(x->untyped_data(), x->size_bytes());
  }
  (kernel->*pass)({arguments.data(), results.data(), program.begin(), keep_scale,
                   logit_scale, {&pool, share}});
  return ffi::Error::Success();
}

ffi::Error forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   ffi::Span<const int64_t> program, double keep_scale,
                   double logit_scale) {
  return run(&Kernel::forward, pool, args, rets, program, keep_scale, logit_scale);
}

ffi::Error backward(ffi::ThreadPool pool, ffi::RemainingArgs args,
                    ffi::RemainingRets rets, ffi::Span<const int64_t> program,
                    double keep_scale, double logit_scale) {
  return run(&Kernel::backward, pool, args, rets, program, keep_scale, logit_scale);
}

ffi::Error choose(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Span<const int64_t> program, double keep_scale,
                  double logit_scale) {
  return run(&Kernel::choose, pool, args, rets, program, keep_scale, logit_scale);
}

}  // namespace
}  // namespace attnlab

#define ATTNLAB_EXPORT extern "C" __attribute__((visibility("default")))

#define ATTNLAB_HANDLER(name, function)                                  \
  ATTNLAB_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame*);                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function,                          \
                                ffi::Ffi::Bind()                         \
                                    .Ctx<ffi::ThreadPool>()              \
                                    .RemainingArgs()                     \
                                    .RemainingRets()                     \
                                    .Attr<ffi::Span<const int64_t>>("program") \
                                    .Attr<double>("keep_scale")          \
                                    .Attr<double>("logit_scale"))

ATTNLAB_HANDLER(AttnlabForward, attnlab::forward);
ATTNLAB_HANDLER(AttnlabBackward, attnlab::backward);
ATTNLAB_HANDLER(AttnlabChoose, attnlab::choose);

// The chosen instruction set; "" if ATTNLAB_NATIVE_ISA names one that cannot run.
ATTNLAB_EXPORT const char* attnlab_isa() { return attnlab::chosen().isa.name; }

// The instruction sets that were built and that this processor has, comma-separated,
// the lowest first.
ATTNLAB_EXPORT const char* attnlab_isas() {
  return attnlab::chosen().runnable.c_str();
}

// Switches this process to another instruction set; "" undoes it. Returns 0 if that
// instruction set cannot run.
ATTNLAB_EXPORT int attnlab_use(const char* isa) {
  const attnlab::Kernel* kernel = attnlab::kernel_of(isa);
  attnlab::used.store(kernel);
  return kernel != nullptr || *isa == 0;
}

// Why attnlab_isa() is "".
ATTNLAB_EXPORT const char* attnlab_refusal() {
  return attnlab::chosen().refusal.c_str();
}

// The hash of the sources, and the compiler, of this build.
ATTNLAB_EXPORT const char* attnlab_source_hash() { return ATTNLAB_SOURCE_HASH; }
ATTNLAB_EXPORT const char* attnlab_compiler() {
#if defined(__clang__)
  return __VERSION__;
#else
  return "GCC " __VERSION__;
#endif
}
