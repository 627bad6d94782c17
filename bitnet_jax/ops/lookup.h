// Sums of four inputs, computed once and looked up; included inside the namespace of each variant.
//
// Four ternary codes have 81 values. For ROWS rows of x and four inputs all 81 sums are computed
// once, an addition each, and serve every output, whose codes choose the one that is added. So one
// addition and one load stand for four products, in int16 and in float alike, where multiplying
// bytes takes AVX2 two instructions for two. Loading is the limit: 32 bytes are 64 products of
// int16, AVX2 CPUs load 64 bytes a cycle, so 128 products a cycle are the ceiling.
//
// Before this file is included: BYTES, of a register of the variant; KEEP(vector), which keeps a
// chain of additions one: compilers make a tree of it, which spills; and WIDEN, eight int16 of `piece`
// to int32, where GCC does not find the instruction.

#include "vectors.h"

#if defined(__clang__) || __GNUC__ >= 12
#define ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ZIP(a, b, ...) __builtin_shuffle(a, b, (std::decay_t<decltype(a)>){__VA_ARGS__})
#endif
#define LOW_BYTES(a, b) ZIP(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_BYTES(a, b) ZIP(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW_SHORTS(a, b) ZIP(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_SHORTS(a, b) ZIP(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#ifndef WIDEN
#define WIDEN return __builtin_convertvector(piece, Ints8);
#endif

typedef int16_t Shorts8 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
INLINE Ints8 widen(Shorts8 piece) { WIDEN }

// x[r][i] to inputs[i][r], int8 sixteen by sixteen: four times, zip the two halves of the rows.
template <size_t COUNT, size_t ROWS>
static void turn(const int8_t* x, int64_t stride, int16_t (*inputs)[ROWS]) {
  typedef int8_t Bytes16 __attribute__((vector_size(16)));
  typedef int16_t Shorts16 __attribute__((vector_size(32)));
  for (int first = 0; first < int(ROWS); first += 16)
    for (int at = 0; at < int(COUNT); at += 16) {
      Bytes16 rows[16], zipped[16];
      for (int r = 0; r < 16; r++) rows[r] = load<Bytes16>(x + (first + r) * stride + at);
      for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
          zipped[2 * i] = LOW_BYTES(rows[i], rows[i + 8]);
          zipped[2 * i + 1] = HIGH_BYTES(rows[i], rows[i + 8]);
        }
        memcpy(rows, zipped, sizeof rows);
      }
      for (int i = 0; i < 16; i++)
        store(inputs[at + i] + first, __builtin_convertvector(rows[i], Shorts16));
    }
}

// The same for float32, eight by eight.
template <size_t COUNT, size_t ROWS>
static void turn(const float* x, int64_t stride, float (*inputs)[ROWS]) {
  for (int at = 0; at < int(COUNT); at += 8)
    for (int r = 0; r < int(ROWS); r += 8) {
      Floats8 v[8];
      for (int j = 0; j < 8; j++) v[j] = load<Floats8>(x + (r + j) * stride + at);
      transpose(v);
      for (int j = 0; j < 8; j++) store(inputs[at + j] + r, v[j]);
    }
}

// inputs[i][r] = x[r][i], the next COUNT inputs of up to ROWS rows of x, 0 where rows end or nothing
// is `left` of the inputs. Rows of x are k apart.
template <class X, class T, size_t ROWS, size_t COUNT>
static void take(const X* x, int64_t rows, int64_t k, int64_t left, T (&inputs)[COUNT][ROWS]) {
  X edge[ROWS][COUNT];
  if (rows < int64_t(ROWS) || left < int64_t(COUNT)) {
    memset(edge, 0, sizeof edge);
    for (int64_t r = 0; r < std::min<int64_t>(rows, ROWS); r++)
      memcpy(edge[r], x + r * k, sizeof(X) * std::min<int64_t>(left, COUNT));
    x = edge[0], k = COUNT;
  }
  turn<COUNT>(x, k, inputs);
}

