// SPDX-License-Identifier: Apache-2.0
// Implementation of batch_norm.h with the fused kernels of cuDNN 8: float16 NHWC data, float32
// statistics. It has host code only. cuDNN 9 still has the functions and declares them deprecated.
//
// Source: cuDNN's documentation of cudnnBatchNormalizationForwardTrainingEx and
// cudnnBatchNormalizationBackwardEx. The fused modes require float16 NHWC data,
// CUDNN_BATCHNORM_SPATIAL_PERSISTENT and a number of channels that is a multiple of four.
#include <cudnn.h>

#include <cstdio>
#include <map>
#include <memory>

#include "batch_norm.h"

namespace {

// The device that mxresnet_batch_norm_reserve queries, before there is a stream. Only the thread
// that builds networks sets it.
constexpr int kNoDevice = -1;
int reserve_device = kNoDevice;

int fail(const MxresnetBatchNorm& call, char* message, const char* what, const char* why) {
  std::snprintf(message, MXRESNET_MESSAGE_BYTES, "%s: %s (data of %lld x %lld x %lld x %lld)", what,
                why, static_cast<long long>(call.n), static_cast<long long>(call.h),
                static_cast<long long>(call.w), static_cast<long long>(call.c));
  return 1;
}

cudnnBatchNormOps_t cudnn_operation(const MxresnetBatchNorm& call) {
  if (call.operation == MXRESNET_BN) return CUDNN_BATCHNORM_OPS_BN;
  if (call.operation == MXRESNET_BN_RELU) return CUDNN_BATCHNORM_OPS_BN_ACTIVATION;
  return CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION;
}

constexpr cudnnBatchNormMode_t kMode = CUDNN_BATCHNORM_SPATIAL_PERSISTENT;

using Tensor = std::unique_ptr<cudnnTensorStruct, decltype(&cudnnDestroyTensorDescriptor)>;
using Activation =
    std::unique_ptr<cudnnActivationStruct, decltype(&cudnnDestroyActivationDescriptor)>;

// The handle and descriptors of cuDNN for one call. If failed() is true there is a message, and the
// context must not be used.
class Context {
 public:
  Context(const MxresnetBatchNorm& call, char* message) : call_(call), message_(message) {
    failed_ = mxresnet_batch_norm_check(&call, message) != 0;
    if (!failed_ && create_descriptors() && set_descriptors()) set_handle();
  }

  bool failed() const { return failed_; }
  cudnnHandle_t handle() const { return handle_; }

  // Descriptors. Those of tensors that the operation does not have are null, as cuDNN requires.
  cudnnTensorDescriptor_t data() const { return data_.get(); }
  cudnnTensorDescriptor_t channels() const { return channels_.get(); }
  cudnnTensorDescriptor_t addend() const {
    return call_.operation == MXRESNET_BN_ADD_RELU ? data_.get() : nullptr;
  }
  cudnnActivationDescriptor_t activation() const {
    return call_.operation == MXRESNET_BN ? nullptr : activation_.get();
  }
  cudnnTensorDescriptor_t backward_y() const {
    return call_.operation == MXRESNET_BN ? nullptr : data_.get();
  }

  // Each of these returns whether all has been well so far; if not, there is a message.
  bool check(const char* function, cudnnStatus_t status) {
    if (status != CUDNN_STATUS_SUCCESS)
      failed_ = fail(call_, message_, function, cudnnGetErrorString(status));
    return !failed_;
  }

  bool check(const char* function, cudaError_t status) {
    if (status != cudaSuccess)
      failed_ = fail(call_, message_, function, cudaGetErrorString(status));
    return !failed_;
  }

  bool check_bytes(const char* what, uint64_t needed, uint64_t given) {
    char why[128];
    std::snprintf(why, sizeof(why), "%llu bytes are needed and %llu were given",
                  static_cast<unsigned long long>(needed), static_cast<unsigned long long>(given));
    if (given < needed) failed_ = fail(call_, message_, what, why);
    return !failed_;
  }

