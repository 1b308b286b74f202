// Chooses the instruction set, once, on first use: the highest that this processor has,
// or the one that the environment variable ATTNLAB_NATIVE_ISA names.

#ifndef ATTNLAB_ISA_H_
#define ATTNLAB_ISA_H_

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace attnlab {

struct Isa {
  const char* name;
  const Kernel* kernel;  // null if ATTNLAB_NATIVE_ISA cannot be used
};

namespace isa_internal {

// Reads cpuid: __builtin_cpu_supports needs a runtime that not every compiler links.
inline bool processor_has(const std::string& isa) {
  if (isa == "baseline") return true;
#if defined(__x86_64__)
  uint32_t eax, ebx, ecx, edx, most;
  const auto bit = [](uint32_t word, int place) { return (word >> place & 1) != 0; };
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const bool fma = bit(ecx, 12), saves = bit(ecx, 27), f16c = bit(ecx, 29);
  if (!saves || !__get_cpuid_count(7, 0, &most, &ebx, &ecx, &edx)) return false;
  const bool avx2 = bit(ebx, 5), bmi2 = bit(ebx, 8);
  const bool avx512 = bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);
  const bool bf16 =
      most >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && bit(eax, 5);
  uint32_t low, high;  // XCR0: which registers the operating system saves
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool has_avx2 = avx2 && bmi2 && fma && f16c && (low & 0x06) == 0x06;
  const bool has_avx512 = has_avx2 && avx512 && (low & 0xe6) == 0xe6;
  if (isa == "avx2") return has_avx2;
  if (isa == "avx512") return has_avx512;
  if (isa == "avx512bf16") return has_avx512 && bf16;
#endif
  return false;
}

struct Choice {
  Isa isa{"", nullptr};
  std::string runnable;  // built and supported here, comma-separated, lowest first
  std::string refusal;   // why none was chosen, or empty
};

inline Choice choose() {
  Choice choice;
  std::string built;
  const char* forced = std::getenv("ATTNLAB_NATIVE_ISA");
  const std::string wanted = forced == nullptr ? "" : forced;
  const auto consider = [&](const char* name, const Kernel* kernel) {
    built += (built.empty() ? "" : ", ") + std::string(name);
    if (!processor_has(name)) return;
    choice.runnable += (choice.runnable.empty() ? "" : ",") + std::string(name);
    if (wanted.empty() || wanted == name) choice.isa = {name, kernel};
  };
#define ATTNLAB_CONSIDER(isa) consider(#isa, &isa::kernel);
  ATTNLAB_ISAS(ATTNLAB_CONSIDER)
#undef ATTNLAB_CONSIDER
  if (choice.isa.kernel == nullptr) {
    const bool known = (", " + built + ",").find(", " + wanted + ",") != built.npos;
    choice.refusal =
        "ATTNLAB_NATIVE_ISA=" + wanted +
        (known ? ": this processor lacks it; it has " + choice.runnable
               : ": it was built for " + built);
  }
  return choice;
}

}  // namespace isa_internal

inline const isa_internal::Choice& chosen() {
  static const isa_internal::Choice choice = isa_internal::choose();
  return choice;
}

// The kernel of an instruction set by name; null if it was not built or cannot run.
inline const Kernel* kernel_of(const std::string& wanted) {
  const Kernel* found = nullptr;
#define ATTNLAB_FIND(isa)                                                  \
  if (wanted == #isa && isa_internal::processor_has(#isa)) found = &isa::kernel;
  ATTNLAB_ISAS(ATTNLAB_FIND)
#undef ATTNLAB_FIND
  return found;
}

}  // namespace attnlab

#endif  // ATTNLAB_ISA_H_
