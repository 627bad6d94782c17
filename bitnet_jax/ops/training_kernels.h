// The kernels of training.cpp, in GCC's vector types, compiled once a variant, inside its namespace.
//
// Before this file is included: BYTES, of a register of the variant; DOT(sums, a, b), which is
// sums + a * b in int16, added up over the two neighbours under each int32 sum, the only intrinsic;
// and KEEP(vector), which keeps a chain of additions one: compilers make a tree of it, which spills.

typedef int16_t Shorts __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));
typedef int16_t EightShorts __attribute__((vector_size(16)));

typedef int16_t WideShorts __attribute__((vector_size(BYTES)));  // what the inner loops work in
typedef int32_t WideInts __attribute__((vector_size(BYTES)));
typedef float WideFloats __attribute__((vector_size(BYTES)));

template <class T> struct VectorOf;
template <> struct VectorOf<int16_t> { typedef Shorts type; typedef WideShorts wide; };
template <> struct VectorOf<float> { typedef Floats type; typedef WideFloats wide; };
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> using WideVector = typename VectorOf<T>::wide;

#include "vectors.h"

// ---- Ternary codes times many rows: sums of four inputs are looked up ----------------------------

// Four ternary codes have 81 values. For ROWS rows of x and four inputs all 81 sums are computed
// once, an addition each, and serve every output: one addition stands for four products, in int16
// and in float alike. An entry is 64 bytes of either, so the indices are offsets, times 64.
constexpr int ENTRY = 64;
constexpr int FOURS = 4;  // fours of inputs at once: their tables, 20 KB, fit the L1 cache
constexpr int STEP = 32;  // inputs taken from x at once
template <class T> constexpr int ROWS = ENTRY / sizeof(T);
template <class T> using Row = T[ENTRY / sizeof(T)];

// Room for the sums of a strip, kept: an entry is a cache line, and none lies across two.
template <class T>
static Row<T>* sums_of(int64_t columns) {
  static thread_local std::vector<T> memory;
  memory.resize(((columns + 3) / 4 * 4 + 1) * ROWS<T>);
  return (Row<T>*)(((uintptr_t)memory.data() + ENTRY - 1) & -ENTRY);
}

// Columns from .. to of the index: 64 times the place of four codes among their 81 values. A damaged
// code counts by its sign, so it points nowhere else.
static void make_index(const int8_t* codes, int64_t k, int64_t n, bool transposed, int64_t fours,
                       int64_t from, int64_t to, uint16_t* index) {
  // With digits code + 1, c0 + 3 c1 + 9 c2 + 27 c3 is the highest byte of four of them times this.
  constexpr uint32_t BASES = 1 << 24 | 3 << 16 | 9 << 8 | 27;
  constexpr int AT_ONCE = 64;
  for (int64_t first = from; first < to; first += AT_ONCE) {
    const int64_t columns = std::min<int64_t>(AT_ONCE, to - first);
    for (int64_t p = 0; p < fours; p++) {
      const int64_t inputs = std::clamp<int64_t>(k - 4 * p, 0, 4);
      uint32_t four[AT_ONCE] = {};  // missing inputs are zeros
      if (!transposed)
        for (int64_t j = 0; j < inputs; j++)
          for (int64_t c = 0; c < columns; c++)
            four[c] |= uint32_t(uint8_t(codes[(4 * p + j) * n + first + c])) << 8 * j;
      else if (inputs == 4)
        for (int64_t c = 0; c < columns; c++) memcpy(&four[c], codes + (first + c) * k + 4 * p, 4);
      else
        for (int64_t c = 0; c < columns; c++)
          memcpy(&four[c], codes + (first + c) * k + 4 * p, inputs);
      for (int64_t c = 0; c < columns; c++) {
        // 1 in every byte that is negative, or not zero: no byte carries into the next.
        const uint32_t negative = four[c] >> 7 & 0x01010101;
        const uint32_t some = ((four[c] & 0x7f7f7f7f) + 0x7f7f7f7f | four[c]) >> 7 & 0x01010101;
        const uint32_t digits = 0x01010101 + some - 2 * negative;
        index[p * n + first + c] = uint16_t(digits * BASES >> 24 << 6);
      }
    }
  }
}

