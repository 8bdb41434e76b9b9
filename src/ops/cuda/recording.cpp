// Recordings of a step's kernels as CUDA graphs, marks in the stream, and waiting for both.
#include "core/error.h"
#include "ops/cuda/state.h"

namespace krait::cuda {
namespace {

struct Recording {
  explicit Recording(cudaGraph_t graph) {
    check(cudaGraphInstantiate(&executable, graph, 0), "preparing a CUDA graph");
  }
  ~Recording() { cudaGraphExecDestroy(executable); }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  cudaGraphExec_t executable = nullptr;
};

struct Mark {
  Mark() { check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event"); }
  ~Mark() { cudaEventDestroy(event); }
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;

  cudaEvent_t event = nullptr;
};

}  // namespace

void synchronize(Context& ctx) {
  check(cudaStreamSynchronize(state_of(ctx).stream), "waiting for the GPU");
}

void mark(Context& ctx, std::shared_ptr<void>& mark) {
  if (!mark) mark = std::make_shared<Mark>();
  check(cudaEventRecord(static_cast<Mark*>(mark.get())->event, state_of(ctx).stream),
        "marking a place in the stream");
}

void wait(Context&, const std::shared_ptr<void>& mark) {
  if (mark)
    check(cudaEventSynchronize(static_cast<Mark*>(mark.get())->event), "waiting for the GPU");
}

void follow(Context& ctx, const std::shared_ptr<void>& mark) {
  if (mark)
    check(cudaStreamWaitEvent(state_of(ctx).stream, static_cast<Mark*>(mark.get())->event),
          "waiting in the stream");
}

std::shared_ptr<void> record(Context& ctx, const std::function<void()>& body) {
  const cudaStream_t stream = state_of(ctx).stream;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording a CUDA graph");
  cudaGraph_t graph = nullptr;
  try {
    body();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "recording a CUDA graph");
  const auto destroy = [](cudaGraph_t g) { cudaGraphDestroy(g); };
  const std::unique_ptr<CUgraph_st, decltype(destroy)> owner(graph, destroy);
  return std::make_shared<Recording>(graph);
}

void replay(Context& ctx, const std::shared_ptr<void>& recording) {
  check(cudaGraphLaunch(static_cast<Recording*>(recording.get())->executable, state_of(ctx).stream),
        "launching a CUDA graph");
}

}  // namespace krait::cuda
