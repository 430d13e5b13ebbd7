// SPDX-License-Identifier: Apache-2.0
// batch_norm.h by cuDNN 8's fused kernels: float16, channel last, float32 statistics. Host code only. (cuDNN 9 has the functions
// too; it marks them as to be removed.)
//
// Source: cuDNN's documentation of cudnnBatchNormalizationForwardTrainingEx and cudnnBatchNormalizationBackwardEx. The fused
// modes exist for channel-last float16, CUDNN_BATCHNORM_SPATIAL_PERSISTENT and channels that are a multiple of four only.
#include <cudnn.h>

#include <cstdio>
#include <map>
#include <memory>

#include "batch_norm.h"

namespace {

// The device whose cuDNN says how large a reserve is, before a stream is there. Only the thread that builds networks sets it.
int chosen_device = -1;

int fail(const MxresnetBatchNorm &call, char *message, const char *what, const char *why) {
  std::snprintf(
      message, MXRESNET_MESSAGE_BYTES, "%s: %s (data of %lld x %lld x %lld x %lld)", what, why, static_cast<long long>(call.n),
      static_cast<long long>(call.h), static_cast<long long>(call.w), static_cast<long long>(call.c));
  return 1;
}

cudnnBatchNormOps_t mode_of(const MxresnetBatchNorm &call) {
  return call.operation == MXRESNET_BN        ? CUDNN_BATCHNORM_OPS_BN
         : call.operation == MXRESNET_BN_RELU ? CUDNN_BATCHNORM_OPS_BN_ACTIVATION
                                              : CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION;
}

constexpr cudnnBatchNormMode_t kMode = CUDNN_BATCHNORM_SPATIAL_PERSISTENT;

using Tensor = std::unique_ptr<cudnnTensorStruct, decltype(&cudnnDestroyTensorDescriptor)>;
using Activation = std::unique_ptr<cudnnActivationStruct, decltype(&cudnnDestroyActivationDescriptor)>;

// What cuDNN wants described, and its handle, for one call. Not usable when wrong() is true, which leaves a message.
class Context {
 public:
  Context(const MxresnetBatchNorm &call, char *message) : call_(call), message_(message) {
    cudnnTensorDescriptor_t tensor = nullptr;
    cudnnActivationDescriptor_t activation = nullptr;
    if (mxresnet_batch_norm_check(&call, message)) {
      wrong_ = true;
      return;
    }
    if (!check("cudnnCreateTensorDescriptor", cudnnCreateTensorDescriptor(&tensor))) return;
    data_.reset(tensor);
    if (!check("cudnnCreateTensorDescriptor", cudnnCreateTensorDescriptor(&tensor))) return;
    channels_.reset(tensor);
    if (!check("cudnnCreateActivationDescriptor", cudnnCreateActivationDescriptor(&activation))) return;
    activation_.reset(activation);
    check("cudnnSetTensor4dDescriptor", cudnnSetTensor4dDescriptor(
        data(), CUDNN_TENSOR_NHWC, CUDNN_DATA_HALF, static_cast<int>(call.n), static_cast<int>(call.c),
        static_cast<int>(call.h), static_cast<int>(call.w))) &&
        check("cudnnDeriveBNTensorDescriptor", cudnnDeriveBNTensorDescriptor(channels(), data(), kMode)) &&
        check("cudnnSetActivationDescriptor", cudnnSetActivationDescriptor(
            relu(), CUDNN_ACTIVATION_RELU, CUDNN_PROPAGATE_NAN, 0)) &&
        find_handle();
  }

  bool wrong() const { return wrong_; }
  cudnnHandle_t handle() const { return handle_; }
  cudnnTensorDescriptor_t data() const { return data_.get(); }
  cudnnTensorDescriptor_t addend() const { return call_.operation == MXRESNET_BN_ADD_RELU ? data_.get() : nullptr; }
  cudnnTensorDescriptor_t channels() const { return channels_.get(); }
  cudnnActivationDescriptor_t relu() const { return activation_.get(); }
  // Plain batch norm knows no activation and needs no y.
  cudnnActivationDescriptor_t relu_if_any() const { return call_.operation == MXRESNET_BN ? nullptr : relu(); }
  cudnnTensorDescriptor_t output_if_relu() const { return call_.operation == MXRESNET_BN ? nullptr : data(); }

  bool check(const char *what, cudnnStatus_t status) {
    if (status != CUDNN_STATUS_SUCCESS) wrong_ = fail(call_, message_, what, cudnnGetErrorString(status));
    return !wrong_;
  }

  bool check(const char *what, cudaError_t status) {
    if (status != cudaSuccess) wrong_ = fail(call_, message_, what, cudaGetErrorString(status));
    return !wrong_;
  }

  bool enough(const char *what, uint64_t needed, uint64_t given) {
    char why[128];
    std::snprintf(why, sizeof(why), "%llu bytes are needed and %llu were given", static_cast<unsigned long long>(needed),
                  static_cast<unsigned long long>(given));
    if (given < needed) wrong_ = fail(call_, message_, what, why);
    return !wrong_;
  }

 private:
  // One handle for each thread and device, as cuDNN demands. Never destroyed: threads end when the CUDA driver may be gone.
  bool find_handle() {
    static thread_local std::map<int, cudnnHandle_t> handles;
    int device = 0;
    if (!check("cudaGetDevice", cudaGetDevice(&device))) return false;
    if (!handles.count(device)) {
      cudnnHandle_t created;
      if (!check("cudnnCreate", cudnnCreate(&created))) return false;
      handles[device] = created;
    }
    handle_ = handles[device];
    return check("cudnnSetStream", cudnnSetStream(handle_, static_cast<cudaStream_t>(call_.stream)));
  }