 private:
  bool create_descriptors() {
    cudnnTensorDescriptor_t tensor = nullptr;
    cudnnActivationDescriptor_t activation = nullptr;
    if (!check("cudnnCreateTensorDescriptor", cudnnCreateTensorDescriptor(&tensor))) return false;
    data_.reset(tensor);
    if (!check("cudnnCreateTensorDescriptor", cudnnCreateTensorDescriptor(&tensor))) return false;
    channels_.reset(tensor);
    if (!check("cudnnCreateActivationDescriptor", cudnnCreateActivationDescriptor(&activation)))
      return false;
    activation_.reset(activation);
    return true;
  }

  bool set_descriptors() {
    cudnnStatus_t status = cudnnSetTensor4dDescriptor(
        data_.get(), CUDNN_TENSOR_NHWC, CUDNN_DATA_HALF, static_cast<int>(call_.n),
        static_cast<int>(call_.c), static_cast<int>(call_.h), static_cast<int>(call_.w));
    if (!check("cudnnSetTensor4dDescriptor", status)) return false;
    status = cudnnDeriveBNTensorDescriptor(channels_.get(), data_.get(), kMode);
    if (!check("cudnnDeriveBNTensorDescriptor", status)) return false;
    status = cudnnSetActivationDescriptor(activation_.get(), CUDNN_ACTIVATION_RELU,
                                          CUDNN_PROPAGATE_NAN, 0);
    return check("cudnnSetActivationDescriptor", status);
  }

  // cuDNN requires one handle per thread and device. Handles are never destroyed: when a thread
  // ends, the CUDA driver may have been unloaded.
  bool set_handle() {
    static thread_local std::map<int, cudnnHandle_t> handles;
    int device = 0;
    if (!check("cudaGetDevice", cudaGetDevice(&device))) return false;
    if (!handles.count(device)) {
      cudnnHandle_t created;
      if (!check("cudnnCreate", cudnnCreate(&created))) return false;
      handles[device] = created;
    }
    handle_ = handles[device];
    const cudnnStatus_t status = cudnnSetStream(handle_, static_cast<cudaStream_t>(call_.stream));
    return check("cudnnSetStream", status);
  }

  const MxresnetBatchNorm& call_;
  char* message_;
  bool failed_ = false;
  cudnnHandle_t handle_ = nullptr;
  Tensor data_{nullptr, cudnnDestroyTensorDescriptor};
  Tensor channels_{nullptr, cudnnDestroyTensorDescriptor};
  Activation activation_{nullptr, cudnnDestroyActivationDescriptor};
};

// Returns whether cuDNN has given the sizes; if not, there is a message.
bool query_sizes(Context& context, const MxresnetBatchNorm& call, MxresnetSizes* sizes) {
  size_t reserve = 0, forward = 0, backward = 0;
  const cudnnBatchNormOps_t operation = cudnn_operation(call);
  cudnnStatus_t status = cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
      context.handle(), kMode, operation, context.activation(), context.data(), &reserve);
  if (!context.check("cudnnGetBatchNormalizationTrainingExReserveSpaceSize", status)) return false;
  status = cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
      context.handle(), kMode, operation, context.data(), context.addend(), context.data(),
      context.channels(), context.activation(), &forward);
  if (!context.check("cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize", status))
    return false;
  status = cudnnGetBatchNormalizationBackwardExWorkspaceSize(
      context.handle(), kMode, operation, context.data(), context.backward_y(), context.data(),
      context.addend(), context.data(), context.channels(), context.activation(), &backward);
  if (!context.check("cudnnGetBatchNormalizationBackwardExWorkspaceSize", status)) return false;
  *sizes = MxresnetSizes{reserve, forward, backward};
  return true;
}

// Returns whether the call has a large enough reserve and workspace; if not, there is a message.
bool check_memory(Context& context, const MxresnetBatchNorm& call,
                  uint64_t MxresnetSizes::* workspace, MxresnetSizes* sizes) {
  return !context.failed() && query_sizes(context, call, sizes) &&
         context.check_bytes("reserve of batch norm", sizes->reserve, call.reserve_bytes) &&
         context.check_bytes("workspace of batch norm", sizes->*workspace, call.workspace_bytes);
}

}  // namespace

