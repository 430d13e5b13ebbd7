// SPDX-License-Identifier: Apache-2.0
// Fake of cuDNN and the CUDA runtime: the functions that batch_norm_cudnn.cc calls, computed on the
// host as cuDNN's documentation defines them. With it the calls are tested without a GPU.
//
// A call that is not exactly as documented for these modes returns CUDNN_STATUS_BAD_PARAM. The
// function that the environment variable FAKE_CUDNN_FAILING_FUNCTION names returns an error. With
// FAKE_CUDNN_ROUNDS set, the forward pass rounds to float16 before it adds, as cuDNN may.
#include <cudnn.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

struct cudnnTensorStruct {
  cudnnTensorFormat_t format;
  cudnnDataType_t type;
  int n, c, h, w;
  bool per_channel;
};
struct cudnnActivationStruct {
  cudnnActivationMode_t mode;
  cudnnNanPropagation_t nan;
};
struct cudnnContext {
  cudaStream_t stream;
};

namespace {

typedef _Float16 Half;

bool must_fail(const char* function) {
  const char* failing = std::getenv("FAKE_CUDNN_FAILING_FUNCTION");
  return failing && !std::strcmp(failing, function);
}

#define MAY_FAIL \
  if (must_fail(__func__)) return CUDNN_STATUS_EXECUTION_FAILED
#define REQUIRE(condition) \
  if (!(condition)) return CUDNN_STATUS_BAD_PARAM

size_t element_count(cudnnTensorDescriptor_t t) {
  return static_cast<size_t>(t->n) * t->h * t->w * t->c;
}
size_t reserve_bytes(cudnnBatchNormOps_t ops, cudnnTensorDescriptor_t x) {
  return ops == CUDNN_BATCHNORM_OPS_BN ? 0 : (element_count(x) + 7) / 8 + 24;
}
size_t workspace_bytes(bool backward, cudnnTensorDescriptor_t x) {
  return 8 * x->c + (backward ? 72 : 40);
}

bool is_data(cudnnTensorDescriptor_t t) {
  return t && !t->per_channel && t->format == CUDNN_TENSOR_NHWC && t->type == CUDNN_DATA_HALF &&
         t->c % 4 == 0;
}

bool is_supported(cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops,
                  cudnnTensorDescriptor_t x, cudnnActivationDescriptor_t activation) {
  const bool relu = activation && activation->mode == CUDNN_ACTIVATION_RELU;
  return handle && mode == CUDNN_BATCHNORM_SPATIAL_PERSISTENT && is_data(x) &&
         relu == (ops != CUDNN_BATCHNORM_OPS_BN);
}

// The stream that the tests pass.
bool is_test_stream(cudaStream_t stream) { return stream == reinterpret_cast<cudaStream_t>(5); }
bool has_test_stream(cudnnHandle_t handle) { return is_test_stream(handle->stream); }

double scale_factor(const void* pointer) { return *static_cast<const float*>(pointer); }

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return must_fail(__func__) ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return must_fail(__func__) || device != 0 ? cudaErrorInvalidDevice : cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (must_fail(__func__)) return cudaErrorMemoryAllocation;
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (must_fail(__func__) || kind != cudaMemcpyDeviceToDevice || !is_test_stream(stream))
    return cudaErrorInvalidValue;
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "a CUDA error"; }
const char* cudnnGetErrorString(cudnnStatus_t status) {
  return status == CUDNN_STATUS_BAD_PARAM ? "bad parameter" : "a cuDNN error";
}

cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  MAY_FAIL;
  *handle = new cudnnContext();
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  MAY_FAIL;
  handle->stream = stream;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t* t) {
  MAY_FAIL;
  *t = new cudnnTensorStruct();
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnDestroyTensorDescriptor(cudnnTensorDescriptor_t t) {
  delete t;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnCreateActivationDescriptor(cudnnActivationDescriptor_t* a) {
  MAY_FAIL;
  *a = new cudnnActivationStruct();
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnDestroyActivationDescriptor(cudnnActivationDescriptor_t a) {
  delete a;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetTensor4dDescriptor(cudnnTensorDescriptor_t t, cudnnTensorFormat_t format,
                                         cudnnDataType_t type, int n, int c, int h, int w) {
  MAY_FAIL;
  *t = cudnnTensorStruct{format, type, n, c, h, w, false};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnDeriveBNTensorDescriptor(cudnnTensorDescriptor_t t,
                                            const cudnnTensorDescriptor_t x, cudnnBatchNormMode_t) {
  MAY_FAIL;
  *t = cudnnTensorStruct{x->format, CUDNN_DATA_FLOAT, 1, x->c, 1, 1, true};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetActivationDescriptor(cudnnActivationDescriptor_t a,
                                           cudnnActivationMode_t mode, cudnnNanPropagation_t nan,
                                           double) {
  MAY_FAIL;
  *a = cudnnActivationStruct{mode, nan};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops,
    const cudnnActivationDescriptor_t activation, const cudnnTensorDescriptor_t x, size_t* bytes) {
  MAY_FAIL;
  REQUIRE(is_supported(handle, mode, ops, x, activation));
  *bytes = reserve_bytes(ops, x);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops,
    const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t z,
    const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t channels,
    const cudnnActivationDescriptor_t activation, size_t* bytes) {
  MAY_FAIL;
  REQUIRE(is_supported(handle, mode, ops, x, activation) && is_data(y) && channels->per_channel &&
          is_data(z) == (ops == CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION));
  *bytes = workspace_bytes(false, x);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops,
    const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t y,
    const cudnnTensorDescriptor_t dy, const cudnnTensorDescriptor_t dz,
    const cudnnTensorDescriptor_t dx, const cudnnTensorDescriptor_t channels,
    const cudnnActivationDescriptor_t activation, size_t* bytes) {
  MAY_FAIL;
  REQUIRE(is_supported(handle, mode, ops, x, activation) &&
          is_data(y) == (ops != CUDNN_BATCHNORM_OPS_BN) && is_data(dy) && is_data(dx));
  REQUIRE(channels->per_channel && is_data(dz) == (ops == CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION));
  *bytes = workspace_bytes(true, x);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBatchNormalizationForwardTrainingEx(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const void* alpha,
    const void* beta, const cudnnTensorDescriptor_t xDesc, const void* xData,
    const cudnnTensorDescriptor_t zDesc, const void* zData, const cudnnTensorDescriptor_t yDesc,
    void* yData, const cudnnTensorDescriptor_t channels, const void* bnScale, const void* bnBias,
    double averageFactor, void* runningMean, void* runningVariance, double epsilon, void* saveMean,
    void* saveInvVariance, cudnnActivationDescriptor_t activation, void* workspace,
    size_t workspaceBytes, void* reserve, size_t reserveBytes) {
  MAY_FAIL;
  REQUIRE(is_supported(handle, mode, ops, xDesc, activation) && has_test_stream(handle) &&
          scale_factor(alpha) == 1 && scale_factor(beta) == 0 && is_data(yDesc) &&
          channels->per_channel);
  REQUIRE(workspaceBytes == workspace_bytes(false, xDesc) &&
          reserveBytes == reserve_bytes(ops, xDesc));
  const bool add = ops == CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION;
  REQUIRE(is_data(zDesc) == add && (zData != nullptr) == add);
  std::memset(workspace, 0x77, workspaceBytes);
  std::memset(reserve, 0, reserveBytes);
  const Half *x = static_cast<const Half*>(xData), *z = static_cast<const Half*>(zData);
  const size_t c = xDesc->c, size = element_count(xDesc);
  const double count = static_cast<double>(size / c);
  for (size_t k = 0; k < c; ++k) {
    double mean = 0, variance = 0;
    for (size_t i = k; i < size; i += c) mean += x[i] / count;
    for (size_t i = k; i < size; i += c) variance += (x[i] - mean) * (x[i] - mean) / count;
    const double inverse_std = 1 / std::sqrt(variance + epsilon);
    for (size_t i = k; i < size; i += c) {
      double value = static_cast<const float*>(bnScale)[k] * (x[i] - mean) * inverse_std;
      if (std::getenv("FAKE_CUDNN_ROUNDS")) value = static_cast<Half>(value);
      value += static_cast<const float*>(bnBias)[k] + (add ? static_cast<double>(z[i]) : 0);
      if (activation && value > 0) static_cast<unsigned char*>(reserve)[i / 8] |= 1 << i % 8;
      static_cast<Half*>(yData)[i] = static_cast<Half>(activation && value <= 0 ? 0 : value);
    }
    float* running[] = {static_cast<float*>(runningMean) + k,
                        static_cast<float*>(runningVariance) + k};
    *running[0] = static_cast<float>(*running[0] * (1 - averageFactor) + mean * averageFactor);
    *running[1] = static_cast<float>(*running[1] * (1 - averageFactor) +
                                     variance * count / (count - 1) * averageFactor);
    static_cast<float*>(saveMean)[k] = static_cast<float>(mean);
    static_cast<float*>(saveInvVariance)[k] = static_cast<float>(inverse_std);
  }
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBatchNormalizationBackwardEx(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const void* alphaData,
    const void* betaData, const void* alphaParam, const void* betaParam,
    const cudnnTensorDescriptor_t xDesc, const void* xData, const cudnnTensorDescriptor_t yDesc,
    const void* yData, const cudnnTensorDescriptor_t dyDesc, const void* dyData,
    const cudnnTensorDescriptor_t dzDesc, void* dzData, const cudnnTensorDescriptor_t dxDesc,
    void* dxData, const cudnnTensorDescriptor_t channels, const void* bnScale, const void* bnBias,
    void* dBnScale, void* dBnBias, double epsilon, const void* savedMean,
    const void* savedInvVariance, cudnnActivationDescriptor_t activation, void* workspace,
    size_t workspaceBytes, void* reserve, size_t reserveBytes) {
  MAY_FAIL;
  REQUIRE(is_supported(handle, mode, ops, xDesc, activation) && has_test_stream(handle) &&
          scale_factor(alphaData) == 1 && scale_factor(betaData) == 0 &&
          scale_factor(alphaParam) == 1 && scale_factor(betaParam) == 0);
  REQUIRE(workspaceBytes == workspace_bytes(true, xDesc) &&
          reserveBytes == reserve_bytes(ops, xDesc) && channels->per_channel && epsilon > 0);
  const bool add = ops == CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION;
  REQUIRE(is_data(dzDesc) == add && (dzData != nullptr) == add && is_data(dyDesc) &&
          is_data(dxDesc));
  REQUIRE(!activation || (is_data(yDesc) && yData && bnBias));
  std::memset(workspace, 0x77, workspaceBytes);
  const Half *x = static_cast<const Half*>(xData), *dy = static_cast<const Half*>(dyData);
  const size_t c = xDesc->c, size = element_count(xDesc);
  const double count = static_cast<double>(size / c);
  std::vector<double> gradient(size);
  for (size_t i = 0; i < size; ++i)
    gradient[i] = !activation || static_cast<unsigned char*>(reserve)[i / 8] >> i % 8 & 1
                      ? static_cast<double>(dy[i])
                      : 0;
  for (size_t k = 0; k < c; ++k) {
    const double mean = static_cast<const float*>(savedMean)[k],
                 inverse_std = static_cast<const float*>(savedInvVariance)[k];
    double dbias = 0, dscale = 0;
    for (size_t i = k; i < size; i += c)
      dbias += gradient[i], dscale += gradient[i] * (x[i] - mean) * inverse_std;
    for (size_t i = k; i < size; i += c) {
      static_cast<Half*>(dxData)[i] = static_cast<Half>(
          static_cast<const float*>(bnScale)[k] * inverse_std *
          (gradient[i] - dbias / count - (x[i] - mean) * inverse_std * dscale / count));
      if (add) static_cast<Half*>(dzData)[i] = static_cast<Half>(gradient[i]);
    }
    static_cast<float*>(dBnScale)[k] = static_cast<float>(dscale);
    static_cast<float*>(dBnBias)[k] = static_cast<float>(dbias);
  }
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBatchNormalizationForwardInference(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, const void* alpha, const void* beta,
    const cudnnTensorDescriptor_t xDesc, const void* xData, const cudnnTensorDescriptor_t yDesc,
    void* yData, const cudnnTensorDescriptor_t channels, const void* bnScale, const void* bnBias,
    const void* mean, const void* variance, double epsilon) {
  MAY_FAIL;
  REQUIRE(mode == CUDNN_BATCHNORM_SPATIAL && is_data(xDesc) && is_data(yDesc) &&
          channels->per_channel && has_test_stream(handle) && epsilon > 0);
  REQUIRE(scale_factor(alpha) == 1 && (scale_factor(beta) == 0 || scale_factor(beta) == 1));
  const Half* x = static_cast<const Half*>(xData);
  Half* y = static_cast<Half*>(yData);
  const size_t c = xDesc->c, size = element_count(xDesc);
  for (size_t i = 0; i < size; ++i) {
    const size_t k = i % c;
    const double inverse_std = 1 / std::sqrt(static_cast<const float*>(variance)[k] + epsilon);
    const double previous = scale_factor(beta) == 0 ? 0 : static_cast<double>(y[i]);
    y[i] = static_cast<Half>(static_cast<const float*>(bnScale)[k] *
                                 (x[i] - static_cast<const float*>(mean)[k]) * inverse_std +
                             static_cast<const float*>(bnBias)[k] + previous);
  }
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnActivationForward(cudnnHandle_t handle, cudnnActivationDescriptor_t activation,
                                     const void* alpha, const cudnnTensorDescriptor_t xDesc,
                                     const void* xData, const void* beta,
                                     const cudnnTensorDescriptor_t yDesc, void* yData) {
  MAY_FAIL;
  REQUIRE(has_test_stream(handle) && activation && activation->mode == CUDNN_ACTIVATION_RELU &&
          is_data(xDesc) && is_data(yDesc) && scale_factor(alpha) == 1 && scale_factor(beta) == 0);
  const Half* x = static_cast<const Half*>(xData);
  for (size_t i = 0; i < element_count(xDesc); ++i)
    static_cast<Half*>(yData)[i] = x[i] <= 0 ? static_cast<Half>(0) : x[i];
  return CUDNN_STATUS_SUCCESS;
}

}  // extern "C"
