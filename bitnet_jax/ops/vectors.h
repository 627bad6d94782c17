// What kernels do with GCC's vector types; included inside the namespace of each variant, each time.

#ifndef INLINE
#define INLINE static inline __attribute__((always_inline))
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, (Ints8){__VA_ARGS__})
#endif

typedef int32_t Ints8 __attribute__((vector_size(32)));

template <class V>
INLINE V load(const void* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
INLINE void store(void* to, V value) {
  memcpy(to, &value, sizeof value);
}

// Rows and columns of 8 x 8 values of four bytes change places.
template <class V>
INLINE void transpose(V* v) {
  V a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = SHUFFLE8(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = SHUFFLE8(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = SHUFFLE8(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] = SHUFFLE8(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    v[i] = SHUFFLE8(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = SHUFFLE8(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

#undef SHUFFLE8
