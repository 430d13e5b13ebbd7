// SPDX-License-Identifier: Apache-2.0
// Reference implementation of batch_norm.h in plain C++: float32 data, sums in float64. It serves
// tests and machines without a GPU and is not optimized.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "batch_norm.h"

namespace {

int fail(char* message, const char* text) {
  std::snprintf(message, MXRESNET_MESSAGE_BYTES, "%s", text);
  return 1;
}

uint64_t element_count(const MxresnetBatchNorm& call) { return call.n * call.h * call.w * call.c; }

uint64_t mask_bytes(const MxresnetBatchNorm& call) {
  return call.operation == MXRESNET_BN ? 0 : (element_count(call) + 7) / 8;
}

// Calls visit(i) with the offset of each element of a channel.
template <typename Visit>
void for_each_element(const MxresnetBatchNorm& call, int64_t channel, Visit visit) {
  const int64_t pixels = call.h * call.w;
  for (int64_t image = 0; image < call.n; ++image)
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      visit(call.channel_last ? (image * pixels + pixel) * call.c + channel
                              : (image * call.c + channel) * pixels + pixel);
}

bool relu_passed(const uint8_t* mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

// Computes y of one channel and, if mask is not null, the ReLU mask.
void normalize(const MxresnetBatchNorm& call, int64_t c, double mean, double inverse_std,
               uint8_t* mask) {
  const float *x = static_cast<const float*>(call.x), *z = static_cast<const float*>(call.z);
  float* y = static_cast<float*>(call.y);
  const double scale = call.gamma[c] * inverse_std, shift = call.beta[c] - mean * scale;
  for_each_element(call, c, [&](int64_t i) {
    double value = x[i] * scale + shift;
    if (call.operation == MXRESNET_BN_ADD_RELU) value += z[i];
    if (call.operation != MXRESNET_BN) {
      const bool pass = !(value <= 0);  // a NaN passes, as in cuDNN, so that it is noticed
      if (mask) mask[i / 8] = static_cast<uint8_t>((mask[i / 8] & ~(1 << i % 8)) | pass << i % 8);
      if (!pass) value = 0;
    }
    y[i] = static_cast<float>(value);
  });
}

}  // namespace

extern "C" {

int mxresnet_batch_norm_check(const MxresnetBatchNorm* call, char* message) {
  if (call->n < 1 || call->h < 1 || call->w < 1 || call->c < 1)
    return fail(message, "data has no elements");
  if (call->n * call->h * call->w < 2)
    return fail(message, "a channel has one value only, which has no variance");
  return 0;
}

int mxresnet_plan_create(const MxresnetBatchNorm* call, MxresnetPlan** plan, MxresnetSizes* sizes,
                         char* message) {
  *plan = nullptr;  // this implementation needs none
  *sizes = MxresnetSizes{mask_bytes(*call), 0, 0};
  return mxresnet_batch_norm_check(call, message);
}

void mxresnet_plan_destroy(MxresnetPlan*) {}

int mxresnet_set_device(int, int*, char*) { return 0; }

int mxresnet_allocate(uint64_t bytes, void** memory, char* message) {
  *memory = std::malloc(bytes);
  return *memory ? 0 : fail(message, "out of memory");
}

void mxresnet_free(void* memory) { std::free(memory); }

int mxresnet_batch_norm_forward(const MxresnetPlan*, const MxresnetBatchNorm* call, char* message) {
  if (mxresnet_batch_norm_check(call, message)) return 1;
  if (call->reserve_bytes < mask_bytes(*call)) return fail(message, "the reserve is too small");
  const float* x = static_cast<const float*>(call->x);
  const double count = static_cast<double>(call->n * call->h * call->w);
  const double momentum = call->momentum;
  for (int64_t c = 0; c < call->c; ++c) {
    double mean = 0, variance = 0;
    for_each_element(*call, c, [&](int64_t i) { mean += x[i]; });
    mean /= count;
    for_each_element(*call, c, [&](int64_t i) { variance += (x[i] - mean) * (x[i] - mean); });
    variance /= count;
    const double inverse_std = 1 / std::sqrt(variance + call->epsilon);
    normalize(*call, c, mean, inverse_std, static_cast<uint8_t*>(call->reserve));
    call->saved_mean[c] = static_cast<float>(mean);
    call->saved_inverse_std[c] = static_cast<float>(inverse_std);
    call->running_mean[c] =
        static_cast<float>(momentum * call->running_mean[c] + (1 - momentum) * mean);
    call->running_variance[c] =
        static_cast<float>(momentum * call->running_variance[c] +
                           (1 - momentum) * variance * count / (count - 1));  // unbiased
  }
  return 0;
}

int mxresnet_batch_norm_backward(const MxresnetPlan*, const MxresnetBatchNorm* call,
                                 char* message) {
  if (mxresnet_batch_norm_check(call, message)) return 1;
  if (call->reserve_bytes < mask_bytes(*call)) return fail(message, "the reserve is too small");
  const float *x = static_cast<const float*>(call->x), *dy = static_cast<const float*>(call->dy);
  const uint8_t* mask = static_cast<const uint8_t*>(call->reserve);
  float *dx = static_cast<float*>(call->dx), *dz = static_cast<float*>(call->dz);
  const double count = static_cast<double>(call->n * call->h * call->w);
  auto gradient_before_relu = [&](int64_t i) {
    return call->operation == MXRESNET_BN || relu_passed(mask, i) ? dy[i] : 0.f;
  };
  for (int64_t c = 0; c < call->c; ++c) {
    const double mean = call->saved_mean[c], inverse_std = call->saved_inverse_std[c];
    double dbeta = 0, dgamma = 0;
    for_each_element(*call, c, [&](int64_t i) {
      dbeta += gradient_before_relu(i);
      dgamma += gradient_before_relu(i) * (x[i] - mean) * inverse_std;
    });
    for_each_element(*call, c, [&](int64_t i) {
      const double normalized = (x[i] - mean) * inverse_std, gradient = gradient_before_relu(i);
      dx[i] = static_cast<float>(call->gamma[c] * inverse_std *
                                 (gradient - dbeta / count - normalized * dgamma / count));
      if (call->operation == MXRESNET_BN_ADD_RELU) dz[i] = static_cast<float>(gradient);
    });
    call->dgamma[c] = static_cast<float>(dgamma);
    call->dbeta[c] = static_cast<float>(dbeta);
  }
  return 0;
}

int mxresnet_batch_norm_evaluate(const MxresnetPlan*, const MxresnetBatchNorm* call,
                                 char* message) {
  if (mxresnet_batch_norm_check(call, message)) return 1;
  for (int64_t c = 0; c < call->c; ++c) {
    const double inverse_std = 1 / std::sqrt(call->running_variance[c] + call->epsilon);
    normalize(*call, c, call->running_mean[c], inverse_std, nullptr);
  }
  return 0;
}

}  // extern "C"
