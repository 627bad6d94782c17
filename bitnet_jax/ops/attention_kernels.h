// The kernels of attention.cpp, in GCC's vector types, compiled once a variant, inside its namespace.
//
// Before this file is included: BYTES, of a register of the variant, and the structs of attention.cpp.

typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
constexpr int64_t LANES = BYTES / 4, WIDE = 2 * LANES;  // columns of a tile of the products
constexpr int64_t TALL = 6;                             // and its rows: 12 registers of sums
constexpr int64_t QUERIES = 8 * TALL;                   // of a block

#include "vectors.h"

static int64_t up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// c (m, n) = or += a (m, k) b (k, n): rows of b and c lie ldb and ldc apart, a has any two strides.
// m is read and written in steps of TALL, n of WIDE.
template <bool ADD>
static void product(const float* a, int64_t by_row, int64_t by_column, const float* b, int64_t ldb,
                    float* c, int64_t ldc, int64_t m, int64_t n, int64_t k) {
  for (int64_t j = 0; j < n; j += WIDE)
    for (int64_t i = 0; i < m; i += TALL) {
      Floats sum[TALL][2];
#pragma GCC unroll 6
      for (int64_t r = 0; r < TALL; r++) {
        const float* from = c + (i + r) * ldc + j;
        sum[r][0] = ADD ? load<Floats>(from) : Floats{};
        sum[r][1] = ADD ? load<Floats>(from + LANES) : Floats{};
      }
      const float *left = a + i * by_row, *right = b + j;
      for (int64_t p = 0; p < k; p++, left += by_column, right += ldb) {
        const Floats first = load<Floats>(right), second = load<Floats>(right + LANES);
#pragma GCC unroll 6
        for (int64_t r = 0; r < TALL; r++) {
          const Floats value = left[r * by_row] - Floats{};  // plus would turn a -0 into a 0
          sum[r][0] += value * first;
          sum[r][1] += value * second;
        }
      }
#pragma GCC unroll 6
      for (int64_t r = 0; r < TALL; r++) {
        store(c + (i + r) * ldc + j, sum[r][0]);
        store(c + (i + r) * ldc + j + LANES, sum[r][1]);
      }
    }
}

// e ** x for x <= 0: 2 ** n e ** r with |r| <= ln 2 / 2, its series to the sixth power; 0 below -87.
INLINE Floats exponential(Floats x) {
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2 ** 23: its last bits are the rounded sum
  const Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Floats y = r * (1 / 720.0f) + (1 / 120.0f);
  y = y * r + (1 / 24.0f);
  y = y * r + (1 / 6.0f);
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Floats value = (Floats)((Ints)y + ((Ints)shifted << 23));
  return x < -87.0f ? Floats{} : x == x ? value : x;
}

// to[row][feature], zeros after the features.
static void copy(Rows from, int64_t rows, int64_t size, int64_t ld, float* to) {
  for (int64_t r = 0; r < rows; r++, to += ld) {
    memcpy(to, from.at + r * from.stride, size * sizeof *to);
    std::fill(to + size, to + ld, 0.0f);
  }
}

// to[feature][row].
static void copy_transposed(Rows from, int64_t rows, int64_t size, int64_t ld, float* to) {
  typedef float Eight __attribute__((vector_size(32)));
  const int64_t whole = size / 8 * 8;
  for (int64_t r = 0; r < rows; r += 8) {
    const int64_t some = std::min<int64_t>(8, rows - r);
    for (int64_t i = 0; i < whole; i += 8) {
      Eight v[8] = {};
      for (int64_t j = 0; j < some; j++) v[j] = load<Eight>(from.at + (r + j) * from.stride + i);
      transpose(v);
      for (int64_t j = 0; j < 8; j++) store(to + (i + j) * ld + r, v[j]);
    }
    for (int64_t i = whole; i < size; i++)
      for (int64_t j = 0; j < some; j++) to[i * ld + r + j] = from.at[(r + j) * from.stride + i];
  }
}

struct Sizes {
  int64_t keys, size;                       // of a head, and its features
  int64_t features = up(size, WIDE);        // what rows of them take
  int64_t across = up(keys, WIDE) + LANES;  // what rows of keys take: no power of two
  float scale = 1 / std::sqrt(float(size));
};

// row[k] = scale row[k], or -inf where key k is not seen.
static void mask(const Seen& seen, int64_t query, int64_t end, float scale, float* __restrict row) {
  const uint8_t* __restrict own = seen.at + query * seen.by_query;
  if (seen.by_key)
    for (int64_t k = 0; k < end; k++) row[k] = own[k] ? row[k] * scale : -INFINITY;
  else
    for (int64_t k = 0; k < end; k++) row[k] = *own ? row[k] * scale : -INFINITY;
}