  const MxresnetBatchNorm &call_;
  char *message_;
  bool wrong_ = false;
  cudnnHandle_t handle_ = nullptr;
  Tensor data_{nullptr, cudnnDestroyTensorDescriptor}, channels_{nullptr, cudnnDestroyTensorDescriptor};
  Activation activation_{nullptr, cudnnDestroyActivationDescriptor};
};

bool ask_sizes(Context &context, const MxresnetBatchNorm &call, MxresnetSizes *sizes) {
  size_t reserve = 0, forward = 0, backward = 0;
  const cudnnBatchNormOps_t mode = mode_of(call);
  const bool known =
      context.check("cudnnGetBatchNormalizationTrainingExReserveSpaceSize", cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
          context.handle(), kMode, mode, context.relu_if_any(), context.data(), &reserve)) &&
      context.check("cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize", cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
          context.handle(), kMode, mode, context.data(), context.addend(), context.data(), context.channels(),
          context.relu_if_any(), &forward)) &&
      context.check("cudnnGetBatchNormalizationBackwardExWorkspaceSize", cudnnGetBatchNormalizationBackwardExWorkspaceSize(
          context.handle(), kMode, mode, context.data(), context.output_if_relu(), context.data(), context.addend(),
          context.data(), context.channels(), context.relu_if_any(), &backward));
  *sizes = MxresnetSizes{reserve, forward, backward};
  return known;
}

// Asks what a call needs and compares that with what it brings. False, with a message, also when the context is wrong.
bool enough_memory(Context &context, const MxresnetBatchNorm &call, uint64_t MxresnetSizes::*workspace, MxresnetSizes *sizes) {
  return !context.wrong() && ask_sizes(context, call, sizes) &&
         context.enough("reserve of batch norm", sizes->reserve, call.reserve_bytes) &&
         context.enough("workspace of batch norm", sizes->*workspace, call.workspace_bytes);
}

}  // namespace

extern "C" {

int mxresnet_batch_norm_check(const MxresnetBatchNorm *call, char *message) {
  const int64_t limit = INT32_MAX;  // cuDNN's sizes are int
  if (call->n < 1 || call->h < 1 || call->w < 1 || call->c < 1) return fail(*call, message, "data", "data has no elements");
  if (call->n * call->h * call->w < 2) return fail(*call, message, "data", "a channel has one value only, which has no variance");
  if (!call->channel_last) return fail(*call, message, "layout NCHW", "cuDNN's fused batch norm is for NHWC only");
  if (call->c % 4) return fail(*call, message, "data", "cuDNN's fused kernels want channels in multiples of 4");
  if (call->n * call->h * call->w * call->c > limit) return fail(*call, message, "data", "more than 2^31 - 1 elements");
  return 0;
}

int mxresnet_batch_norm_sizes(const MxresnetBatchNorm *call, MxresnetSizes *sizes, char *message) {
  Context context(*call, message);
  return context.wrong() || !ask_sizes(context, *call, sizes);
}

void mxresnet_use_device(int device) { chosen_device = device; }

int mxresnet_batch_norm_reserve(const MxresnetBatchNorm *call, uint64_t *bytes, char *message) {
  if (mxresnet_batch_norm_check(call, message)) return 1;
  // A bit for each element and something for padding: a guess, for where there is no device. forward checks it.
  *bytes = call->operation == MXRESNET_BN ? 0 : static_cast<uint64_t>(call->n * call->h * call->w * call->c) / 8 + 65536;
  if (chosen_device < 0) return 0;
  int before = 0;
  MxresnetSizes sizes = {0, 0, 0};
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(chosen_device);
  if (status != cudaSuccess) return fail(*call, message, "cudaSetDevice", cudaGetErrorString(status));
  const int wrong = mxresnet_batch_norm_sizes(call, &sizes, message);
  cudaSetDevice(before);
  *bytes = sizes.reserve;
  return wrong;
}

int mxresnet_batch_norm_forward(const MxresnetBatchNorm *call, char *message) {
  Context context(*call, message);
  MxresnetSizes sizes = {0, 0, 0};
  const float one = 1, zero = 0;
  const bool done =
      enough_memory(context, *call, &MxresnetSizes::forward_workspace, &sizes) &&
      context.check("cudnnBatchNormalizationForwardTrainingEx", cudnnBatchNormalizationForwardTrainingEx(
          context.handle(), kMode, mode_of(*call), &one, &zero, context.data(), call->x, context.addend(),
          context.addend() ? call->z : nullptr, context.data(), call->y, context.channels(), call->gamma, call->beta,
          1 - call->momentum, call->running_mean, call->running_variance, call->epsilon, call->saved_mean,
          call->saved_inverse, context.relu_if_any(), call->workspace, sizes.forward_workspace, call->reserve, sizes.reserve));
  return !done;
}

int mxresnet_batch_norm_backward(const MxresnetBatchNorm *call, char *message) {
  Context context(*call, message);
  MxresnetSizes sizes = {0, 0, 0};
  const float one = 1, zero = 0;
  const bool done =
      enough_memory(context, *call, &MxresnetSizes::backward_workspace, &sizes) &&
      context.check("cudnnBatchNormalizationBackwardEx", cudnnBatchNormalizationBackwardEx(
          context.handle(), kMode, mode_of(*call), &one, &zero, &one, &zero, context.data(), call->x,
          context.output_if_relu(), context.output_if_relu() ? call->y : nullptr, context.data(), call->dy,
          context.addend(), context.addend() ? call->dz : nullptr, context.data(), call->dx, context.channels(), call->gamma,
          call->beta, call->dgamma, call->dbeta, call->epsilon, call->saved_mean, call->saved_inverse,
          context.relu_if_any(), call->workspace, sizes.backward_workspace, call->reserve, sizes.reserve));
  return !done;
}

}  // extern "C"
