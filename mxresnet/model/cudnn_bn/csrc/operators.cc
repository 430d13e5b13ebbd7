// SPDX-License-Identifier: Apache-2.0
// MXNet operators for batch_norm.h, through MXNet's interface for external operators
// (mxnet/lib_api.h). The file is compiled into two libraries: with batch_norm_cpu.cc, and with
// batch_norm_cudnn.cc and the macro MXRESNET_GPU.
//
//   mxresnet_batch_norm(data, gamma, beta, moving_mean, moving_var; eps, momentum, layout)
//   mxresnet_batch_norm_relu(same)
//   mxresnet_batch_norm_add_relu(data, gamma, beta, moving_mean, moving_var, addend; same)
//
// and, for evaluation, the same three with the suffix _inference, which have no backward pass.
//
// The addend is the last input, so that a network lists its parameters in the same order as with
// MXNet's own operators. Each layer has a state (Layer below), which keeps cuDNN's plan and what
// the backward pass needs of the forward pass. As outputs, the latter would cost memory and time:
// MXNet would fill an array of zeros as the gradient of each in every step.
//
// Two limits of the interface:
// - forward cannot know whether it runs in training. moving_mean and moving_var change in every
//   forward pass of the training operators, so that evaluation needs its own.
// - backward cannot know whether to write or add a gradient. It writes; runtime.py rejects the
//   environment variables with which MXNet might need gradients added.
#include <mxnet/lib_api.h>

#include <cstdlib>
#include <memory>

#include "batch_norm.h"