typedef int16_t WideShorts __attribute__((vector_size(BYTES)));
typedef float WideFloats __attribute__((vector_size(BYTES)));
template <class T> struct WideOf;
template <> struct WideOf<int16_t> { typedef WideShorts type; };
template <> struct WideOf<float> { typedef WideFloats type; };
template <class T> using Wide = typename WideOf<T>::type;

// The largest sum of sizes over a row's inputs: no sum of them times codes is larger.
template <size_t COUNT, size_t ROWS>
static int64_t largest(const int16_t (*inputs)[ROWS]) {
  int16_t size[ROWS] = {};
  for (size_t i = 0; i < COUNT; i++)
    for (size_t r = 0; r < ROWS; r++) size[r] += std::abs(inputs[i][r]);
  return *std::max_element(size, size + ROWS);
}

// The largest size of a sum.
template <size_t ROWS>
static int64_t largest_sum(const int16_t (*sums)[ROWS], int64_t columns) {
  constexpr int LANES = BYTES / sizeof(int16_t);
  WideShorts most = {}, least = {};
  for (int64_t c = 0; c < columns; c++)
#pragma GCC unroll 2
    for (int r = 0; r < int(ROWS); r += LANES) {
      const WideShorts sum = load<WideShorts>(sums[c] + r);
      most = sum > most ? sum : most;
      least = sum < least ? sum : least;
    }
  int64_t size = 0;
  for (int i = 0; i < LANES; i++) size = std::max<int64_t>({size, most[i], -int64_t(least[i])});
  return size;
}

// Whether sums must be put before COUNT inputs more, lest int16 overflow; counts the inputs to
// `bound`, which no sum exceeds. Codes of both signs make sums that grow like the root of what they
// might be: looking at them takes a fifth of the time of putting them, and nearly always finds room.
template <size_t COUNT, size_t ROWS>
static bool overflows(const int16_t (*inputs)[ROWS], const int16_t (*sums)[ROWS], int64_t columns,
                      int64_t& bound) {
  static_assert(COUNT * 128 <= 32768 / 2);
  const int64_t more = largest<COUNT>(inputs);
  bool full = false;
  if (bound + more > 32767) {
    bound = largest_sum(sums, columns);
    full = bound > 32767 / 2;
    if (full) bound = 0;
  }
  bound += more;
  return full;
}
template <size_t COUNT, size_t ROWS>
static bool overflows(const float (*)[ROWS], const float (*)[ROWS], int64_t, int64_t&) {
  return false;
}

// table[i][r] = sum over j of (digit j of i in base 3, less 1) * x[j][r], for 81 entries i.
template <class T, size_t ROWS>
static void fill_table(const T (*x)[ROWS], T (*table)[ROWS]) {
  typedef Wide<T> V;
  constexpr int LANES = BYTES / sizeof(T);
  for (int part = 0; part < int(ROWS); part += LANES) {
    V times[4][3], first[9], last[9];  // an input times -1, 0 and 1; pairs of them
    for (int j = 0; j < 4; j++) {
      times[j][2] = load<V>(x[j] + part);
      times[j][1] = V{}, times[j][0] = -times[j][2];
    }
    for (int i = 0; i < 9; i++) {
      first[i] = times[0][i % 3] + times[1][i / 3];
      last[i] = times[2][i % 3] + times[3][i / 3];
    }
#pragma GCC unroll 9
    for (int i = 0; i < 9; i++)
#pragma GCC unroll 9
      for (int j = 0; j < 9; j++) store(table[9 * i + j] + part, last[i] + first[j]);
  }
}

