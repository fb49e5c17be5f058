#include "torch/bound.h"

#include <pthread.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "torch/run.h"

namespace mnnvl_ar {
namespace {

thread_local BoundCall* under_way = nullptr;
thread_local int64_t under_way_for = 0;

std::mutex mutex;
// A child forgets calls too, as it collects garbage: it must not inherit a mutex that another thread held, and nobody gives back.
const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
// Never destroyed: a thread may still be in a call when the process ends.
auto& calls = *new std::unordered_map<int64_t, std::shared_ptr<BoundCall>>;
int64_t last_number = 0;

// `who`: a number of the caller's own, other than 0.
void bind_begin(int64_t who) {
  STD_TORCH_CHECK(registered == 0, "bind: pthread_atfork failed");
  STD_TORCH_CHECK(under_way == nullptr, "bind: this thread is binding a call already");
  under_way = new BoundCall;
  under_way_for = who;
}

// Returns the number of what was kept since, or 0 if it launches nothing on a GPU, or if this thread binds nothing for `who`: an
// exception may come before bind_begin(), or between it and the caller's next step.
int64_t bind_end(int64_t who) {
  if (who != under_way_for) return 0;
  under_way_for = 0;
  std::unique_ptr<BoundCall> call(std::exchange(under_way, nullptr));
  if (call == nullptr || call->launches.empty()) return 0;
  const std::lock_guard<std::mutex> lock(mutex);
  calls[++last_number] = std::move(call);
  return last_number;
}

void bind_forget(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  calls.erase(number);
}

// Held by who launches it: another thread may forget it meanwhile.
std::shared_ptr<BoundCall> find_bound(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = calls.find(number);
  return found == calls.end() ? nullptr : found->second;
}

}  // namespace

BoundCall* binding() { return under_way; }

}  // namespace mnnvl_ar

// Null: it was launched. "": more or fewer workspaces share the device, or calls count on other processors, than when it was bound, so
// it has to be bound anew. Else what is wrong. Called without the GIL: the driver may block, as long as a launch queue is full.
extern "C" __attribute__((visibility("default"))) const char* mnnvl_ar_run_bound(int64_t number) {
  static thread_local std::string wrong;
  try {
    const std::shared_ptr<mnnvl_ar::BoundCall> call = mnnvl_ar::find_bound(number);
    if (call == nullptr) return "bind: there is no such call";
    return mnnvl_ar::detail::launch_bound(*call) ? nullptr : "";
  } catch (const std::exception& error) {
    wrong = error.what();
    return wrong.c_str();
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) {
  m.def("_bind_begin(int who) -> ()");
  m.def("_bind_end(int who) -> int");
  m.def("_bind_forget(int call) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CompositeExplicitAutograd, m) {
  m.impl("_bind_begin", TORCH_BOX(&mnnvl_ar::bind_begin));
  m.impl("_bind_end", TORCH_BOX(&mnnvl_ar::bind_end));
  m.impl("_bind_forget", TORCH_BOX(&mnnvl_ar::bind_forget));
}
