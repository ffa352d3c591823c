#include "plugins/cpu/quantize.h"

#include "plugins/cpu/op.h"

// quantize.h for callers outside, with `type` as an ONNX number. Returns the number of rows done, or -1 if
// GLM_EXPORT_CPU is wrong.
extern "C" __attribute__((visibility("default"))) int64_t glm_quantize_rows(int32_t type, const void* x, size_t O,
                                                                            size_t I, uint8_t* values, float* scales) {
  using namespace glm;  // NOLINT(google-build-using-namespace)
  try {
    auto* quantize = quantize_rows_scalar;
    const Isa best = isa();
#if defined(__x86_64__)
    if (best == Isa::avx2) quantize = quantize_rows_avx2;
    if (best == Isa::avx512) quantize = quantize_rows_avx512;
#else
    (void)best;
#endif
    return static_cast<int64_t>(quantize(static_cast<Type>(type), x, O, I, values, scales));
  } catch (const std::exception&) {
    return -1;
  }
}
