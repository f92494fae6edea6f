// What XLA's CPU backend does slowly and a sampler does most: attention to a cache, writing into it, products of few rows.
//
// Compiled for the machine it runs on by cpu_kernels.py, which says what goes in and comes out.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// Into the second level of cache, what memory that is read in its order will need soon.
inline void fetch(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + 8192, 0, 2); }

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Vec load(const uint16_t* from) {  // bfloat16
  Halves x;
  std::memcpy(&x, from, sizeof x);
  Bits wide = __builtin_convertvector(x, Bits) << 16;
  Vec out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

inline Vec all(float x) { return x - Vec{}; }

inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }

inline float largest_of(Vec x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, x[i]);
  return most;
}

inline float sum_of(Vec x) {
  float sum = x[0];
  for (int i = 1; i < kLanes; ++i) sum += x[i];
  return sum;
}

// 2^x for x <= 0, 0 below -126; the relative error is below 3e-7.
inline Vec exp2_of(Vec x) {
  const Vec least = all(-126.0f);
  const auto is_zero = x < least;
  x = is_zero ? least : x;
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec rounded = x + magic;
  const Vec f = x - (rounded - magic);  // in [-1/2, 1/2]
  Vec y = all(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  Ints bits, exponent;
  std::memcpy(&bits, &y, sizeof y);
  std::memcpy(&exponent, &rounded, sizeof rounded);
  bits += exponent << 23;
  std::memcpy(&y, &bits, sizeof y);
  return is_zero ? Vec{} : y;
}

// Calls work(0) .. work(count - 1), each once, on the pool's threads and this one; returns when all are done.
template <class Work>
void share(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  // A thread that comes too late finds nothing to do, and `work`, which is gone by then, is not touched.
  auto run = [state, count, &work] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      work(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = std::min(pool.num_threads(), count); i > 1; --i) pool.Schedule([run] { run(); });
  run();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// Calls run(T{}) with the type that holds such numbers.
template <class Run>
ffi::Error of_type(ffi::DataType type, const Run& run) {
  if (type == ffi::F32)
    run(float{});
  else if (type == ffi::BF16)
    run(uint16_t{});
  else
    return ffi::Error::InvalidArgument("numbers must be float32 or bfloat16");
  return ffi::Error::Success();
}

template <class T>
const T* numbers(const ffi::AnyBuffer& of) {
  return static_cast<const T*>(of.untyped_data());
}

// ---- Attention ------------------------------------------------------------------------------------------------------

constexpr int kKeyBlock = 32;  // KEY_BLOCK of cache.py
constexpr int kSpan = 128;     // positions that are scored before their values are summed up
constexpr int kTile = 6;       // queries that read keys together
constexpr int kTask = 48;      // queries of a task; whole tiles
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Sizes {
  int64_t B, C, N, K, H, S, num_rows;  // as in cache.py; of q the rows B, of the cache num_rows
};

// The keys and values of a span of positions, start .. start + count.
template <class T>
struct Span {
  const T* k;  // blocks [H, kKeyBlock]
  const T* v;  // [count, H]
  int64_t start;
  int count;
};

// Queries and what is known of them so far: weights are relative to 2^largest.
struct Queries {
  const float* q;       // [num, H], scaled
  const int32_t* seen;  // the last position that each sees
  float* largest;
  float* total;  // of weights
  float* out;    // [num, H], of weighted values
};

// Products of M queries with the keys of `count` positions, and of some more in the last block.
template <int M, class T>
inline void score(const float* q, const T* k, int64_t H, int count, float* scores) {
  for (int at = 0; at < count; at += 2 * kLanes) {
    const T* column = k + at / kKeyBlock * H * kKeyBlock + at % kKeyBlock;
    Vec sums[M][2] = {};
    for (int64_t h = 0; h < H; ++h) {
      fetch(column + h * kKeyBlock);
      const Vec k0 = load(column + h * kKeyBlock), k1 = load(column + h * kKeyBlock + kLanes);
      for (int m = 0; m < M; ++m) {
        sums[m][0] += k0 * q[m * H + h];
        sums[m][1] += k1 * q[m * H + h];
      }
    }
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < 2; ++i) store(scores + m * kSpan + at + i * kLanes, sums[m][i]);
  }
}

// Weights of `scored` scores of one query, whole vectors of them; new positions may make all weights before smaller.
inline void weigh(float* scores, int scored, int64_t H, float& largest, float& total, float* out) {
  Vec most = load(scores);
  for (int s = kLanes; s < scored; s += kLanes) most = larger(most, load(scores + s));
  const float before = largest;
  largest = std::max(before, largest_of(most));
  if (largest == kNothing) {
    std::memset(scores, 0, scored * sizeof *scores);
    return;
  }
  if (largest > before) {
    const float shrink = std::exp2(before - largest);
    total *= shrink;
    for (int64_t h = 0; h < H; h += kLanes) store(out + h, load(out + h) * shrink);
  }
  Vec sum{};
  for (int s = 0; s < scored; s += kLanes) {
    const Vec weight = exp2_of(load(scores + s) - largest);
    store(scores + s, weight);
    sum += weight;
  }
  total += sum_of(sum);
}

template <int M, int Vecs, class T>
inline void add_values(const float* weights, const T* v, int64_t H, int count, float* out) {
  Vec sums[M][Vecs];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < Vecs; ++i) sums[m][i] = load(out + m * H + i * kLanes);
  for (int s = 0; s < count; ++s) {
    fetch(v + s * H);
    Vec value[Vecs];
    for (int i = 0; i < Vecs; ++i) value[i] = load(v + s * H + i * kLanes);
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < Vecs; ++i) sums[m][i] += value[i] * weights[m * kSpan + s];
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < Vecs; ++i) store(out + m * H + i * kLanes, sums[m][i]);
}

