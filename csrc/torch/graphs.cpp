#if MNNVL_AR_CUDA
#include "torch/graphs.h"

namespace mnnvl_ar {
namespace {

struct Capture {
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;  // null: none is under way
};

Capture capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  Capture found;
#if CUDART_VERSION >= 13000
  const cudaError_t error =
      cudaStreamGetCaptureInfo(stream, &status, &found.id, &found.graph, nullptr, nullptr, nullptr);
#else
  const cudaError_t error = cudaStreamGetCaptureInfo_v2(stream, &status, &found.id, &found.graph, nullptr, nullptr);
#endif
  return error == cudaSuccess && status == cudaStreamCaptureStatusActive ? found : Capture{};
}

// Called by the driver once nothing is left of a graph; it may not call CUDA.
void CUDART_CB forget_graph(void* workspace) { static_cast<Workspace*>(workspace)->graphs -= 1; }

// The graph, and whatever is instantiated of it, owns an object with a callback at its end.
void watch_end(Workspace& workspace, cudaGraph_t graph) {
  cudaUserObject_t object = nullptr;
  if (cudaUserObjectCreate(&object, &workspace, forget_graph, 1, cudaUserObjectNoDestructorSync) != cudaSuccess) return;
  cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
}

}  // namespace

void note_capture(Workspace& workspace, cudaStream_t stream) {
  if (stream == nullptr) return;  // the legacy stream cannot capture
  const Capture capture = capture_of(stream);
  if (capture.graph == nullptr || capture.id == workspace.last_capture) return;
  workspace.last_capture = capture.id;
  workspace.graphs += 1;  // for good, if its end cannot be watched
  watch_end(workspace, capture.graph);
}

}  // namespace mnnvl_ar
#endif
