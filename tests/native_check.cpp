// The checks of native.cpp's variants without JAX, to run them by hand for another machine:
//
//   I=$(python -c "import jax; print(jax.ffi.include_dir())")
//   aarch64-linux-gnu-g++ -O3 -std=c++17 -w -static -I$I tests/native_check.cpp -o check
//   qemu-aarch64 -cpu max ./check; qemu-aarch64 -cpu cortex-a57 ./check    # with dotprod; without
//
// 1: right, 0: wrong, -1: cannot run here.
#include "../bitnet_jax/ops/native.cpp"

#include <cstdio>

int main() {
  for (const Variant& variant : kVariants)
    printf("%s: %d\n", variant.name, bitnet_check(variant.name));
}