template <int M, class T>
void attend_span(const Queries& of, const Span<T>& span, int64_t H) {
  alignas(64) float weights[M * kSpan];
  const int64_t reach = *std::max_element(of.seen, of.seen + M) + 1 - span.start;
  if (reach <= 0) return;
  const int count = std::min<int64_t>(reach, span.count);
  const int scored = (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  score<M>(of.q, span.k, H, count, weights);
  for (int m = 0; m < M; ++m) {
    float* mine = weights + m * kSpan;
    const int64_t end = std::clamp<int64_t>(of.seen[m] + 1 - span.start, 0, count);
    std::fill(mine + end, mine + scored, kNothing);
    weigh(mine, scored, H, of.largest[m], of.total[m], of.out + m * H);
  }
  int64_t h = 0;
  for (; h + 2 * kLanes <= H; h += 2 * kLanes) add_values<M, 2>(weights, span.v + h, H, count, of.out + h);
  if (h < H) add_values<M, 1>(weights, span.v + h, H, count, of.out + h);
}

template <class T>
void attend_tile(int num, const Queries& of, const Span<T>& span, int64_t H) {
  switch (num) {
    case 1: return attend_span<1>(of, span, H);
    case 2: return attend_span<2>(of, span, H);
    case 3: return attend_span<3>(of, span, H);
    case 4: return attend_span<4>(of, span, H);
    case 5: return attend_span<5>(of, span, H);
    default: return attend_span<kTile>(of, span, H);
  }
}

template <class T>
void attend_tiles(int num, const Queries& of, const Span<T>& span, int64_t H) {
  for (int i = 0; i < num; i += kTile)
    attend_tile(std::min(kTile, num - i),
                Queries{of.q + i * H, of.seen + i, of.largest + i, of.total + i, of.out + i * H}, span, H);
}

inline void widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(from + i));
}

// Of row b the queries first .. first + kTask of those that read a head: of every token all of the head's.
template <class T>
void attend_task(const Sizes& z, const float* q, const T* k, const T* v, const int32_t* positions, int64_t b,
                 int64_t row, int64_t head, int64_t first, float* out) {
  const int64_t H = z.H, G = z.N / z.K;
  const int num = std::min<int64_t>(kTask, z.C * G - first);
  thread_local std::vector<float> space;  // scaled queries, sums of values, a span's keys and values in float32
  space.resize(2 * (kTask + kSpan) * H);
  float *scaled = space.data(), *sums = scaled + kTask * H, *wide_k = sums + kTask * H, *wide_v = wide_k + kSpan * H;
  float largest[kTask], total[kTask];
  int32_t seen[kTask];
  auto place = [&](int i) { return ((b * z.C + (first + i) / G) * z.N + head * G + (first + i) % G) * H; };
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(H));  // powers of 2 are cheaper than those of e
  for (int i = 0; i < num; ++i) {
    for (int64_t h = 0; h < H; ++h) scaled[i * H + h] = q[place(i) + h] * scale;
    largest[i] = kNothing;
    total[i] = 0;
    seen[i] = positions[b * z.C + (first + i) / G];
  }
  std::fill(sums, sums + num * H, 0.0f);
  const Queries of{scaled, seen, largest, total, sums};
  const int64_t reach = std::min<int64_t>(*std::max_element(seen, seen + num) + 1, z.S);
  k += (row * z.K + head) * z.S * H;
  v += (row * z.K + head) * z.S * H;
  for (int64_t start = 0; start < reach; start += kSpan) {
    const int count = std::min<int64_t>(kSpan, reach - start);
    const Span<T> span{k + start * H, v + start * H, start, count};
    if constexpr (sizeof(T) < sizeof(float)) {
      if (num > kTile) {
        widen(span.k, (count + kKeyBlock - 1) / kKeyBlock * kKeyBlock * H, wide_k);
        widen(span.v, count * H, wide_v);
        attend_tiles(num, of, Span<float>{wide_k, wide_v, start, count}, H);
        continue;
      }
    }
    attend_tiles(num, of, span, H);
  }
  for (int i = 0; i < num; ++i)
    for (int64_t h = 0; h < H; ++h) out[place(i) + h] = sums[i * H + h] / total[i];
}

