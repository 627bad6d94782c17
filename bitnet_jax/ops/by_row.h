// Few rows, one at a time: sums of two or three inputs are looked up in registers; included by
// native_kernels.h.
//
// A few bits of codes choose one of the sums of x_j d_j, and a shuffle of bytes looks up a register
// full of them at once. A sum does not fit a byte, so it is kept as a + 32 b, a from -16 to 15, and
// the a's and the b's of up to eight lookups are added up in bytes. Bytes need no interleaving here,
// and the codes are -1 to 1, so that there is no correction.
//
// A variant that can defines ADD_PAIRS, weights times bytes added up over two neighbours in int16, and
//   LOOKUP, HIGH_HALVES                to look up sums of two inputs, or
//   PERMUTE, TO_BYTES and MOVE_BITS    to look up sums of three.

INLINE Shorts add_pairs(Bytes weights, Bytes values) { ADD_PAIRS }

// What is asked for so many columns ahead has come when it is used. (On Zen 4 256 to 448 differ by 4 %;
// 640 took a fifth longer.)
constexpr int64_t LOOKAHEAD = 384;

// BYTES sums += a + 32 b, in the order that interleaving leaves outputs in.
INLINE void add_up(Bytes a, Bytes b, int16_t* sums) {
  const Bytes weights = (Bytes)(Shorts{} + (1 | 32 << 8));
  int16_t* rest = sums + BYTES / 2;
  store(sums, load<Shorts>(sums) + add_pairs(weights, SHUFFLE(a, b, LANES(PAIRS, 0))));
  store(rest, load<Shorts>(rest) + add_pairs(weights, SHUFFLE(a, b, LANES(PAIRS, 8))));
}

#ifdef LOOKUP
// Half a byte holds two codes and chooses one of nine sums, of 16 that a shuffle within 128 bits can
// choose from. Per 32 bytes of codes 13 instructions, and 17 with dots. For more rows it is 10 and 8
// each, and yet dots took a sixth longer (Zen 4): they load and store sums of 32 bits.
INLINE Bytes high_halves(Bytes codes) { HIGH_HALVES }
INLINE Bytes look(const int8_t* table, Bytes index) { LOOKUP }

struct Lookups {
  static constexpr int ROWS = 4;
  static constexpr int TABLE = 16;
  static constexpr int TABLES = ROWS * 4 * TABLE;  // bytes of a block: a and b of each pair of inputs

  const int8_t* tables;

  Lookups(const int8_t* all, int64_t block, int64_t) : tables(all + block * TABLES) {}

  // The tables of every block: made together, they take less time than one block's at its turn.
  static void prepare(const int8_t* x, int64_t k, int64_t blocks, std::vector<int8_t>& all) {
    const Shorts first = {-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2};
    const Shorts second = {-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2};
    typedef int8_t Table __attribute__((vector_size(TABLE)));
    all.resize(blocks * TABLES);
    int8_t* to = all.data();
    for (int64_t block = 0; block < blocks; block++)
      for (int i = 0; i < ROWS; i++)
        for (int pair = 0; pair < 4; pair += 2, to += 2 * TABLE) {
          const int64_t at = 4 * (i * blocks + block) + pair;
          const int16_t x0 = at < k ? x[at] : 0, x1 = at + 1 < k ? x[at + 1] : 0;
          const Shorts sum = first * x0 + second * x1, b = (sum + 16) >> 5, a = sum - (b << 5);
          store(to, __builtin_convertvector(a, Table));
          store(to + TABLE, __builtin_convertvector(b, Table));
        }
  }

  // sums[0 .. 64) += one packed row of each stream, two vectors (a cache line) at a time.
  MEMBER void add(const uint8_t* const* row, int64_t column, int64_t ahead, int16_t* sums) const {
    const int8_t* table = tables;
    Bytes a[2] = {}, b[2] = {};
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++, table += 4 * TABLE) {
      __builtin_prefetch(row[i] + ahead);
      Bytes low[2], high[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        Bytes codes = load<Bytes>(row[i] + column + v * BYTES);
        low[v] = codes & 15, high[v] = high_halves(codes) & 15;
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) a[v] += look(table, low[v]);
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) b[v] += look(table + TABLE, low[v]);
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) a[v] += look(table + 2 * TABLE, high[v]);
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) b[v] += look(table + 3 * TABLE, high[v]);
      for (int v = 0; v < 2; v++) {
        KEEP(a[v]);
        KEEP(b[v]);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) add_up(a[v], b[v], sums + v * BYTES);
  }
};
#endif

