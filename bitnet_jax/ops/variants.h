// Variants of an op: the same code compiled once for each instruction set.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

// Between BEGIN("avx2") and END functions may use that instruction set.
#define TEXT(x) #x
#if defined(__clang__)
#define BEGIN(isa) _Pragma(TEXT(clang attribute push(__attribute__((target(isa))), apply_to = function)))
#define END _Pragma("clang attribute pop")
#else
#define BEGIN(isa) _Pragma("GCC push_options") _Pragma(TEXT(GCC target(isa)))
#define END _Pragma("GCC pop_options")
#endif

// The lowest 16 bits, in a register of their own: in place they would need a copy first, and
// instructions are scarce where indices are looked up.
static inline uint64_t low_half(uint64_t word) {
#if defined(__x86_64__)
  uint64_t low;
  asm("movzwl %w1, %k0" : "=r"(low) : "r"(word));
  return low;
#else
  return word & 0xffff;
#endif
}

// The variant of that name, if this CPU runs it. A library has one table of variants.
template <class Variant, size_t N>
const Variant* find_in(const Variant (&variants)[N], std::string_view name) {
  // Asked once, not a product: in a virtual machine CPUID is a trap to its host.
  static const auto runs = [&] {
    std::array<bool, N> runs;
    for (size_t i = 0; i < N; i++) runs[i] = variants[i].runs_here();
    return runs;
  }();
  for (size_t i = 0; i < N; i++)
    if (variants[i].name == name) return runs[i] ? &variants[i] : nullptr;
  return nullptr;
}

// Name of variant i, or null where there are no more.
template <class Variant, size_t N>
const char* name_in(const Variant (&variants)[N], int i) {
  return i < int(N) ? variants[i].name : nullptr;
}