// Scores to weights, a query a row: e ** (scale s - shift), 0 for what is not seen and past the end.
// shift is the largest score, if it is not given; what the weights then add up to comes back, and
// the shift, in sum and largest.
static void weigh(const Sizes& s, const Seen& seen, int64_t query, int64_t rows, int64_t end,
                  const float* shift, float* scores, float* sum, float* largest) {
  const int64_t wide = up(end, WIDE);
  for (int64_t r = 0; r < rows; r++) {
    float* row = scores + r * s.across;
    mask(seen, query + r, end, s.scale, row);
    std::fill(row + end, row + wide, -INFINITY);
    Floats most = Floats{} - INFINITY, total = {};
    if (!shift)
      for (int64_t k = 0; k < wide; k += LANES) {
        const Floats value = load<Floats>(row + k);
        most = value > most ? value : most;
      }
    float top = shift ? shift[r] : *std::max_element((float*)&most, (float*)&most + LANES);
    if (top == -INFINITY) top = 0;  // nothing is seen
    for (int64_t k = 0; k < wide; k += LANES) {
      const Floats value = exponential(load<Floats>(row + k) - top);
      store(row + k, value);
      total += value;
    }
    store(row + wide, Floats{});  // what products in steps of TALL may still read
    if (!shift) sum[r] = std::accumulate((float*)&total, (float*)&total + LANES, 0.0f);
    if (!shift) largest[r] = top;
  }
}

// Memory of a thread, kept: fresh pages cost as much as the work.
static float* room(int which, int64_t floats) {
  static thread_local std::vector<float> memory[12];
  memory[which].resize(floats);
  return memory[which].data();
}

// Queries from .. to of one head: y, and log sum e ** s of each.
static void forward(const Shapes& all, const Arrays& a, int64_t batch, int64_t head, int64_t from,
                    int64_t to) {
  const Sizes s{all.keys, all.size};
  const int64_t group = head / (all.heads / all.groups);
  const Rows q = all.queries(a.q, batch, head), y = all.queries(a.y, batch, head);
  const Rows k = all.of_keys(a.k, batch, group), v = all.of_keys(a.v, batch, group);
  const Seen seen = all.seen(a.seen, batch, head);
  float* log_sum = a.log_sum + (batch * all.heads + head) * all.length;
  float* keys = room(0, s.size * s.across);
  float* values = room(1, s.keys * s.features);
  float* queries = room(2, QUERIES * s.features);
  float* weights = room(3, QUERIES * s.across);
  float* out = room(4, QUERIES * s.features);
  const int64_t most = seen.end(from, to - from, s.keys);
  copy_transposed(k, most, s.size, s.across, keys);
  copy(v, most, s.size, s.features, values);
  for (int64_t i = from; i < to; i += QUERIES) {
    const int64_t rows = std::min(QUERIES, to - i), end = seen.end(i, rows, s.keys);
    float sum[QUERIES], largest[QUERIES];
    copy(q.from(i), rows, s.size, s.features, queries);
    product<false>(queries, s.features, 1, keys, s.across, weights, s.across, rows, end, s.size);
    weigh(s, seen, i, rows, end, nullptr, weights, sum, largest);
    product<false>(weights, s.across, 1, values, s.features, out, s.features, rows, s.features, end);
    for (int64_t r = 0; r < rows; r++) {
      // A query that sees nothing gives 0, and backwards e ** (s - inf) = 0.
      const float inverse = sum[r] != 0 ? 1 / sum[r] : 0;
      log_sum[i + r] = sum[r] != 0 ? largest[r] + std::log(sum[r]) : INFINITY;
      for (int64_t j = 0; j < s.size; j++)
        y.at[(i + r) * y.stride + j] = out[r * s.features + j] * inverse;
    }
  }
}

// to[0 .. n) += a[0] x[0 .. n) + a[1] x[step ..] + ..., for so many of x.
INLINE void add_scaled(const float* a, const float* x, int64_t step, int64_t count, int64_t n,
                       float* __restrict to) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4, x += 4 * step) {
    const float *b = x + step, *c = b + step, *d = c + step;
    for (int64_t j = 0; j < n; j++)
      to[j] += a[i] * x[j] + a[i + 1] * b[j] + a[i + 2] * c[j] + a[i + 3] * d[j];
  }
  for (; i < count; i++, x += step)
    for (int64_t j = 0; j < n; j++) to[j] += a[i] * x[j];
}

