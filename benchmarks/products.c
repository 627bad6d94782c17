/* What products.py needs beside the products: the floor. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t Vector __attribute__((vector_size(32)));

/* Reads every byte once, as fast as one core can: eight streams, each with its prefetches. */
uint64_t read_all(const uint8_t* from, size_t bytes) {
  Vector sums[8] = {0};
  const size_t stream = bytes / 8 / 64 * 64;
  for (size_t i = 0; i < stream; i += 64)
    for (int s = 0; s < 8; s++) {
      const uint8_t* at = from + s * stream + i;
      Vector a, b;
      __builtin_prefetch(at + 512);
      memcpy(&a, at, 32), memcpy(&b, at + 32, 32);
      sums[s] ^= a ^ b;
    }
  for (int s = 1; s < 8; s++) sums[0] ^= sums[s];
  return sums[0][0] ^ sums[0][1] ^ sums[0][2] ^ sums[0][3];
}
