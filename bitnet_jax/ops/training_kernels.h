// The kernels of training.cpp, in GCC's vector types, compiled once a variant, inside its namespace.
//
// Before this file is included: what lookup.h wants, and DOT(sums, a, b), which is sums + a * b in
// int16, added up over the two neighbours under each int32 sum.

#include "lookup.h"

typedef int32_t WideInts __attribute__((vector_size(BYTES)));

// ---- Ternary codes times many rows: sums of four inputs are looked up ----------------------------

// An entry is 64 bytes, of int16 or of float, so the indices are offsets, times 64.
constexpr int ENTRY = 64;
constexpr int FOURS = 4;  // fours of inputs at once: their tables, 20 KB, fit the L1 cache
constexpr int STEP = 128;  // inputs taken from x at once: whole cache lines of every row
template <class T> constexpr int ROWS = ENTRY / sizeof(T);
template <class T> using Row = T[ENTRY / sizeof(T)];

// Room for the sums of a strip, kept: an entry is a cache line, and none lies across two.
template <class T>
static Row<T>* sums_of(int64_t columns) {
  static thread_local std::vector<T> memory;
  memory.resize(((columns + 7) / 8 * 8 + 1) * ROWS<T>);
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
struct Tables {
  alignas(64) Row<T> inputs[STEP];
  alignas(64) Row<T> tables[FOURS * 81];
};

// out (rows, columns) = x (rows, k) times the codes that index (fours, stride) stands for; rows are
// at most ROWS, and out lies in a matrix n wide.
template <class X, class T, class Y>
static void product(const X* x, int64_t rows, int64_t k, const uint16_t* index, int64_t stride,
                    int64_t columns, Y* out, int64_t n) {
  static thread_local Tables<T> own;
  Tables<T>& room = own;  // looked up once: it is a call
  Row<T>* sums = sums_of<T>(columns);
  int64_t bound = 0;
  bool started = false, empty = true;
  for (int64_t k0 = 0; k0 < k; k0 += STEP) {
    take(x + k0, rows, k, k - k0, room.inputs);
    if (overflows<STEP>(room.inputs, sums, columns, bound)) {
      put(started, sums, rows, columns, out, n);
      started = empty = true;
    }
    for (int i = 0; i < STEP && k0 + i < k; i += 4 * FOURS) {
      for (int t = 0; t < FOURS; t++)
        fill_table(room.inputs + i + 4 * t, room.tables + 81 * t);
      look_up<FOURS>(empty, room.tables, index + (k0 + i) / 4 * stride, stride, columns, sums);
      empty = false;
    }
  }
  put(started, sums, rows, columns, out, n);
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
                           int64_t columns, Floats8 (*room)[EIGHTS], Ints8 (*words)[EIGHTS],
                           Floats8* scale) {
  Floats8 most[EIGHTS] = {}, wrong[EIGHTS] = {};
  for (int64_t t = 0; t < tokens; t++) {
    float edge[WIDE] = {};
    const float* from = g + t * n;
    if (columns < WIDE) memcpy(edge, from, columns * sizeof *edge), from = edge;
    for (int j = 0; j < EIGHTS; j++) {
      Floats8 value = load<Floats8>(from + 8 * j) * scales[t];
      Floats8 size = (Floats8)((Ints8)value & 0x7fffffff);
      most[j] = size > most[j] ? size : most[j];
      wrong[j] += value * 0.0f;
      room[t][j] = value;
    }
  }
  if (tokens % 2) memset(room[tokens], 0, sizeof *room);
  const Floats8 magic = Floats8{} + 12582912.0f;  // 1.5 * 2 ** 23: its last bits are the rounded sum
  for (int j = 0; j < EIGHTS; j++) {
    scale[j] = most[j] / 32767.0f;
    Floats8 inverse = scale[j] > 1e-38f ? 1.0f / scale[j] : Floats8{};
    scale[j] += wrong[j];
    for (int64_t p = 0; p < (tokens + 1) / 2; p++) {
      Ints8 even = (Ints8)(room[2 * p][j] * inverse + magic);
      Ints8 odd = (Ints8)(room[2 * p + 1][j] * inverse + magic);
      words[p][j] = (even & 0xffff) | odd << 16;
    }
  }
}

INLINE void tile(const int32_t* codes, const Ints8 (*g)[EIGHTS], int64_t pairs,
                 Ints8 (*sums)[EIGHTS]) {
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
  struct Room {
    Floats8 floats[TOKENS + 1][EIGHTS];
    Ints8 pairs[PAIRS][EIGHTS];
  };
  static thread_local Room own;
  Room& room = own;  // looked up once: it is a call
  const int64_t all = (tokens + 1) / 2;
  for (int64_t t = 0; t < tokens; t += TOKENS) {
    const int64_t now = std::min<int64_t>(TOKENS, tokens - t);
    Floats8 scale[EIGHTS];
    pair_gradients(g + t * n, scales + t, now, n, columns, room.floats, room.pairs, scale);
    for (int64_t i = 0; i < k; i += TALL) {
      Ints8 sums[TALL][EIGHTS];
      tile(words + (i / TALL * all + t / 2) * TALL, room.pairs, (now + 1) / 2, sums);
      for (int64_t j = 0; j < std::min<int64_t>(TALL, k - i); j++) {
        float* to = out + (i + j) * n;
        float edge[WIDE] = {}, *values = columns == WIDE ? to : edge;
        if (t && values == edge) memcpy(edge, to, columns * sizeof *edge);
        for (int h = 0; h < EIGHTS; h++) {
          const Floats8 more = __builtin_convertvector(sums[j][h], Floats8) * scale[h];
          store(values + 8 * h, t ? load<Floats8>(values + 8 * h) + more : more);
        }
        if (values == edge) memcpy(to, edge, columns * sizeof *edge);
      }
    }
  }
}

#undef KEEP
#undef DOT
#undef BYTES
