// CPU loops. Included once for each instruction set, inside its namespace and after all headers. Code here must not
// instantiate functions that the linker could share between instruction sets.

template <class B, int kMode, bool kCoupled, class T>
void step(const Block<T>& block, const Scalars<T>& scalars) {
  const Scalars<T> r = scalars;
  const int64_t n = block.n;
  T* p = block.p;
  const T* g = block.g;
  T* s0 = block.state[0];
  T* s1 = block.state[1];
  T* s2 = block.state[2];
  T* mean_sum = block.mean_sum;
  const T* gain = block.gain;
  T* grad_sum = block.grad_sum;
  T* direction = block.previous;
  constexpr int kStates = B::kStates;
  FA_NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) {
    Element<T, kStates> e;
    e.p = p[i];
    if constexpr (kStates > 0) e.state[0] = s0[i];
    if constexpr (kStates > 1) e.state[1] = s1[i];
    if constexpr (kStates > 2) e.state[2] = s2[i];
    if constexpr ((kMode & kAddsMean) != 0) e.mean_sum = mean_sum[i];
    if constexpr ((kMode & kScalesElements) != 0) e.gain = gain[i];
    if constexpr ((kMode & kScalesElements) != 0) e.grad_sum = grad_sum[i];
    const T u = step_element<B, kMode&(kModes - 1), kCoupled>(e, g[i], r);
    p[i] = e.p;
    if constexpr (kStates > 0) s0[i] = e.state[0];
    if constexpr (kStates > 1) s1[i] = e.state[1];
    if constexpr (kStates > 2) s2[i] = e.state[2];
    if constexpr ((kMode & kAddsMean) != 0) mean_sum[i] = e.mean_sum;
    if constexpr ((kMode & kScalesElements) != 0) grad_sum[i] = e.grad_sum;
    if constexpr (kMode == kStoresDirection) direction[i] = u;
  }
}

template <class T>
void adjust(const Block<T>& block, const Scalars<T>& scalars) {
  const Scalars<T> r = scalars;
  const int64_t n = block.n;
  T* gain = block.gain;
  T* grad_sum = block.grad_sum;
  int8_t* sign_prev = block.sign_prev;
  FA_NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) adjust_element(gain[i], grad_sum[i], sign_prev[i], r);
}

// Lanes of one chunk and their sum, in the order of gain.h.
struct Lanes {
  double sums[kLanes];
  int used;

  explicit Lanes(int64_t n) : used(n < kLanes ? (static_cast<int>(n) + 3) / 4 * 4 : kLanes) {
    for (int i = 0; i < used; ++i) sums[i] = 0;
  }
  double total() {
    const int threads = used / kLanesOfThread;
    for (int t = 0; t < threads; ++t) {
      sums[t] = (sums[4 * t] + sums[4 * t + 1]) + (sums[4 * t + 2] + sums[4 * t + 3]);
    }
    // Unused lanes are 0, so they can be skipped.
    for (int half = kLanes / kLanesOfThread / 2; half > 0; half /= 2) {
      for (int t = 0; t < half && t + half < threads; ++t) sums[t] += sums[t + half];
    }
    return threads > 0 ? sums[0] : 0;
  }
};

// Calls body(i, lane) for the elements of a chunk in the order of gain.h. The inner loop can be vectorized.
template <class Body>
FA_INLINE void for_lanes(int64_t n, const Body& body) {
  for (int64_t row = 0; row < n; row += kLanes) {
    const int width = n - row < kLanes ? static_cast<int>(n - row) : kLanes;
    FA_NO_OVERLAP
    for (int lane = 0; lane < width; ++lane) body(row + lane, lane);
  }
}

template <class T>
double slope_stored(const Block<T>& block, const Scalars<T>& scalars, bool coupled) {
  Lanes lanes(block.n);
  const T* p = block.p;
  const T* g = block.g;
  const T* u = block.previous;
  double* sums = lanes.sums;
  const T factor = scalars.grad_factor, weight_decay = scalars.weight_decay;
  for_lanes(block.n, [&](int64_t i, int lane) {
    const T grad = coupled ? g[i] * factor + weight_decay * p[i] : g[i] * factor;
    sums[lane] += static_cast<double>(grad) * static_cast<double>(u[i]);
  });
  return lanes.total();
}

template <class B, class T>
double slope_of_state(const Block<T>& block, const Scalars<T>& scalars, bool coupled) {
  Lanes lanes(block.n);
  const Scalars<T> r = scalars;
  const T* p = block.p;
  const T* g = block.g;
  const T* s0 = block.state[0];
  const T* s1 = block.state[1];
  const T* s2 = block.state[2];
  double* sums = lanes.sums;
  constexpr int kStates = B::kStates;
  for_lanes(block.n, [&](int64_t i, int lane) {
    T s[3] = {0, 0, 0};
    if constexpr (kStates > 0) s[0] = s0[i];
    if constexpr (kStates > 1) s[1] = s1[i];
    if constexpr (kStates > 2) s[2] = s2[i];
    const T grad = coupled ? g[i] * r.grad_factor + r.weight_decay * p[i] : g[i] * r.grad_factor;
    sums[lane] += static_cast<double>(grad) * static_cast<double>(B::direction(s, r));
  });
  return lanes.total();
}