// sums[c] (+)= the entries that output c's codes choose, one of each of COUNT tables. index[t][c] is
// the distance of table t's from its first, in bytes; rows of the index are `stride` apart. Four
// outputs a turn, up to 3 past the last: one load then brings four indices, and loads are scarce.
template <int COUNT, bool FIRST, class T, size_t ROWS>
static void look_up(const T (*tables)[ROWS], const uint16_t* index, int64_t stride, int64_t columns,
                    T (*sums)[ROWS]) {
  typedef Wide<T> V;
  constexpr int LANES = BYTES / sizeof(T), PARTS = ROWS / LANES;
  for (int64_t c = 0; c < columns; c += 4) {
    V sum[4 * PARTS];
#pragma GCC unroll 8
    for (int i = 0; i < 4 * PARTS; i++) sum[i] = FIRST ? V{} : load<V>(sums[c] + i * LANES);
#pragma GCC unroll 8
    for (int t = 0; t < COUNT; t++) {
      uint64_t four = load<uint64_t>(index + t * stride + c);
      const char* table = (const char*)(tables + 81 * t);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const char* entry = table + (i < 3 ? low_half(four) : four);
        four >>= 16;
        asm("" : "+r"(four));
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
          sum[i * PARTS + part] += load<V>(entry + part * BYTES);
          KEEP(sum[i * PARTS + part]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4 * PARTS; i++) store(sums[c] + i * LANES, sum[i]);
  }
}

template <int COUNT, class T, size_t ROWS>
static void look_up(bool first, const T (*tables)[ROWS], const uint16_t* index, int64_t stride,
                    int64_t columns, T (*sums)[ROWS]) {
  (first ? look_up<COUNT, true, T, ROWS> : look_up<COUNT, false, T, ROWS>)(tables, index, stride,
                                                                          columns, sums);
}

// block[i][j] = sums[j][i], eight by eight.
template <size_t ROWS>
INLINE void turn_back(const int16_t (*sums)[ROWS], int64_t row, Ints8* block) {
  Shorts8 v[8], zipped[8];
  for (int j = 0; j < 8; j++) v[j] = load<Shorts8>(sums[j] + row);
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < 4; i++) {
      zipped[2 * i] = LOW_SHORTS(v[i], v[i + 4]);
      zipped[2 * i + 1] = HIGH_SHORTS(v[i], v[i + 4]);
    }
    memcpy(v, zipped, sizeof v);
  }
  for (int i = 0; i < 8; i++) block[i] = widen(v[i]);
}

template <size_t ROWS>
INLINE void turn_back(const float (*sums)[ROWS], int64_t row, Floats8* block) {
  for (int j = 0; j < 8; j++) block[j] = load<Floats8>(sums[j] + row);
  transpose(block);
}

// sums[c][row] to out[row][c], or added to it; out lies in a matrix n wide. Sums have room, which is
// read, for columns up to a multiple of eight.
template <bool ADD, class T, size_t ROWS, class Y>
static void put(const T (*sums)[ROWS], int64_t rows, int64_t columns, Y* out, int64_t n) {
  typedef std::conditional_t<std::is_same_v<T, float>, Floats8, Ints8> V;
  // Eight rows at a time: where n is a power of two, lines of more of them share a cache set.
  for (int64_t r = 0; r < rows; r += 8)
    for (int64_t c = 0; c < columns; c += 8) {
      V block[8];
      turn_back(sums + c, r, block);
      for (int64_t i = 0; i < std::min<int64_t>(8, rows - r); i++) {
        Y* to = out + (r + i) * n + c;
        if (columns - c >= 8) store(to, ADD ? load<V>(to) + block[i] : block[i]);
        else
          for (int64_t j = 0; j < columns - c; j++) to[j] = (ADD ? to[j] : 0) + block[i][j];
      }
    }
}

template <class T, size_t ROWS, class Y>
static void put(bool add, const T (*sums)[ROWS], int64_t rows, int64_t columns, Y* out, int64_t n) {
  (add ? put<true, T, ROWS, Y> : put<false, T, ROWS, Y>)(sums, rows, columns, out, n);
}

#undef WIDEN
#undef ZIP
#undef LOW_BYTES
#undef HIGH_BYTES
#undef LOW_SHORTS
#undef HIGH_SHORTS