ffi::Error run_attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> rows, ffi::ResultBuffer<ffi::F32> out) {
  const auto of_q = q.dimensions(), of_v = v.dimensions();
  const Sizes z{of_q[0], of_q[1], of_q[2], of_v[1], of_q[3], of_v[2], of_v[0]};
  if (k.dimensions()[4] != kKeyBlock || z.H % kLanes || k.element_type() != v.element_type())
    return ffi::Error::InvalidArgument("attend: keys must lie in blocks of 32, heads be a multiple of 16 wide");
  const int64_t tasks = (z.C * z.N / z.K + kTask - 1) / kTask;
  return of_type(k.element_type(), [&](auto type) {
    using T = decltype(type);
    share(pool, z.B * z.K * tasks, [&](int64_t i) {
      const int64_t b = i / (z.K * tasks), head = i / tasks % z.K, first = i % tasks * kTask;
      const int64_t row = std::clamp<int64_t>(rows.typed_data()[b], 0, z.num_rows - 1);
      attend_task(z, q.typed_data(), numbers<T>(k), numbers<T>(v), positions.typed_data(), b, row, head, first,
                  out->typed_data());
    });
  });
}

// ---- New keys and values --------------------------------------------------------------------------------------------

template <class T>
void write_head(const Sizes& z, const T* new_k, const T* new_v, const int32_t* positions, int64_t b, int64_t row,
                int64_t head, T* k, T* v) {
  k += (row * z.K + head) * z.S * z.H;
  v += (row * z.K + head) * z.S * z.H;
  for (int64_t c = 0; c < z.C; ++c) {
    const int64_t at = positions[b * z.C + c], from = ((b * z.C + c) * z.K + head) * z.H;
    if (at < 0 || at >= z.S) continue;
    T* column = k + at / kKeyBlock * z.H * kKeyBlock + at % kKeyBlock;
    for (int64_t h = 0; h < z.H; ++h) column[h * kKeyBlock] = new_k[from + h];
    std::copy(new_v + from, new_v + from + z.H, v + at * z.H);
  }
}

// `k` and `v` are the cache's own memory, as XLA was told: what it held is there, but for what is written now.
ffi::Error run_write(ffi::ThreadPool pool, ffi::AnyBuffer new_k, ffi::AnyBuffer new_v, ffi::Buffer<ffi::S32> positions,
                     ffi::Buffer<ffi::S32> rows, ffi::AnyBuffer, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> k,
                     ffi::Result<ffi::AnyBuffer> v) {
  const auto of_new = new_k.dimensions(), of_v = v->dimensions();
  const Sizes z{of_new[0], of_new[1], 0, of_v[1], of_v[3], of_v[2], of_v[0]};
  if (k->dimensions()[4] != kKeyBlock || new_k.element_type() != k->element_type())
    return ffi::Error::InvalidArgument("write: keys must lie in blocks of 32, and be of the cache's type");
  return of_type(k->element_type(), [&](auto type) {
    using T = decltype(type);
    share(pool, z.B * z.K, [&](int64_t i) {
      const int64_t b = i / z.K, row = rows.typed_data()[b];
      if (row < 0 || row >= z.num_rows) return;
      write_head(z, numbers<T>(new_k), numbers<T>(new_v), positions.typed_data(), b, row, i % z.K,
                 static_cast<T*>(k->untyped_data()), static_cast<T*>(v->untyped_data()));
    });
  });
}

// ---- Products with the rows of a matrix -----------------------------------------------------------------------------

constexpr int64_t kTaskBytes = 1 << 15;  // of the matrix