// The few queries of all heads of a group, from a cache: keys (size, keys), values (keys, size). Of
// them only what is seen is read, BLOCK keys at a time, for all heads while the L2 cache has it.
static void cached(const Shapes& all, const Arrays& a, int64_t batch, int64_t group) {
  constexpr int64_t BLOCK = 1024;
  const Sizes s{all.keys, all.size};
  const int64_t heads = all.heads / all.groups, rows = heads * all.length;
  const float* keys = a.k + (batch * all.groups + group) * s.keys * s.size;
  const float* values = a.v + (batch * all.groups + group) * s.keys * s.size;
  float* weights = room(0, rows * s.across);
  float *sums = room(1, rows), *largest = room(2, rows);
  std::fill_n(weights, rows * s.across, 0.0f);
  int64_t end = 0;
  for (int64_t h = 0; h < heads; h++)
    end = std::max(end, all.seen(a.seen, batch, group * heads + h).end(0, all.length, s.keys));
  auto each = [&](auto&& what) {
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = 0; i < all.length; i++)
        what(all.queries(a.q, batch, group * heads + h).from(i).at,
             all.queries(a.y, batch, group * heads + h).from(i).at, h * all.length + i);
  };
  for (int64_t from = 0; from < end; from += BLOCK)
    each([&](const float* q, float*, int64_t row) {
      add_scaled(q, keys + from, s.keys, s.size, std::min(BLOCK, end - from),
                 weights + row * s.across + from);
    });
  for (int64_t h = 0; h < heads; h++)
    weigh(s, all.seen(a.seen, batch, group * heads + h), 0, all.length, end, nullptr,
          weights + h * all.length * s.across, sums + h * all.length, largest + h * all.length);
  each([&](const float*, float* y, int64_t) { std::fill_n(y, s.size, 0.0f); });
  for (int64_t from = 0; from < end; from += BLOCK)
    each([&](const float*, float* y, int64_t row) {
      add_scaled(weights + row * s.across + from, values + from * s.size, s.size,
                 std::min(BLOCK, end - from), s.size, y);
    });
  each([&](const float*, float* y, int64_t row) {
    for (int64_t j = 0; j < s.size; j++) y[j] *= sums[row] != 0 ? 1 / sums[row] : 0;
  });
}

// Gradients of a group's keys and values, and of the queries of all its heads.
static void backward(const Shapes& all, const Arrays& a, int64_t batch, int64_t group) {
  const Sizes s{all.keys, all.size};
  const int64_t heads = all.heads / all.groups;
  const Rows k = all.of_keys(a.k, batch, group), v = all.of_keys(a.v, batch, group);
  const Rows dk = all.of_keys(a.dk, batch, group), dv = all.of_keys(a.dv, batch, group);
  float* keys = room(0, s.size * s.across);
  float* values = room(1, s.size * s.across);
  float* key_rows = room(2, s.keys * s.features);
  float* queries = room(3, QUERIES * s.features);
  float* gradients = room(4, QUERIES * s.features);
  float* weights = room(5, QUERIES * s.across);
  float* slopes = room(6, QUERIES * s.across);
  float* out = room(7, QUERIES * s.features);
  const int64_t sums = up(s.keys, TALL) * s.features;
  float *key_sums = room(8, sums), *value_sums = room(9, sums);
  std::fill_n(key_sums, sums, 0.0f);
  std::fill_n(value_sums, sums, 0.0f);
  copy_transposed(k, s.keys, s.size, s.across, keys);
  copy_transposed(v, s.keys, s.size, s.across, values);
  copy(k, s.keys, s.size, s.features, key_rows);
  for (int64_t head = group * heads; head < (group + 1) * heads; head++) {
    const Rows q = all.queries(a.q, batch, head), g = all.queries(a.g, batch, head);
    const Rows y = all.queries(a.y, batch, head), dq = all.queries(a.dq, batch, head);
    const Seen seen = all.seen(a.seen, batch, head);
    const float* log_sum = a.log_sum + (batch * all.heads + head) * all.length;
    for (int64_t i = 0; i < all.length; i += QUERIES) {
      const int64_t rows = std::min(QUERIES, all.length - i), end = seen.end(i, rows, s.keys);
      copy(q.from(i), rows, s.size, s.features, queries);
      copy(g.from(i), rows, s.size, s.features, gradients);
      product<false>(queries, s.features, 1, keys, s.across, weights, s.across, rows, end, s.size);
      weigh(s, seen, i, rows, end, log_sum + i, weights, nullptr, nullptr);
      product<false>(gradients, s.features, 1, values, s.across, slopes, s.across, rows, end, s.size);
      copy(y.from(i), rows, s.size, s.features, out);
      for (int64_t r = 0; r < rows; r++) {
        // ds = w (g . v - g . y), of which the last is what the sum of all weights takes away.
        Floats part = {};
        for (int64_t j = r * s.features; j < (r + 1) * s.features; j += LANES)
          part += load<Floats>(gradients + j) * load<Floats>(out + j);
        const float less = std::accumulate((float*)&part, (float*)&part + LANES, 0.0f);
        float *slope = slopes + r * s.across, *weight = weights + r * s.across;
        for (int64_t j = 0; j < end; j++) slope[j] = weight[j] * (slope[j] - less) * s.scale;
        std::fill(slope + end, slope + up(end, WIDE) + LANES, 0.0f);
      }
      product<true>(weights, 1, s.across, gradients, s.features, value_sums, s.features, end,
                    s.features, rows);
      product<true>(slopes, 1, s.across, queries, s.features, key_sums, s.features, end, s.features,
                    rows);
      product<false>(slopes, s.across, 1, key_rows, s.features, out, s.features, rows, s.features,
                     end);
      for (int64_t r = 0; r < rows; r++)
        memcpy(dq.at + (i + r) * dq.stride, out + r * s.features, s.size * sizeof *out);
    }
  }
  for (int64_t i = 0; i < s.keys; i++) {
    memcpy(dk.at + i * dk.stride, key_sums + i * s.features, s.size * sizeof(float));
    memcpy(dv.at + i * dv.stride, value_sums + i * s.features, s.size * sizeof(float));
  }
}

#undef BYTES
