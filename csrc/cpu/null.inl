// Loop of the null step. Included once for each instruction set, as kernels.inl.

template <class Word, int kWritten, int kGrads, int kRead>
void pass(const NullStep& s, int64_t begin, int64_t n) {
  const Word mask = static_cast<Word>(s.mask);
  const uint32_t state_mask = s.mask;
  Word* p = static_cast<Word*>(s.param) + begin;
  const Word* g[kGrads];
  uint32_t* w[kWritten > 0 ? kWritten : 1];
  const uint32_t* r[kRead > 0 ? kRead : 1];
  for (int k = 0; k < kGrads; ++k) g[k] = static_cast<const Word*>(s.grads[k]) + begin;
  for (int k = 0; k < kWritten; ++k) w[k] = static_cast<uint32_t*>(s.written[k]) + begin;
  for (int k = 0; k < kRead; ++k) r[k] = static_cast<const uint32_t*>(s.read[k]) + begin;
  FA_NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) {
    Word grads = 0;
    uint32_t reads = 1;
    for (int k = 0; k < kGrads; ++k) grads = static_cast<Word>(grads ^ g[k][i]);
    for (int k = 0; k < kRead; ++k) reads = reads ^ r[k][i];
    p[i] = static_cast<Word>(p[i] ^ (grads & mask));
    for (int k = 0; k < kWritten; ++k) w[k][i] = w[k][i] ^ (reads & state_mask);
  }
}

template <class Word, int kWritten, int kGrads, int kRead>
Pass pass_of(Number<kWritten>, Number<kGrads>, Number<kRead>) {
  return pass<Word, kWritten, kGrads, kRead>;
}

inline Pass choose(const NullStep& step) {
  Pass found = nullptr;
  with_streams(step, [&](auto word, auto written, auto grads, auto read) {
    found = pass_of<decltype(word)>(written, grads, read);
  });
  return found;
}