namespace {

using mxnet::ext::CustomStatefulOp;
using mxnet::ext::MX_FAIL;
using mxnet::ext::MX_SUCCESS;
using mxnet::ext::MXContext;
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
constexpr int kOutputs = 1;
constexpr int kUnknownType = -1;

// The metadata that build.py finds in the file: the versions of MXNet and of its interface, and the
// hash of the sources.
extern "C" __attribute__((used, visibility("default"))) const char mxresnet_build[] =
    MXRESNET_BUILD;

const char* operator_name(int operation) {
  if (operation == MXRESNET_BN) return "mxresnet_batch_norm";
  if (operation == MXRESNET_BN_RELU) return "mxresnet_batch_norm_relu";
  return "mxresnet_batch_norm_add_relu";
}

MXReturnValue fail(int operation, const std::string& why) {
  MX_ERROR_MSG << operator_name(operation) << ": " << why;
  return MX_FAIL;
}

enum Input { kData, kGamma, kBeta, kMovingMean, kMovingVar, kAddend };

constexpr bool has_addend(int operation) { return operation == MXRESNET_BN_ADD_RELU; }
constexpr int input_count(int operation) { return has_addend(operation) ? kAddend + 1 : kAddend; }

std::string shape_text(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

bool parse_number(const std::string& text, double* value) {
  char* end = nullptr;
  *value = std::strtod(text.c_str(), &end);
  return !text.empty() && *end == 0;
}

// Returns whether the attributes are valid. MXNet's own, which begin with two underscores, are
// ignored; any other unknown attribute is an error.
bool read_attributes(int operation, const Attributes& attributes, MxresnetBatchNorm* call) {
  *call = MxresnetBatchNorm();
  call->operation = operation;
  call->channel_last = 1;
  call->epsilon = 1e-5;
  call->momentum = 0.9;
  for (const auto& item : attributes) {
    bool valid = item.first.compare(0, 2, "__") == 0;
    if (item.first == "eps") valid = parse_number(item.second, &call->epsilon) && call->epsilon > 0;
    if (item.first == "momentum")
      valid =
          parse_number(item.second, &call->momentum) && call->momentum >= 0 && call->momentum <= 1;
    if (item.first == "layout") {
      call->channel_last = item.second == "NHWC";
      valid = call->channel_last || item.second == "NCHW";
    }
    if (!valid) {
      fail(operation,
           "attribute " + item.first + "=" + item.second +
               " is not valid: eps must be above 0, momentum from 0 to 1, layout NHWC or NCHW");
      return false;
    }
  }
  return true;
}

template <typename Dimension>
void read_shape(const std::vector<Dimension>& shape, MxresnetBatchNorm* call) {
  const int channel = call->channel_last ? 3 : 1, row = call->channel_last ? 1 : 2;
  call->n = shape[0], call->c = shape[channel], call->h = shape[row], call->w = shape[row + 1];
}

template <int operation>
MXReturnValue parse(const Attributes& attributes, int* inputs, int* outputs) {
  MxresnetBatchNorm call;
  *inputs = input_count(operation);
  *outputs = kOutputs;
  return read_attributes(operation, attributes, &call) ? MX_SUCCESS : MX_FAIL;
}

template <int operation>
MXReturnValue infer_type(const Attributes&, std::vector<int>* inputs, std::vector<int>* outputs) {
  for (int i = 0; i < input_count(operation); ++i) {
    const bool is_data = i == kData || i == kAddend;
    const int expected = is_data ? kType : static_cast<int>(mxnet::ext::kFloat32);
    if (inputs->at(i) != kUnknownType && inputs->at(i) != expected)
      return fail(operation, is_data ? std::string("data must be ") + kTypeName + " in the " +
                                           kDevice + " build"
                                     : "gamma, beta, moving_mean and moving_var must be float32");
    inputs->at(i) = expected;
  }
  *outputs = {kType};
  return MX_SUCCESS;
}

template <int operation>
MXReturnValue infer_storage(const Attributes&, std::vector<int>* inputs,
                            std::vector<int>* outputs) {
  for (int& type : *inputs) {
    if (type > mxnet::ext::kDefaultStorage)
      return fail(operation, "sparse arrays are not supported");
    type = mxnet::ext::kDefaultStorage;
  }
  for (int& type : *outputs) type = mxnet::ext::kDefaultStorage;
  return MX_SUCCESS;
}

// Checks all shapes and infers that of the output. The shape of every input must be known,
// because MXNet 1.9.1 writes past a buffer when an external operator infers the shape of an input.
// runtime.py therefore declares the variables with their shapes.
template <int operation>
MXReturnValue infer_shape(const Attributes& attributes, std::vector<Shape>* inputs,
                          std::vector<Shape>* outputs) {
  MxresnetBatchNorm call;
  if (!read_attributes(operation, attributes, &call)) return MX_FAIL;
  const Shape data = inputs->at(kData);
  if (data.empty()) return fail(operation, "the shape of data is not known");
  if (data.size() != 4)
    return fail(operation, "data has shape " + shape_text(data) + ", and 4 axes are needed");
  if (has_addend(operation) && inputs->at(kAddend) != data)
    return fail(operation, "addend has shape " + shape_text(inputs->at(kAddend)) + ", data " +
                               shape_text(data));
  read_shape(data, &call);
  const Shape channels = {static_cast<unsigned int>(call.c)};
  for (int i = kGamma; i <= kMovingVar; ++i)
    if (inputs->at(i) != channels)
      return fail(operation, "gamma, beta, moving_mean and moving_var must have shape " +
                                 shape_text(channels) + ", one of them has " +
                                 shape_text(inputs->at(i)));
  char message[MXRESNET_MESSAGE_BYTES] = "";
  if (mxresnet_batch_norm_check(&call, message)) return fail(operation, message);
  *outputs = {data};
  return MX_SUCCESS;
}

// The evaluation operators do not change them, but list them too: the evaluation network shares
// the auxiliary arrays of the training network, and MXNet takes mutable inputs as auxiliary.
MXReturnValue mutable_inputs(const Attributes&, std::vector<int>* indices) {
  *indices = {kMovingMean, kMovingVar};
  return MX_SUCCESS;
}

void set_inputs(MXTensor* input, MxresnetBatchNorm* call) {
  read_shape(input[kData].shape, call);
  call->x = input[kData].data_ptr;
  call->gamma = input[kGamma].data<float>();
  call->beta = input[kBeta].data<float>();
  call->running_mean = input[kMovingMean].data<float>();
  call->running_variance = input[kMovingVar].data<float>();
  if (has_addend(call->operation)) call->z = input[kAddend].data_ptr;
}

uint64_t aligned(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

// Makes a device current, and the previous one again when it is destroyed.
class CurrentDevice {
 public:
  CurrentDevice(int device, char* message) {
    failed_ = mxresnet_set_device(device, &previous_, message);
  }
  ~CurrentDevice() {
    char message[MXRESNET_MESSAGE_BYTES];
    if (!failed_) mxresnet_set_device(previous_, nullptr, message);
  }
  bool failed() const { return failed_; }

 private:
  int previous_ = 0;
  bool failed_;
};

// The state of one batch norm of a network.
class Layer : public CustomStatefulOp {
 public:
  Layer(const MxresnetBatchNorm& call, bool training) : call_(call), training_(training) {}
  ~Layer() override {
    mxresnet_plan_destroy(plan_);
    if (memory_) mxresnet_free(memory_);
  }

  // Creates the plan and, for training, allocates what forward passes to backward. Returns 0 on
  // success, else 1 with a message.
  int prepare(int device, char* message) {
    CurrentDevice current(device, message);
    if (current.failed() || mxresnet_plan_create(&call_, &plan_, &sizes_, message)) return 1;
    if (!training_) return 0;
    const uint64_t statistics = aligned(sizeof(float) * static_cast<uint64_t>(call_.c));
    if (mxresnet_allocate(2 * statistics + sizes_.reserve, &memory_, message)) return 1;
    char* const start = static_cast<char*>(memory_);
    call_.saved_mean = reinterpret_cast<float*>(start);
    call_.saved_inverse_std = reinterpret_cast<float*>(start + statistics);
    call_.reserve = start + 2 * statistics;
    call_.reserve_bytes = sizes_.reserve;
    return 0;
  }

  MXReturnValue Forward(std::vector<MXTensor>* inputs, std::vector<MXTensor>* outputs,
                        const OpResource& resource) override {
    MxresnetBatchNorm call = call_;
    set_inputs(inputs->data(), &call);
    call.y = outputs->at(0).data_ptr;
    if (!training_) return run(mxresnet_batch_norm_evaluate, 0, resource, &call);
    return run(mxresnet_batch_norm_forward, sizes_.forward_workspace, resource, &call);
  }

  // inputs: the gradient of the output, forward's inputs, and its output. outputs: the gradients of
  // forward's inputs.
  MXReturnValue Backward(std::vector<MXTensor>* inputs, std::vector<MXTensor>* outputs,
                         const OpResource& resource) override {
    MxresnetBatchNorm call = call_;
    if (!training_) return fail(call.operation, "the operator for evaluation has no gradient");
    call.dy = inputs->at(0).data_ptr;
    set_inputs(inputs->data() + kOutputs, &call);
    call.y = inputs->at(kOutputs + input_count(call.operation)).data_ptr;
    MXTensor* gradient = outputs->data();
    call.dx = gradient[kData].data_ptr;
    call.dgamma = gradient[kGamma].data<float>();
    call.dbeta = gradient[kBeta].data<float>();
    if (has_addend(call.operation)) call.dz = gradient[kAddend].data_ptr;
    return run(mxresnet_batch_norm_backward, sizes_.backward_workspace, resource, &call);
  }

 private:
  using Pass = int (*)(const MxresnetPlan*, const MxresnetBatchNorm*, char*);

  // Allocates the workspace and computes a pass.
  MXReturnValue run(Pass pass, uint64_t workspace, const OpResource& resource,
                    MxresnetBatchNorm* call) {
    char message[MXRESNET_MESSAGE_BYTES] = "";
    if (workspace > INT32_MAX)
      return fail(call->operation, "the workspace is larger than MXNet can allocate");
    const int bytes = static_cast<int>(workspace);
    call->workspace_bytes = workspace;
#ifdef MXRESNET_GPU
    call->stream = resource.get_cuda_stream();
    if (bytes) call->workspace = resource.alloc_gpu(bytes);
#else
    if (bytes) call->workspace = resource.alloc_cpu(bytes);
#endif
    return pass(plan_, call, message) ? fail(call->operation, message) : MX_SUCCESS;
  }

  MxresnetBatchNorm call_;
  const bool training_;
  MxresnetPlan* plan_ = nullptr;
  MxresnetSizes sizes_ = {0, 0, 0};
  void* memory_ = nullptr;
};

template <int operation, bool training>
MXReturnValue create_layer(const Attributes& attributes, const MXContext& context,
                           const std::vector<Shape>& shapes, const std::vector<int>,
                           CustomStatefulOp** layer) {
  MxresnetBatchNorm call;
  if (!read_attributes(operation, attributes, &call)) return MX_FAIL;
  read_shape(shapes.at(kData), &call);
  char message[MXRESNET_MESSAGE_BYTES] = "";
  std::unique_ptr<Layer> created(new Layer(call, training));
  if (created->prepare(context.dev_id, message)) return fail(operation, message);
  created->ignore_warn = true;  // it is allocated with new, as MXNet would warn that it must be
  *layer = created.release();
  return MX_SUCCESS;
}

}  // namespace

#define MXRESNET_REGISTER(name, operation, training) \
  REGISTER_OP(name)                                  \
      .setParseAttrs(parse<operation>)               \
      .setInferType(infer_type<operation>)           \
      .setInferSType(infer_storage<operation>)       \
      .setInferShape(infer_shape<operation>)         \
      .setMutateInputs(mutable_inputs)               \
      .setCreateOpState(create_layer<operation, training>, kDevice)

MXRESNET_REGISTER(mxresnet_batch_norm, MXRESNET_BN, true);
MXRESNET_REGISTER(mxresnet_batch_norm_relu, MXRESNET_BN_RELU, true);
MXRESNET_REGISTER(mxresnet_batch_norm_add_relu, MXRESNET_BN_ADD_RELU, true);
MXRESNET_REGISTER(mxresnet_batch_norm_inference, MXRESNET_BN, false);
MXRESNET_REGISTER(mxresnet_batch_norm_relu_inference, MXRESNET_BN_RELU, false);
MXRESNET_REGISTER(mxresnet_batch_norm_add_relu_inference, MXRESNET_BN_ADD_RELU, false);

MXReturnValue initialize(int version) {
  if (version == MXRESNET_MXNET_VERSION) return MX_SUCCESS;
  MX_ERROR_MSG << "library built for MXNet " << MXRESNET_MXNET_VERSION << ", loaded by MXNet "
               << version;
  return MX_FAIL;
}
