// One call, checked and on its way: the seam between the ops and the transports.
#pragma once

#include "epilogues/epilogue.h"
#include "host/one_rank.h"
#include "torch/bound.h"
#include "torch/checks.h"
#include "torch/workspace.h"

namespace mnnvl_ar {

// What a call may choose; kAuto leaves it to the workspace.
struct Options {
  int64_t strategy;
  int64_t pdl;
  int64_t tag;  // the caller's own, to tell calls apart that are alike in all else
};

namespace detail {

// Gives a workspace back, at the end of a call.
struct Release {
  Workspace* workspace = nullptr;
  ~Release() {
    if (workspace == nullptr) return;
    workspace->caller = std::thread::id();
    workspace->busy = false;
  }
};

// What bounds a call's grid, beside the device.
struct Room {
  uint32_t sharers;     // workspaces that may run at once on the device, this one included
  uint32_t processors;  // that the call may count on; 0: all of the device
  uint32_t max_ctas;    // 0: no bound
};

// Holds the workspace for one thread, and knows how its call is to run: in one piece after the other (protocol/pieces.h).
class Turn {
 public:
  // Throws what is wrong with the workspace, the options or the size of the call.
  Turn(int64_t handle, protocol::Op op, const Agreement& agreement, const Options& options);

  // Whether there is another piece. It is params() then. Of a call of no tokens there is none.
  bool next();
  const protocol::Params& params() const { return params_; }
  // Where the piece begins, in bytes of x.
  uint64_t begin() const { return uint64_t{params_.tensors.first_token} * row_bytes_; }
  // Launches the piece on the current stream, or keeps it where a call is being bound (bound.h). `call`: a CallOf the op's epilogue, of
  // `size` bytes; `params`: the part of it that is a copy of params(), whose launch is filled in here.
  void launch(void* call, size_t size, protocol::Params& params);
  // For whoever launches the piece on the current stream by a kernel of their own (ops/beside.cpp): fills in the number and the edges
  // of its launch, and notes that a graph may capture it.
  Room announce(protocol::Params& params);
  // The host's call has failed: throws why.
  [[noreturn]] void fail();

 private:
  // When it may begin, and what may begin before it has ended.
  void set_edges(protocol::Launch& launch, uint32_t sharing) const;

  const int64_t handle_;
  const protocol::Op op_;
  const Agreement& agreement_;
  const Options options_;
  Workspace* workspace_ = nullptr;
  Release release_;
  launch::Cut cut_{};
  uint32_t piece_ = 0;  // the next one
  uint64_t row_bytes_ = 0;
  protocol::Params params_;
};

// False: it has to be bound anew. Throws as an op does.
bool launch_bound(BoundCall& call);

}  // namespace detail

// Runs the call (host) or launches it on the current stream (CUDA). Zero tokens: nothing happens. A piece that fails ends those after
// it, which leave NaN; rows of pieces before it are right. `kOp`: of an epilogue of several ops, which of them.
template <class E, protocol::Op kOp = E::kOp>
void run(int64_t handle, const Agreement& agreement, const Options& options, const typename E::Arguments& arguments) {
  detail::Turn turn(handle, kOp, agreement, options);
  bool ok = true;
  while (turn.next()) {
    epilogues::CallOf<E> call{{arguments.from(turn.begin())}, turn.params()};
    if constexpr (E::kNormed) {
      call.tensors.numbers = arguments.numbers();
      call.tensors.description |= arguments.variant() << protocol::kVariantAt;
    }
    if (agreement.device < 0) {
      ok &= host::run<E>(call, agreement.dtype);
    } else {
      turn.launch(&call, sizeof(call), call);
    }
  }
  if (!ok) turn.fail();
}

}  // namespace mnnvl_ar
