// SPDX-License-Identifier: Apache-2.0
// batch_norm.h as MXNet operators, through MXNet's interface for external libraries (mxnet/lib_api.h). Built twice: with
// batch_norm_cpu.cc, and with batch_norm_cudnn.cc and MXRESNET_GPU defined.
//
//   mxresnet_batch_norm(data, gamma, beta, moving_mean, moving_var; eps, momentum, layout)
//   mxresnet_batch_norm_relu(the same)
//   mxresnet_batch_norm_add_relu(data, gamma, beta, moving_mean, moving_var, addend; eps, momentum, layout)
//
// The addend comes last, so that a network lists its parameters in the order in which one of stock operators does.
// Outputs: the result, and for backward the saved mean, the saved inverse deviation and the reserve (uint8). moving_mean and
// moving_var change in forward, training or not: the interface does not say which it is, so evaluation needs other operators.
// Nor does it say whether to write or to add: gradients are written (grad_req "write"; mxresnet/extension.py looks at the
// variables with which MXNet would want them added).
#include <mxnet/lib_api.h>

#include <cstdlib>

#include "batch_norm.h"

namespace {

using mxnet::ext::MX_FAIL;
using mxnet::ext::MX_SUCCESS;
using mxnet::ext::MXReturnValue;
using mxnet::ext::MXTensor;
using mxnet::ext::OpResource;
using Attributes = std::unordered_map<std::string, std::string>;
using Shape = std::vector<unsigned int>;

#ifdef MXRESNET_GPU
constexpr char kDevice[] = "gpu", kTypeName[] = "float16";
constexpr int kType = mxnet::ext::kFloat16;
#else
constexpr char kDevice[] = "cpu", kTypeName[] = "float32";
constexpr int kType = mxnet::ext::kFloat32;
#endif
constexpr int kOutputs = 4;

// extension.py finds this in the file and compares: MXNet, its interface, the sources that the library was built from.
extern "C" __attribute__((used, visibility("default"))) const char mxresnet_build[] = MXRESNET_BUILD;

const char *name_of(int operation) {
  return operation == MXRESNET_BN ? "mxresnet_batch_norm" : operation == MXRESNET_BN_RELU ? "mxresnet_batch_norm_relu" : "mxresnet_batch_norm_add_relu";
}

MXReturnValue refuse(int operation, const std::string &why) {
  MX_ERROR_MSG << name_of(operation) << ": " << why;
  return MX_FAIL;
}

enum Input { kData, kGamma, kBeta, kMovingMean, kMovingVar, kAddend };

constexpr bool adds(int operation) { return operation == MXRESNET_BN_ADD_RELU; }
constexpr int inputs_of(int operation) { return adds(operation) ? kAddend + 1 : kAddend; }

std::string text_of(const Shape &shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

bool number(const std::string &text, double *value) {
  char *end = nullptr;
  *value = std::strtod(text.c_str(), &end);
  return !text.empty() && *end == 0;
}

// The attributes; unknown ones are mistakes, but for MXNet's own, which begin with two underscores.
bool read_attributes(int operation, const Attributes &attributes, MxresnetBatchNorm *call) {
  *call = MxresnetBatchNorm();
  call->operation = operation;
  call->channel_last = 1;
  call->epsilon = 1e-5;
  call->momentum = 0.9;
  for (const auto &item : attributes) {
    bool good = item.first.compare(0, 2, "__") == 0;
    if (item.first == "eps") good = number(item.second, &call->epsilon) && call->epsilon > 0;
    if (item.first == "momentum") good = number(item.second, &call->momentum) && call->momentum >= 0 && call->momentum <= 1;
    if (item.first == "layout") {
      call->channel_last = item.second == "NHWC";
      good = call->channel_last || item.second == "NCHW";
    }
    if (!good) {
      refuse(operation, "attribute " + item.first + "=" + item.second + ": eps above 0, momentum from 0 to 1 and layout NHWC or NCHW are known");
      return false;
    }
  }
  return true;
}

template <typename Dimension>
void read_shape(const std::vector<Dimension> &shape, MxresnetBatchNorm *call) {
  const int channel = call->channel_last ? 3 : 1, row = call->channel_last ? 1 : 2;
  call->n = shape[0], call->c = shape[channel], call->h = shape[row], call->w = shape[row + 1];
}

template <int operation>
MXReturnValue parse(const Attributes &attributes, int *inputs, int *outputs) {
  MxresnetBatchNorm call;
  *inputs = inputs_of(operation);
  *outputs = kOutputs;
  return read_attributes(operation, attributes, &call) ? MX_SUCCESS : MX_FAIL;
}

template <int operation>
MXReturnValue infer_type(const Attributes &, std::vector<int> *inputs, std::vector<int> *outputs) {
  for (int i = 0; i < inputs_of(operation); ++i) {
    const bool is_data = i == kData || i == kAddend;
    const int wanted = is_data ? kType : static_cast<int>(mxnet::ext::kFloat32);
    if (inputs->at(i) != -1 && inputs->at(i) != wanted)
      return refuse(operation, is_data ? std::string("data must be ") + kTypeName + " in the " + kDevice + " build" : "gamma, beta, moving_mean and moving_var must be float32");
    inputs->at(i) = wanted;
  }
  *outputs = {kType, mxnet::ext::kFloat32, mxnet::ext::kFloat32, mxnet::ext::kUint8};
  return MX_SUCCESS;
}

template <int operation>
MXReturnValue infer_storage(const Attributes &, std::vector<int> *inputs, std::vector<int> *outputs) {
  for (int &type : *inputs) {
    if (type > mxnet::ext::kDefaultStorage) return refuse(operation, "sparse arrays are not supported");
    type = mxnet::ext::kDefaultStorage;
  }
  for (int &type : *outputs) type = mxnet::ext::kDefaultStorage;
  return MX_SUCCESS;
}

// Every shape must be known: MXNet 1.9.1 hands over unknown ones in a way that writes past its buffer. So the variables of
// gamma, beta, moving_mean and moving_var are declared with their shape (mxresnet/extension.py), and compared here.
template <int operation>
MXReturnValue infer_shape(const Attributes &attributes, std::vector<Shape> *inputs, std::vector<Shape> *outputs) {
  MxresnetBatchNorm call;
  if (!read_attributes(operation, attributes, &call)) return MX_FAIL;
  const Shape data = inputs->at(kData);
  if (data.empty()) return refuse(operation, "the shape of data is not known");
  if (data.size() != 4) return refuse(operation, "data has shape " + text_of(data) + ", and 4 axes are needed");
  if (adds(operation) && inputs->at(kAddend) != data) return refuse(operation, "addend has shape " + text_of(inputs->at(kAddend)) + ", data " + text_of(data));
  read_shape(data, &call);
  const Shape channels = {static_cast<unsigned int>(call.c)};
  for (int i = kGamma; i <= kMovingVar; ++i)
    if (inputs->at(i) != channels)
      return refuse(operation, "gamma, beta, moving_mean and moving_var must have shape " + text_of(channels) + ", one of them has " + text_of(inputs->at(i)));
  char message[MXRESNET_MESSAGE_BYTES] = "";
  uint64_t reserve = 0;
  if (mxresnet_batch_norm_reserve(&call, &reserve, message)) return refuse(operation, message);
  // An empty array is an unknown shape to MXNet 1.9.1.
  *outputs = {data, channels, channels, {static_cast<unsigned int>(reserve ? reserve : 1)}};
  return MX_SUCCESS;
}

MXReturnValue mutable_inputs(const Attributes &, std::vector<int> *indices) {
  *indices = {kMovingMean, kMovingVar};
  return MX_SUCCESS;
}

void connect_inputs(MXTensor *input, MxresnetBatchNorm *call) {
  read_shape(input[kData].shape, call);
  call->x = input[kData].data_ptr;
  call->gamma = input[kGamma].data<float>();
  call->beta = input[kBeta].data<float>();
  call->running_mean = input[kMovingMean].data<float>();
  call->running_variance = input[kMovingVar].data<float>();
  if (adds(call->operation)) call->z = input[kAddend].data_ptr;
}

void connect_outputs(MXTensor *output, MxresnetBatchNorm *call) {
  call->y = output[0].data_ptr;
  call->saved_mean = output[1].data<float>();
  call->saved_inverse = output[2].data<float>();
  call->reserve = output[3].data_ptr;
  // The one byte of an array that must not be empty is none of the reserve's when that is empty; no mask is that small.
  call->reserve_bytes = static_cast<uint64_t>(output[3].size());
}

using Run = int (*)(const MxresnetBatchNorm *, char *);

MXReturnValue run(Run compute, bool backward, const OpResource &resource, MxresnetBatchNorm *call) {
  char message[MXRESNET_MESSAGE_BYTES] = "";
  MxresnetSizes sizes = {0, 0, 0};
#ifdef MXRESNET_GPU
  call->stream = resource.get_cuda_stream();
#endif
  if (mxresnet_batch_norm_sizes(call, &sizes, message)) return refuse(call->operation, message);
  call->workspace_bytes = backward ? sizes.backward_workspace : sizes.forward_workspace;
  if (call->workspace_bytes > INT32_MAX) return refuse(call->operation, "the workspace is larger than MXNet can allocate");
  const int bytes = static_cast<int>(call->workspace_bytes);
#ifdef MXRESNET_GPU
  if (bytes) call->workspace = resource.alloc_gpu(bytes);
#else
  if (bytes) call->workspace = resource.alloc_cpu(bytes);
#endif
  return compute(call, message) ? refuse(call->operation, message) : MX_SUCCESS;
}

template <int operation>
MXReturnValue forward(const Attributes &attributes, std::vector<MXTensor> *inputs, std::vector<MXTensor> *outputs, const OpResource &resource) {
  MxresnetBatchNorm call;
  if (!read_attributes(operation, attributes, &call)) return MX_FAIL;
  connect_inputs(inputs->data(), &call);
  connect_outputs(outputs->data(), &call);
  return run(mxresnet_batch_norm_forward, false, resource, &call);
}

// inputs: gradients of the outputs, of which only the first one counts; forward's inputs; forward's outputs.
template <int operation>
MXReturnValue backward(const Attributes &attributes, std::vector<MXTensor> *inputs, std::vector<MXTensor> *outputs, const OpResource &resource) {
  MxresnetBatchNorm call;
  if (!read_attributes(operation, attributes, &call)) return MX_FAIL;
  call.dy = inputs->at(0).data_ptr;
  connect_inputs(inputs->data() + kOutputs, &call);
  connect_outputs(inputs->data() + kOutputs + inputs_of(operation), &call);
  MXTensor *gradient = outputs->data();
  call.dx = gradient[kData].data_ptr;
  call.dgamma = gradient[kGamma].data<float>();
  call.dbeta = gradient[kBeta].data<float>();
  if (adds(operation)) call.dz = gradient[kAddend].data_ptr;
  return run(mxresnet_batch_norm_backward, true, resource, &call);
}

}  // namespace

#define MXRESNET_REGISTER(name, operation)                       \
  REGISTER_OP(name)                                              \
      .setParseAttrs(parse<operation>)                           \
      .setInferType(infer_type<operation>)                       \
      .setInferSType(infer_storage<operation>)                   \
      .setInferShape(infer_shape<operation>)                     \
      .setMutateInputs(mutable_inputs)                           \
      .setForward(forward<operation>, kDevice)                   \
      .setBackward(backward<operation>, kDevice)

MXRESNET_REGISTER(mxresnet_batch_norm, MXRESNET_BN);
MXRESNET_REGISTER(mxresnet_batch_norm_relu, MXRESNET_BN_RELU);
MXRESNET_REGISTER(mxresnet_batch_norm_add_relu, MXRESNET_BN_ADD_RELU);

MXReturnValue initialize(int version) {
  if (version == MXRESNET_MXNET_VERSION) return MX_SUCCESS;
  MX_ERROR_MSG << "built for MXNet " << MXRESNET_MXNET_VERSION << ", loaded by " << version;
  return MX_FAIL;
}