extern "C" {

int mxresnet_batch_norm_check(const MxresnetBatchNorm* call, char* message) {
  const int64_t limit = INT32_MAX;  // the type of cuDNN's sizes is int
  if (call->n < 1 || call->h < 1 || call->w < 1 || call->c < 1)
    return fail(*call, message, "data", "data has no elements");
  if (call->n * call->h * call->w < 2)
    return fail(*call, message, "data", "a channel has one value only, which has no variance");
  if (!call->channel_last)
    return fail(*call, message, "layout NCHW", "cuDNN's fused batch norm is for NHWC only");
  if (call->c % 4)
    return fail(*call, message, "data", "cuDNN's fused kernels need channels in multiples of 4");
  if (call->n * call->h * call->w * call->c > limit)
    return fail(*call, message, "data", "more than 2^31 - 1 elements");
  return 0;
}

int mxresnet_batch_norm_sizes(const MxresnetBatchNorm* call, MxresnetSizes* sizes, char* message) {
  Context context(*call, message);
  return context.failed() || !query_sizes(context, *call, sizes);
}

void mxresnet_use_device(int device) { reserve_device = device; }

int mxresnet_batch_norm_reserve(const MxresnetBatchNorm* call, uint64_t* bytes, char* message) {
  if (mxresnet_batch_norm_check(call, message)) return 1;
  // An estimate, for a process without a device: one bit per element, and padding. The forward pass
  // checks it.
  const uint64_t elements = static_cast<uint64_t>(call->n * call->h * call->w * call->c);
  *bytes = call->operation == MXRESNET_BN ? 0 : elements / 8 + 65536;
  if (reserve_device == kNoDevice) return 0;
  int previous_device = 0;
  MxresnetSizes sizes = {0, 0, 0};
  cudaError_t status = cudaGetDevice(&previous_device);
  if (status == cudaSuccess) status = cudaSetDevice(reserve_device);
  if (status != cudaSuccess)
    return fail(*call, message, "cudaSetDevice", cudaGetErrorString(status));
  const int failed = mxresnet_batch_norm_sizes(call, &sizes, message);
  cudaSetDevice(previous_device);
  *bytes = sizes.reserve;
  return failed;
}

int mxresnet_batch_norm_forward(const MxresnetBatchNorm* call, char* message) {
  Context context(*call, message);
  MxresnetSizes sizes = {0, 0, 0};
  if (!check_memory(context, *call, &MxresnetSizes::forward_workspace, &sizes)) return 1;
  const float one = 1, zero = 0;
  const cudnnStatus_t status = cudnnBatchNormalizationForwardTrainingEx(
      context.handle(), kMode, cudnn_operation(*call), &one, &zero, context.data(), call->x,
      context.addend(), context.addend() ? call->z : nullptr, context.data(), call->y,
      context.channels(), call->gamma, call->beta, 1 - call->momentum, call->running_mean,
      call->running_variance, call->epsilon, call->saved_mean, call->saved_inverse_std,
      context.activation(), call->workspace, sizes.forward_workspace, call->reserve, sizes.reserve);
  return !context.check("cudnnBatchNormalizationForwardTrainingEx", status);
}

int mxresnet_batch_norm_backward(const MxresnetBatchNorm* call, char* message) {
  Context context(*call, message);
  MxresnetSizes sizes = {0, 0, 0};
  if (!check_memory(context, *call, &MxresnetSizes::backward_workspace, &sizes)) return 1;
  const float one = 1, zero = 0;
  const cudnnStatus_t status = cudnnBatchNormalizationBackwardEx(
      context.handle(), kMode, cudnn_operation(*call), &one, &zero, &one, &zero, context.data(),
      call->x, context.backward_y(), context.backward_y() ? call->y : nullptr, context.data(),
      call->dy, context.addend(), context.addend() ? call->dz : nullptr, context.data(), call->dx,
      context.channels(), call->gamma, call->beta, call->dgamma, call->dbeta, call->epsilon,
      call->saved_mean, call->saved_inverse_std, context.activation(), call->workspace,
      sizes.backward_workspace, call->reserve, sizes.reserve);
  return !context.check("cudnnBatchNormalizationBackwardEx", status);
}

}  // extern "C"