template <Source kSource, class T>
Products measure(const Block<T>& block, const Measure<T>& by) {
  Lanes num(block.n), sq(block.n);
  const Measure<T> m = by;
  const T* p = block.p;
  const T* g = block.g;
  T* sum = block.mean_sum;
  T* start = block.start;
  T* previous = block.previous;
  double* nums = num.sums;
  double* sqs = sq.sums;
  const bool has_grad = g != nullptr;
  for_lanes(block.n, [&](int64_t i, int lane) {
    T mean, direction;
    if constexpr (kSource == Source::gradient) {
      mean = direction = (has_grad ? sum[i] + g[i] * m.grad_factor : sum[i]) / m.applied;
    } else {
      mean = direction = (start[i] - p[i]) / m.travelled;
      start[i] = p[i];
    }
    if constexpr (kSource == Source::preconditioned) mean = sum[i] / m.applied;
    if constexpr (kSource != Source::displacement) sum[i] = T(0);
    nums[lane] += static_cast<double>(mean) * static_cast<double>(previous[i]);
    sqs[lane] += static_cast<double>(mean) * static_cast<double>(direction);
    previous[i] = direction;
  });
  return {num.total(), sq.total()};
}

template <class From, class T>
void load(const void* from, T* to, int64_t n) {
  const From* source = static_cast<const From*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(widen(source[i]));
}

template <class To, class T>
void store(const T* from, void* to, int64_t n) {
  To* target = static_cast<To*>(to);
  for (int64_t i = 0; i < n; ++i) narrow(static_cast<Compute<To>>(from[i]), target[i]);
}

template <class T>
void join_all(const void* high, const int16_t* low, T* to, int64_t n) {
  const BFloat16* upper = static_cast<const BFloat16*>(high);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(join(upper[i], low[i]));
}

template <class T>
void split_all(const T* from, void* high, int16_t* low, int64_t n) {
  BFloat16* upper = static_cast<BFloat16*>(high);
  FA_NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) split(static_cast<float>(from[i]), upper[i], low[i]);
}

template <class T>
void round_all(const T* from, void* to, int64_t first, int64_t n, const Noise& noise) {
  constexpr int kBlocks = 64;
  BFloat16* target = static_cast<BFloat16*>(to);
  uint32_t bits[kNoiseBlock * kBlocks];
  for (int64_t begin = 0; begin < n; begin += kNoiseBlock * kBlocks) {
    for (int b = 0; b < kBlocks; ++b) {
      uint32_t words[4];
      random_words(noise, (first + begin) / kNoiseBlock + b, words);
      for (int i = 0; i < kNoiseBlock; ++i) bits[kNoiseBlock * b + i] = random_bits(words, i);
    }
    const int64_t count = n - begin < kNoiseBlock * kBlocks ? n - begin : kNoiseBlock * kBlocks;
    FA_NO_OVERLAP
    for (int64_t i = 0; i < count; ++i) {
      round_stochastically(static_cast<float>(from[begin + i]), bits[i], target[begin + i]);
    }
  }
}

// clang-format off
#define FA_DECAYS(B, mode, T) { step<B, mode, false, T>, step<B, mode, true, T> }
#define FA_MODES(B, T) FA_DECAYS(B, kRate, T), FA_DECAYS(B, kAddsMean, T), FA_DECAYS(B, kScalesElements, T), FA_DECAYS(B, kScalesAndAdds, T)
// clang-format on

template <class B, bool kCoupled, class T>
constexpr typename Loops<T>::Step storing() {
  if constexpr (B::kStoresDirection) {
    return step<B, kStoresDirection, kCoupled, T>;
  } else {
    return nullptr;
  }
}

template <class T>
constexpr Loops<T> loops() {
  return {
#define FA_STEPS(B) {FA_MODES(B, T), {storing<B, false, T>(), storing<B, true, T>()}},
      {FA_FOR_EACH_BACKBONE(FA_STEPS)},
#undef FA_STEPS
      adjust<T>,
      slope_stored<T>,
#define FA_SLOPE(B) slope_of_state<B, T>,
      {FA_FOR_EACH_BACKBONE(FA_SLOPE)},
#undef FA_SLOPE
      {measure<Source::displacement, T>, measure<Source::gradient, T>, measure<Source::preconditioned, T>},
      {load<float, T>, load<double, T>, load<BFloat16, T>, load<Half, T>},
      {store<float, T>, store<double, T>, store<BFloat16, T>, store<Half, T>},
      join_all<T>,
      split_all<T>,
      round_all<T>,
  };
}
#undef FA_DECAYS
#undef FA_MODES