template <class T>
static void fill_table(const Row<T>* x, Row<T>* table) {
  typedef Vector<T> V;
  constexpr int LANES = 32 / sizeof(T);
  for (int part = 0; part < ROWS<T>; part += LANES) {
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

// sums[c] (+)= the sums that output c's codes choose, over FOURS tables. Four outputs a turn, because
// one load then brings four indices: loads are what is scarce.
template <class T, bool FIRST>
static void look_up(const Row<T>* tables, const uint16_t* index, int64_t stride, int64_t columns,
                    Row<T>* sums) {
  typedef WideVector<T> V;
  constexpr int PARTS = ENTRY / BYTES, LANES = BYTES / sizeof(T);
  for (int64_t c = 0; c < columns; c += 4) {
    V sum[4 * PARTS];
#pragma GCC unroll 8
    for (int i = 0; i < 4 * PARTS; i++) sum[i] = FIRST ? V{} : load<V>(sums[c] + i * LANES);
#pragma GCC unroll 4
    for (int t = 0; t < FOURS; t++) {
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

// STEP inputs of ROWS rows, a row `stride` values apart, to inputs[i][row].
static void take(const float* x, int64_t stride, Row<float>* inputs) {
  for (int i = 0; i < STEP; i += 8)
    for (int r = 0; r < ROWS<float>; r += 8) {
      Floats v[8];
      for (int j = 0; j < 8; j++) v[j] = load<Floats>(x + (r + j) * stride + i);
      transpose(v);
      for (int j = 0; j < 8; j++) store(inputs[i + j] + r, v[j]);
    }
}

static void take(const int8_t* x, int64_t stride, Row<int16_t>* inputs) {
  for (int r = 0; r < ROWS<int16_t>; r += 8) {
    Ints v[8];
    for (int j = 0; j < 8; j++) v[j] = load<Ints>(x + (r + j) * stride);
    transpose(v);  // now v[p] holds inputs 4p .. 4p+3 of eight rows
    for (int p = 0; p < 8; p++)
      for (int j = 0; j < 4; j++)
        store(inputs[4 * p + j] + r,
              __builtin_convertvector((v[p] << (24 - 8 * j)) >> 24, EightShorts));
  }
}

INLINE Floats eight(const float* from) { return load<Floats>(from); }
INLINE Ints eight(const int16_t* from) {
  return __builtin_convertvector(load<EightShorts>(from), Ints);
}

// sums[c][row] to, or added to, out[row][c].
template <bool ADD, class T, class Y>
static void put(const Row<T>* sums, int64_t rows, int64_t columns, Y* out, int64_t n) {
  typedef decltype(eight(sums[0])) V;
  // Eight rows at a time: where n is a power of two, lines of more of them share a cache set.
  for (int64_t r = 0; r < rows; r += 8)
    for (int64_t c = 0; c < columns; c += 8) {
      V v[8] = {};
      for (int j = 0; j < std::min<int64_t>(8, columns - c); j++) v[j] = eight(sums[c + j] + r);
      transpose(v);
      for (int j = 0; j < std::min<int64_t>(8, rows - r); j++) {
        Y* to = out + (r + j) * n + c;
        if (columns - c >= 8) store(to, ADD ? load<V>(to) + v[j] : v[j]);
        else
          for (int64_t i = 0; i < columns - c; i++) to[i] = (ADD ? to[i] : 0) + v[j][i];
      }
    }
}

template <class X, class T>
struct Tables {
  alignas(64) X edge[ROWS<T>][STEP];
  alignas(64) Row<T> inputs[STEP];
  alignas(64) Row<T> tables[FOURS * 81];
};

// The next STEP inputs of up to ROWS rows, 0 where rows or inputs end.
template <class X, class T>
static void take(const X* x, int64_t rows, int64_t k, int64_t k0, Tables<X, T>& room) {
  if (rows >= ROWS<T> && k - k0 >= STEP) return take(x + k0, k, room.inputs);
  memset(room.edge, 0, sizeof room.edge);
  for (int64_t r = 0; r < std::min<int64_t>(rows, ROWS<T>); r++)
    memcpy(room.edge[r], x + r * k + k0, sizeof(X) * std::min<int64_t>(STEP, k - k0));
  take(&room.edge[0][0], STEP, room.inputs);
}

// The largest sum of sizes over a row's inputs: no sum of them times codes is larger.
static int64_t largest(const Row<int16_t>* inputs) {
  Row<int16_t> size = {};
  for (int i = 0; i < STEP; i++)
    for (int r = 0; r < ROWS<int16_t>; r++) size[r] += std::abs(inputs[i][r]);
  return *std::max_element(size, size + ROWS<int16_t>);
}
static int64_t largest(const Row<float>*) { return 0; }

// out (rows, columns) = x (rows, k) times the codes that index (fours, stride) stands for; rows are
// at most ROWS, and out lies in a matrix n wide.
template <class X, class T, class Y>
static void product(const X* x, int64_t rows, int64_t k, const uint16_t* index, int64_t stride,
                    int64_t columns, Y* out, int64_t n) {
  static thread_local Tables<X, T> own;
  Tables<X, T>& room = own;  // looked up once: it is a call
  Row<T>* sums = sums_of<T>(columns);
  int64_t bound = 0;
  bool started = false, empty = true;
  for (int64_t k0 = 0; k0 < k; k0 += STEP) {
    take(x, rows, k, k0, room);
    // Small activations, which most are, are put rarely: only when int16 may overflow.
    const int64_t more = largest(room.inputs);
    if (bound + more > 32767) {
      (started ? put<true, T, Y> : put<false, T, Y>)(sums, rows, columns, out, n);
      started = empty = true, bound = 0;
    }
    bound += more;
    for (int i = 0; i < STEP && k0 + i < k; i += 4 * FOURS) {
      for (int t = 0; t < FOURS; t++)
        fill_table<T>(room.inputs + i + 4 * t, room.tables + 81 * t);
      (empty ? look_up<T, true> : look_up<T, false>)(
          room.tables, index + (k0 + i) / 4 * stride, stride, columns, sums);
      empty = false;
    }
  }
  (started ? put<true, T, Y> : put<false, T, Y>)(sums, rows, columns, out, n);
}

// ---- Grad-weight: int8 codes of the activations times gradients in 16 bits -----------------------

// A tile of the result that stays in registers, of which wider ones are twice as many.
constexpr int TALL = BYTES == 64 ? 12 : 6, WIDE = BYTES / 2;
constexpr int EIGHTS = WIDE / 8;
// Tokens that share a scale: 512 products of -128 and 32767 fit int32, just.
constexpr int TOKENS = 512;
constexpr int PAIRS = TOKENS / 2;

// codes (tokens, k) to words[panel of TALL inputs][pair of tokens][input]; odd ends read as zeros.
static void pair_codes(const int8_t* codes, int64_t tokens, int64_t k, int64_t from, int64_t to,
                       int32_t* words) {
  const int64_t pairs = (tokens + 1) / 2, panels = (k + TALL - 1) / TALL;
  static thread_local std::vector<int32_t> memory;
  memory.assign((to - from) * panels * TALL, 0);
  for (int64_t p = from; p < to; p++) {
    const int8_t *even = codes + 2 * p * k, *odd = even + k;
    int32_t* row = &memory[(p - from) * panels * TALL];
    for (int64_t i = 0; i < k; i++) row[i] = uint16_t(even[i]);
    if (2 * p + 1 < tokens)
      for (int64_t i = 0; i < k; i++) row[i] |= int32_t(odd[i]) << 16;
  }
  for (int64_t i = 0; i < panels; i++)
    for (int64_t p = from; p < to; p++)
      memcpy(words + (i * pairs + p) * TALL, &memory[((p - from) * panels + i) * TALL],
             TALL * sizeof *words);
}

// Of up to TOKENS tokens, WIDE columns of g times each token's scale, in 16 bits and in pairs.
// scale gets what a unit is worth in each column: NaN where a gradient is not finite.
static void pair_gradients(const float* g, const float* scales, int64_t tokens, int64_t n,
                           int64_t columns, Floats (*room)[EIGHTS], Ints (*words)[EIGHTS],
                           Floats* scale) {
  Floats most[EIGHTS] = {}, wrong[EIGHTS] = {};
  for (int64_t t = 0; t < tokens; t++) {
    float edge[WIDE] = {};
    const float* from = g + t * n;
    if (columns < WIDE) memcpy(edge, from, columns * sizeof *edge), from = edge;
    for (int j = 0; j < EIGHTS; j++) {
      Floats value = load<Floats>(from + 8 * j) * scales[t];
      Floats size = (Floats)((Ints)value & 0x7fffffff);
      most[j] = size > most[j] ? size : most[j];
      wrong[j] += value * 0.0f;
      room[t][j] = value;
    }
  }
  if (tokens % 2) memset(room[tokens], 0, sizeof *room);
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2 ** 23: its last bits are the rounded sum
  for (int j = 0; j < EIGHTS; j++) {
    scale[j] = most[j] / 32767.0f;
    Floats inverse = scale[j] > 1e-38f ? 1.0f / scale[j] : Floats{};
    scale[j] += wrong[j];
    for (int64_t p = 0; p < (tokens + 1) / 2; p++) {
      Ints even = (Ints)(room[2 * p][j] * inverse + magic);
      Ints odd = (Ints)(room[2 * p + 1][j] * inverse + magic);
      words[p][j] = (even & 0xffff) | odd << 16;
    }
  }
}

INLINE void tile(const int32_t* codes,
                                                       const Ints (*g)[EIGHTS], int64_t pairs,
                                                       Ints (*sums)[EIGHTS]) {
  WideInts sum[TALL][2] = {};
  for (int64_t p = 0; p < pairs; p++, codes += TALL) {
    const WideInts left = load<WideInts>(g[p]), right = load<WideInts>(g[p] + EIGHTS / 2);
#pragma GCC unroll 12
    for (int i = 0; i < TALL; i++) {
      const WideInts code = WideInts{} + codes[i];
      sum[i][0] = DOT(sum[i][0], code, left);
      sum[i][1] = DOT(sum[i][1], code, right);
    }
  }
  memcpy(sums, sum, sizeof sum);
}

// out (k, columns) of a matrix n wide: all inputs of up to WIDE columns of the grad-weight.
static void grad_weight(const int32_t* words, const float* scales, const float* g, int64_t tokens,
                        int64_t k, int64_t n, int64_t columns, float* out) {
  static thread_local Floats room[TOKENS + 1][EIGHTS];
  static thread_local Ints gradients[PAIRS][EIGHTS];
  const int64_t all = (tokens + 1) / 2;
  for (int64_t t = 0; t < tokens; t += TOKENS) {
    const int64_t now = std::min<int64_t>(TOKENS, tokens - t);
    Floats scale[EIGHTS];
    pair_gradients(g + t * n, scales + t, now, n, columns, room, gradients, scale);
    for (int64_t i = 0; i < k; i += TALL) {
      Ints sums[TALL][EIGHTS];
      tile(words + (i / TALL * all + t / 2) * TALL, gradients, (now + 1) / 2, sums);
      for (int64_t j = 0; j < std::min<int64_t>(TALL, k - i); j++) {
        float* to = out + (i + j) * n;
        float edge[WIDE] = {}, *values = columns == WIDE ? to : edge;
        if (t && values == edge) memcpy(edge, to, columns * sizeof *edge);
        for (int h = 0; h < EIGHTS; h++) {
          const Floats more = __builtin_convertvector(sums[j][h], Floats) * scale[h];
          store(values + 8 * h, t ? load<Floats>(values + 8 * h) + more : more);
        }
        if (values == edge) memcpy(to, edge, columns * sizeof *edge);
      }
    }
  }
}

#undef KEEP
#undef DOT
#undef BYTES
