// One call, checked and on its way: the seam between the ops and the transports.
#pragma once

#include "epilogues/epilogue.h"
#include "host/one_rank.h"
#include "torch/checks.h"
#include "torch/workspace.h"

namespace mnnvl_ar {

// What a call may choose; kAuto leaves it to the workspace.
struct Options {
  int64_t strategy;
  int64_t pdl;
};

namespace detail {

// Holds the workspace for one thread, and knows how its call is to run.
class Turn {
 public:
  // Throws what is wrong with the workspace, the options or the size of the call.
  Turn(int64_t handle, protocol::Op op, const Agreement& agreement, const Options& options);

  // Zero tokens: there is nothing to do.
  bool is_empty() const { return workspace_ == nullptr; }
  const protocol::Params& params() const { return params_; }
  // On the current stream. `call`: a CallOf the op's epilogue; `params`: the part of it that is a copy of params(), whose launch is
  // filled in here.
  void launch(void* call, protocol::Params& params);
  // The host's call has failed: throws why.
  [[noreturn]] void fail();

 private:
  struct Release {  // of the workspace, at the end of the call
    std::atomic<bool>* busy = nullptr;
    ~Release() {
      if (busy != nullptr) *busy = false;
    }
  };

  const int64_t handle_;
  const protocol::Op op_;
  const Agreement& agreement_;
  const Options options_;
  Workspace* workspace_ = nullptr;
  Release release_;
  launch::Choice choice_{};
  protocol::Params params_;
};

}  // namespace detail

// Runs the call (host) or launches it on the current stream (CUDA). Zero tokens: nothing happens.
template <class E>
void run(int64_t handle, const Agreement& agreement, const Options& options, const typename E::Arguments& arguments) {
  detail::Turn turn(handle, E::kOp, agreement, options);
  if (turn.is_empty()) return;
  epilogues::CallOf<E> call{{arguments}, turn.params()};
  if (agreement.device < 0) {
    if (!host::run<E>(call, agreement.dtype)) turn.fail();
  } else {
    turn.launch(&call, call);
  }
}

}  // namespace mnnvl_ar