#ifdef PERMUTE
// Six bits hold three codes. A permutation of 64 bytes minds six bits of an index and no others, so a
// byte of codes is the index of its first three inputs as it lies. The fourth ones of three packed
// rows make one index more: a matrix of bits times each byte moves theirs to its place, where one
// instruction joins them. Per 64 bytes of codes seven instructions and a third, without loads.
INLINE Bytes permute(Bytes index, Bytes table) { PERMUTE }
INLINE Bytes to_bytes(Shorts a, Shorts b) { TO_BYTES }
INLINE Bytes move_bits(Bytes codes, uint64_t matrix) { MOVE_BITS }

// Bits 6 and 7 to bits 2 i and 2 i + 1: row r of the matrix, byte 7 - r, says which bits make bit r.
constexpr uint64_t fourth(int i) { return 0x40ull << 8 * (7 - 2 * i) | 0x80ull << 8 * (6 - 2 * i); }

// d - 1 of half a table's entries. Two halves go to bytes eight and eight, so that each of 16 entries
// begins with those whose d1 is 0 or 1; the others' are larger by 2.
struct Digits {
  alignas(64) int16_t d0[32], d1[32], d2[32];
};
constexpr Digits DIGITS = [] {
  Digits digits = {};
  for (int i = 0; i < 32; i++)
    digits.d0[i] = i % 4 - 1, digits.d1[i] = i / 4 % 2 - 1, digits.d2[i] = i / 8 - 1;
  return digits;
}();

template <int PACKED_ROWS>
struct Permutations {
  static constexpr int ROWS = PACKED_ROWS;
  static constexpr int COUNT = ROWS / 3 * 4;

  Bytes low[COUNT], high[COUNT];  // they stay in registers while columns go by

  static void prepare(const int8_t* x, int64_t k, int64_t blocks, std::vector<int8_t>& padded) {
    padded.assign(4 * blocks * ROWS, 0);
    memcpy(padded.data(), x, k);
  }

  // From one stream's packed row to the next one's are 4 * blocks inputs.
  MEMBER Permutations(const int8_t* x, int64_t block, int64_t blocks) {
    x += 4 * block;
#pragma GCC unroll 2
    for (int g = 0; g < ROWS / 3; g++) {
      const int8_t *x0 = x + 12 * g * blocks, *x1 = x0 + 4 * blocks, *x2 = x1 + 4 * blocks;
      fill(4 * g, x0[0], x0[1], x0[2]);
      fill(4 * g + 1, x1[0], x1[1], x1[2]);
      fill(4 * g + 2, x2[0], x2[1], x2[2]);
      fill(4 * g + 3, x0[3], x1[3], x2[3]);
    }
  }

  // Entry d0 + 4 d1 + 16 d2: x0 (d0 - 1) + x1 (d1 - 1) + x2 (d2 - 1).
  MEMBER void fill(int table, int16_t x0, int16_t x1, int16_t x2) {
    const auto times = [](const int16_t* digits, int16_t x) { return load<Shorts>(digits) * x; };
    const Shorts sum = times(DIGITS.d0, x0) + times(DIGITS.d1, x1) + times(DIGITS.d2, x2);
    const int16_t twice = 2 * x1;
    const Shorts rest = sum + twice;
    const Shorts b = (sum + 16) >> 5, b_rest = (rest + 16) >> 5;
    low[table] = to_bytes(sum - (b << 5), rest - (b_rest << 5));
    high[table] = to_bytes(b, b_rest);
  }

  // sums[0 .. 64) += one packed row of each stream.
  MEMBER void add(const uint8_t* const* row, int64_t column, int64_t ahead, int16_t* sums) const {
    Bytes a = {}, b = {};
#pragma GCC unroll 2
    for (int g = 0; g < ROWS / 3; g++) {
      Bytes last = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        Bytes index = last;
        if (i < 3) {
          index = load<Bytes>(row[3 * g + i] + column);
          __builtin_prefetch(row[3 * g + i] + ahead);
          last ^= move_bits(index, fourth(i));
        }
        a += permute(index, low[4 * g + i]);
        b += permute(index, high[4 * g + i]);
        KEEP(a);
        KEEP(b);
      }
    }
    add_up(a, b, sums);
  }
};
#endif

