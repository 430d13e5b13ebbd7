// SPDX-License-Identifier: Apache-2.0
// A double of what mxresnet/model/cudnn_bn/csrc/batch_norm_cudnn.cc uses of cuDNN and CUDA's runtime, computing on the host as cuDNN's
// documentation says, so that what is handed over can be tested without a GPU. Strict: a call that is not exactly as
// documented for these modes is a CUDNN_STATUS_BAD_PARAM. The function that CUDNN_DOUBLE_FAILS names fails.
#include <cudnn.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

struct cudnnTensorStruct { cudnnTensorFormat_t format; cudnnDataType_t type; int n, c, h, w; bool of_channels; };
struct cudnnActivationStruct { cudnnActivationMode_t mode; cudnnNanPropagation_t nan; };
struct cudnnContext { cudaStream_t stream; };

namespace {

typedef _Float16 Half;

bool fails(const char *name) { return std::getenv("CUDNN_DOUBLE_FAILS") && !std::strcmp(std::getenv("CUDNN_DOUBLE_FAILS"), name); }

#define MAY_FAIL \
  if (fails(__func__)) return CUDNN_STATUS_EXECUTION_FAILED
#define REQUIRE(condition) \
  if (!(condition)) return CUDNN_STATUS_BAD_PARAM

size_t elements(cudnnTensorDescriptor_t t) { return static_cast<size_t>(t->n) * t->h * t->w * t->c; }
size_t reserve_bytes(cudnnBatchNormOps_t ops, cudnnTensorDescriptor_t x) { return ops == CUDNN_BATCHNORM_OPS_BN ? 0 : (elements(x) + 7) / 8 + 24; }
size_t workspace_bytes(bool backward, cudnnTensorDescriptor_t x) { return 8 * x->c + (backward ? 72 : 40); }

bool is_data(cudnnTensorDescriptor_t t) { return t && !t->of_channels && t->format == CUDNN_TENSOR_NHWC && t->type == CUDNN_DATA_HALF && t->c % 4 == 0; }

bool fits(cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, cudnnTensorDescriptor_t x, cudnnActivationDescriptor_t activation) {
  const bool relu = activation && activation->mode == CUDNN_ACTIVATION_RELU;
  return handle && mode == CUDNN_BATCHNORM_SPATIAL_PERSISTENT && is_data(x) && relu == (ops != CUDNN_BATCHNORM_OPS_BN);
}

bool queued(cudnnHandle_t handle) { return handle->stream == reinterpret_cast<cudaStream_t>(5); }  // the tests' stream

double factor_of(const void *pointer) { return *static_cast<const float *>(pointer); }

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int *device) { *device = 0; return fails(__func__) ? cudaErrorNoDevice : cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return fails(__func__) || device != 0 ? cudaErrorInvalidDevice : cudaSuccess; }
const char *cudaGetErrorString(cudaError_t) { return "a CUDA error"; }
const char *cudnnGetErrorString(cudnnStatus_t status) { return status == CUDNN_STATUS_BAD_PARAM ? "bad parameter" : "a cuDNN error"; }

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) { MAY_FAIL; *handle = new cudnnContext(); return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) { MAY_FAIL; handle->stream = stream; return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t *t) { MAY_FAIL; *t = new cudnnTensorStruct(); return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnDestroyTensorDescriptor(cudnnTensorDescriptor_t t) { delete t; return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnCreateActivationDescriptor(cudnnActivationDescriptor_t *a) { MAY_FAIL; *a = new cudnnActivationStruct(); return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnDestroyActivationDescriptor(cudnnActivationDescriptor_t a) { delete a; return CUDNN_STATUS_SUCCESS; }

cudnnStatus_t cudnnSetTensor4dDescriptor(cudnnTensorDescriptor_t t, cudnnTensorFormat_t format, cudnnDataType_t type, int n, int c, int h, int w) {
  MAY_FAIL;
  *t = cudnnTensorStruct{format, type, n, c, h, w, false};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnDeriveBNTensorDescriptor(cudnnTensorDescriptor_t t, const cudnnTensorDescriptor_t x, cudnnBatchNormMode_t) {
  MAY_FAIL;
  *t = cudnnTensorStruct{x->format, CUDNN_DATA_FLOAT, 1, x->c, 1, 1, true};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetActivationDescriptor(cudnnActivationDescriptor_t a, cudnnActivationMode_t mode, cudnnNanPropagation_t nan, double) {
  MAY_FAIL;
  *a = cudnnActivationStruct{mode, nan};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const cudnnActivationDescriptor_t activation,
    const cudnnTensorDescriptor_t x, size_t *bytes) {
  MAY_FAIL;
  REQUIRE(fits(handle, mode, ops, x, activation));
  *bytes = reserve_bytes(ops, x);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t z,
    const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t channels, const cudnnActivationDescriptor_t activation, size_t *bytes) {
  MAY_FAIL;
  REQUIRE(fits(handle, mode, ops, x, activation) && is_data(y) && channels->of_channels && is_data(z) == (ops == CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION));
  *bytes = workspace_bytes(false, x);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t y,
    const cudnnTensorDescriptor_t dy, const cudnnTensorDescriptor_t dz, const cudnnTensorDescriptor_t dx, const cudnnTensorDescriptor_t channels,
    const cudnnActivationDescriptor_t activation, size_t *bytes) {
  MAY_FAIL;
  REQUIRE(fits(handle, mode, ops, x, activation) && is_data(y) == (ops != CUDNN_BATCHNORM_OPS_BN) && is_data(dy) && is_data(dx));
  REQUIRE(channels->of_channels && is_data(dz) == (ops == CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION));
  *bytes = workspace_bytes(true, x);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBatchNormalizationForwardTrainingEx(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const void *alpha, const void *beta, const cudnnTensorDescriptor_t xDesc,
    const void *xData, const cudnnTensorDescriptor_t zDesc, const void *zData, const cudnnTensorDescriptor_t yDesc, void *yData,
    const cudnnTensorDescriptor_t channels, const void *bnScale, const void *bnBias, double averageFactor, void *runningMean, void *runningVariance,
    double epsilon, void *saveMean, void *saveInvVariance, cudnnActivationDescriptor_t activation, void *workspace, size_t workspaceBytes,
    void *reserve, size_t reserveBytes) {
  MAY_FAIL;
  REQUIRE(fits(handle, mode, ops, xDesc, activation) && queued(handle) && factor_of(alpha) == 1 && factor_of(beta) == 0 && is_data(yDesc) && channels->of_channels);
  REQUIRE(workspaceBytes == workspace_bytes(false, xDesc) && reserveBytes == reserve_bytes(ops, xDesc));
  const bool add = ops == CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION;
  REQUIRE(is_data(zDesc) == add && (zData != nullptr) == add);
  std::memset(workspace, 0x77, workspaceBytes);
  std::memset(reserve, 0, reserveBytes);
  const Half *x = static_cast<const Half *>(xData), *z = static_cast<const Half *>(zData);
  const size_t c = xDesc->c, size = elements(xDesc);
  const double count = static_cast<double>(size / c);
  for (size_t k = 0; k < c; ++k) {
    double mean = 0, variance = 0;
    for (size_t i = k; i < size; i += c) mean += x[i] / count;
    for (size_t i = k; i < size; i += c) variance += (x[i] - mean) * (x[i] - mean) / count;
    const double inverse = 1 / std::sqrt(variance + epsilon);
    for (size_t i = k; i < size; i += c) {
      double value = static_cast<const float *>(bnScale)[k] * (x[i] - mean) * inverse + static_cast<const float *>(bnBias)[k] + (add ? static_cast<double>(z[i]) : 0);
      if (activation && value > 0) static_cast<unsigned char *>(reserve)[i / 8] |= 1 << i % 8;
      static_cast<Half *>(yData)[i] = static_cast<Half>(activation && value <= 0 ? 0 : value);
    }
    float *running[] = {static_cast<float *>(runningMean) + k, static_cast<float *>(runningVariance) + k};
    *running[0] = static_cast<float>(*running[0] * (1 - averageFactor) + mean * averageFactor);
    *running[1] = static_cast<float>(*running[1] * (1 - averageFactor) + variance * count / (count - 1) * averageFactor);
    static_cast<float *>(saveMean)[k] = static_cast<float>(mean);
    static_cast<float *>(saveInvVariance)[k] = static_cast<float>(inverse);
  }
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBatchNormalizationBackwardEx(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const void *alphaData, const void *betaData, const void *alphaParam,
    const void *betaParam, const cudnnTensorDescriptor_t xDesc, const void *xData, const cudnnTensorDescriptor_t yDesc, const void *yData,
    const cudnnTensorDescriptor_t dyDesc, const void *dyData, const cudnnTensorDescriptor_t dzDesc, void *dzData, const cudnnTensorDescriptor_t dxDesc,
    void *dxData, const cudnnTensorDescriptor_t channels, const void *bnScale, const void *bnBias, void *dBnScale, void *dBnBias, double epsilon,
    const void *savedMean, const void *savedInvVariance, cudnnActivationDescriptor_t activation, void *workspace, size_t workspaceBytes,
    void *reserve, size_t reserveBytes) {
  MAY_FAIL;
  REQUIRE(fits(handle, mode, ops, xDesc, activation) && queued(handle) && factor_of(alphaData) == 1 && factor_of(betaData) == 0 && factor_of(alphaParam) == 1 && factor_of(betaParam) == 0);
  REQUIRE(workspaceBytes == workspace_bytes(true, xDesc) && reserveBytes == reserve_bytes(ops, xDesc) && channels->of_channels && epsilon > 0);
  const bool add = ops == CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION;
  REQUIRE(is_data(dzDesc) == add && (dzData != nullptr) == add && is_data(dyDesc) && is_data(dxDesc));
  REQUIRE(!activation || (is_data(yDesc) && yData && bnBias));
  std::memset(workspace, 0x77, workspaceBytes);
  const Half *x = static_cast<const Half *>(xData), *dy = static_cast<const Half *>(dyData);
  const size_t c = xDesc->c, size = elements(xDesc);
  const double count = static_cast<double>(size / c);
  std::vector<double> through(size);
  for (size_t i = 0; i < size; ++i) through[i] = !activation || static_cast<unsigned char *>(reserve)[i / 8] >> i % 8 & 1 ? static_cast<double>(dy[i]) : 0;
  for (size_t k = 0; k < c; ++k) {
    const double mean = static_cast<const float *>(savedMean)[k], inverse = static_cast<const float *>(savedInvVariance)[k];
    double sum = 0, product = 0;
    for (size_t i = k; i < size; i += c) sum += through[i], product += through[i] * (x[i] - mean) * inverse;
    for (size_t i = k; i < size; i += c) {
      static_cast<Half *>(dxData)[i] = static_cast<Half>(static_cast<const float *>(bnScale)[k] * inverse * (through[i] - sum / count - (x[i] - mean) * inverse * product / count));
      if (add) static_cast<Half *>(dzData)[i] = static_cast<Half>(through[i]);
    }
    static_cast<float *>(dBnScale)[k] = static_cast<float>(product);
    static_cast<float *>(dBnBias)[k] = static_cast<float>(sum);
  }
  return CUDNN_STATUS_SUCCESS;
}

}  // extern "C"