inline void add_products(Vec& sum, const float* x, const float* w) { sum += load(x) * load(w); }

#if defined(__AVX512BF16__)
inline void add_products(Vec& sum, const uint16_t* x, const uint16_t* w) {
  sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(w));
}
#else
inline void add_products(Vec& sum, const uint16_t* x, const uint16_t* w) { sum += load(x) * load(w); }
#endif

// Numbers of a row that `add_products` takes.
template <class T>
constexpr int64_t step() {
#if defined(__AVX512BF16__)
  return 64 / sizeof(T);
#else
  return kLanes;
#endif
}

template <int C, int Half, int... I>
inline Vec interleaved(Vec a, Vec b, std::integer_sequence<int, I...>) {
#define LANE(i) ((i) % (2 * C) < C ? 0 : kLanes) + (i) / (2 * C) * C + (i) % C + Half * kLanes / 2
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LANE(I)...);
#else
  return __builtin_shuffle(a, b, Ints{LANE(I)...});
#endif
#undef LANE
}

// Of kLanes vectors the sum of each one's lanes. With C = 1, 2, 4 .. lanes of that many of them lie beside each other:
// of two such vectors the lower halves, C lanes of one and of the other in turn, are added to the upper halves.
template <int C = 1>
inline Vec sums_of(Vec* x) {
  if constexpr (C == kLanes) {
    return x[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    for (int i = 0; i < kLanes / C; i += 2)
      x[i / 2] = interleaved<C, 0>(x[i], x[i + 1], lanes) + interleaved<C, 1>(x[i], x[i + 1], lanes);
    return sums_of<2 * C>(x);
  }
}

// Of O rows of w and R rows of x, O * R = kLanes: products [R, out] at `to`.
template <int O, int R, class T>
inline void multiply_tile(const T* x, int64_t num_x, const T* w, int64_t num_w, int64_t in, float* to, int64_t out) {
  const T *xs[R], *ws[O];
  for (int r = 0; r < R; ++r) xs[r] = x + std::min<int64_t>(r, num_x - 1) * in;
  for (int o = 0; o < O; ++o) ws[o] = w + std::min<int64_t>(o, num_w - 1) * in;
  Vec sums[O * R] = {};
  for (int64_t i = 0; i < in; i += step<T>())
    for (int o = 0; o < O; ++o) {
      fetch(ws[o] + i);
      for (int r = 0; r < R; ++r) add_products(sums[o * R + r], xs[r] + i, ws[o] + i);
    }
  const Vec all_sums = sums_of(sums);
  for (int o = 0; o < std::min<int64_t>(O, num_w); ++o)
    for (int r = 0; r < std::min<int64_t>(R, num_x); ++r) to[r * out + o] = all_sums[o * R + r];
}

// The same of any number of rows of x.
template <class T>
inline void multiply_rows(const T* x, int64_t num_x, const T* w, int64_t num_w, int64_t in, float* to, int64_t out) {
  constexpr int kRows = std::min(8, kLanes);
  for (int64_t r = 0; r < num_x; r += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, num_x - r);
    auto each = [&](int wide, auto function) {
      for (int64_t o = 0; o < num_w; o += wide)
        function(x + r * in, rows, w + o * in, std::min<int64_t>(wide, num_w - o), in, to + r * out + o, out);
    };
    if (rows == 1)
      each(kLanes, multiply_tile<kLanes, 1, T>);
    else if (rows == 2)
      each(kLanes / 2, multiply_tile<kLanes / 2, 2, T>);
    else if (rows <= 4)
      each(kLanes / 4, multiply_tile<kLanes / 4, 4, T>);
    else
      each(kLanes / kRows, multiply_tile<kLanes / kRows, kRows, T>);
  }
}

ffi::Error run_multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> to) {
  const int64_t num_x = x.dimensions()[0], in = x.dimensions()[1], out = w.dimensions()[0];
  if (x.element_type() != w.element_type() || in % 32) return ffi::Error::InvalidArgument("multiply: unsupported");
  return of_type(x.element_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t rows = std::max<int64_t>(kTaskBytes / (in * sizeof(T)) / kLanes, 1) * kLanes;
    share(pool, (out + rows - 1) / rows, [&](int64_t i) {
      const int64_t o = i * rows;
      multiply_rows(numbers<T>(x), num_x, numbers<T>(w) + o * in, std::min<int64_t>(rows, out - o), in,
                    to->typed_data() + o, out);
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(multiply, run_multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(attend, run_attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(write_new, run_write,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
