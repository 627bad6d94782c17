// The checks of native.cpp's variants without JAX, to run them by hand for another machine:
//
//   I=$(python -c "import jax; print(jax.ffi.include_dir())")
//   aarch64-linux-gnu-g++ -O3 -std=c++17 -w -static -I$I tests/native_check.cpp -o check
//   qemu-aarch64 -cpu max ./check; qemu-aarch64 -cpu cortex-a57 ./check    # with dotprod; without
//
// 1: right, 0: wrong, -1: cannot run here. Where a CPU lacks the VNNI variants they are checked all
// the same, but for the one instruction: DOT is then what its manual says, in plain C++.
#include "../bitnet_jax/ops/native.cpp"

#include <cstdio>

// sums[i] + the four products of unsigned and signed bytes under it, in int32 without saturation.
#define DPBUSD                                                                 \
  for (int i = 0; i < BYTES; i++) sums[i / 4] += codes[i] * int8_t(x[i]); \
  return sums;

#undef KEEP  // asks for registers of that width
#define KEEP(vector)

namespace as_avx512vnni {
#define BYTES 64
#define GROUP 4
#define AT_ONCE 2
#define DOT DPBUSD
#include "../bitnet_jax/ops/native_kernels.h"
}  // namespace as_avx512vnni

namespace as_avxvnni {
#define BYTES 32
#define GROUP 4
#define AT_ONCE 1
#define DOT DPBUSD
#include "../bitnet_jax/ops/native_kernels.h"
}  // namespace as_avxvnni

int main() {
  printf("avx512vnni without its instruction: %d\n",
         right({"", nullptr, FEW, 0, as_avx512vnni::few, as_avx512vnni::many}));
  printf("avxvnni without its instruction: %d\n",
         right({"", nullptr, FEW, 0, as_avxvnni::few, as_avxvnni::many}));
  for (const Variant& variant : kVariants)
    printf("%s: %d\n", variant.name, bitnet_check(variant.name));
}