// sums, in the order that interleaving leaves outputs in, onto out; and sums = 0.
static void put_row(int16_t* sums, int64_t columns, int32_t* out) {
  for (int64_t c = 0; c < columns; c += 8) {
    int16_t* piece = sums + c / BYTES * BYTES + c / 8 % 2 * (BYTES / 2) + c % BYTES / 16 * 8;
    const Ints8 wide = widen(load<Shorts8>(piece));
    if (c + 8 <= columns) store(out + c, load<Ints8>(out + c) + wide);
    else
      for (int64_t j = 0; j < columns - c; j++) out[c + j] += wide[j];
    store(piece, Shorts8{});
  }
}

// The largest size of what each block may add to a sum.
static void largest_of(const int8_t* x, int64_t k, int64_t blocks, std::vector<int16_t>& sizes) {
  sizes.assign(blocks, 0);
  for (; k > 0; x += 4 * blocks, k -= 4 * blocks)
    for (int64_t i = 0; i < std::min(k, 4 * blocks); i++) sizes[i / 4] += std::abs(x[i]);
}

// As `few`, a row after the other: those after the first find a block's codes in a cache. OneRow's
// ROWS packed rows are read side by side, a part of the matrix apart: as many streams, each from its
// first byte to its last, which is what prefetchers follow.
template <class OneRow>
static void by_row(const int8_t* x, int64_t rows, int64_t k, const uint8_t* codes, int64_t n,
                   int64_t columns, int32_t* out) {
  constexpr int ROWS = OneRow::ROWS;
  const int64_t packed = (k + 3) / 4, blocks = (packed + ROWS - 1) / ROWS;
  const int64_t room = (columns + 63) / 64 * 64, whole = columns / 64 * 64;
  static thread_local std::vector<int8_t> prepared[FEW];
  static thread_local std::vector<int16_t> sizes[FEW];
  for (int64_t m = 0; m < rows; m++) {
    largest_of(x + m * k, k, blocks, sizes[m]);
    OneRow::prepare(x + m * k, k, blocks, prepared[m]);
    std::fill_n(out + m * n, columns, 0);
  }
  static_assert(SUMS + FEW * 64 <= MANY * MOST_COLUMNS);
  int16_t* sums = scratch().sums;  // [rows][room]
  memset(sums, 0, rows * room * sizeof *sums);
  int64_t bound[FEW] = {};  // of a row's sums, until they are put
  for (int64_t block = 0; block < blocks; block++) {
    const uint8_t* row[ROWS];  // past the end any row will do: its x are 0
    for (int i = 0; i < ROWS; i++) row[i] = codes + std::min(i * blocks + block, packed - 1) * n;
    for (int64_t m = 0; m < rows; m++) {
      const int64_t more = sizes[m][block];
      int16_t* own = sums + m * room;
      if (bound[m] + more > 32767) {
        put_row(own, columns, out + m * n);
        bound[m] = 0;
      }
      bound[m] += more;
      const OneRow looked_up(prepared[m].data(), block, blocks);
      for (int64_t c = 0; c < whole; c += 64) {
        int64_t ahead = c + LOOKAHEAD;
        if (ahead >= columns) ahead += n - columns;  // the stream goes on in its next row
        looked_up.add(row, c, ahead, own + c);
      }
      if (whole < columns) {
        uint8_t copy[ROWS][64] = {};
        const uint8_t* edge[ROWS];
        for (int i = 0; i < ROWS; i++)
          edge[i] = (uint8_t*)memcpy(copy[i], row[i] + whole, columns - whole);
        looked_up.add(edge, 0, 0, own + whole);
      }
    }
  }
  for (int64_t m = 0; m < rows; m++) put_row(sums + m * room, columns, out + m * n);
}

// One row waits for the memory, which three streams are read from faster than six; but only if the
// sums stay in the L1 cache beside a block's codes: at two and three bytes a column, 27 KB of 32. More
// rows wait for the arithmetic, and that takes less if sums are loaded and stored half as often. (One
// row beside reading alone, Zen 4: 4096 x 4096 by three 87 %, by six 77; 2560 x 6912 72 % and 82.)
constexpr int64_t NARROW = 5376;

static void by_row(const int8_t* x, int64_t rows, int64_t k, const uint8_t* codes, int64_t n,
                   int64_t columns, int32_t* out) {
#ifdef LOOKUP
  by_row<Lookups>(x, rows, k, codes, n, columns, out);
#else
  const bool three = rows == 1 && columns <= NARROW;
  (three ? by_row<Permutations<3>> : by_row<Permutations<6>>)(x, rows, k, codes, n, columns, out);
#endif
}
