#include "torch/workspace.h"

#include <pthread.h>
#include <torch/headeronly/util/Exception.h>
#include <unistd.h>

#include <mutex>
#include <set>

#if MNNVL_AR_CUDA
#include "launch/device.h"
#include "launch/plan.h"
#endif

namespace mnnvl_ar {

namespace {

std::mutex mutex;
// By handle - 1; closed ones stay, to be named. Never destroyed: the driver may tell us of a graph's end later than that.
auto& workspaces = *new std::vector<std::unique_ptr<Workspace>>;
std::atomic<pid_t> this_process = getpid();
constexpr int64_t kMaxDevices = 64;
std::atomic<uint32_t> open_blocks[kMaxDevices];  // by device

bool is_of_another_process(const Workspace& workspace) { return workspace.owner != this_process; }

// With the mutex held, after a workspace was added, or closed, or has given its memory back. One that is closed counts as long as its
// graphs may run.
void count_open_blocks(int64_t device) {
  if (device < 0 || device >= kMaxDevices) return;
  std::set<const void*> blocks;
  for (const auto& workspace : workspaces) {
    const bool may_run = !workspace->closed || (workspace->graphs != 0 && !workspace->unmapped);
    if (!may_run || is_of_another_process(*workspace)) continue;
    if (workspace->settings.device == device) blocks.insert(workspace->params.group.block);
  }
  open_blocks[device] = static_cast<uint32_t>(blocks.size());
}

// What a workspace's calls share with the host. Kept for good: captured graphs may still use it.
struct Shared {
  protocol::FaultRecord record;
  protocol::Orders orders;
};

void share(protocol::Group& group, protocol::Orders orders, int64_t device) {
  void* memory = nullptr;
#if MNNVL_AR_CUDA
  if (device >= 0) {
    const cudaError_t error = cudaHostAlloc(&memory, sizeof(Shared), cudaHostAllocMapped | cudaHostAllocPortable);
    STD_TORCH_CHECK(error == cudaSuccess, "workspace: no mapped host memory: ", cudaGetErrorString(error));
  }
#else
  STD_TORCH_CHECK(device < 0, "workspace: this build has no CUDA transport (there was no nvcc); use device='cpu'");
#endif
  if (memory == nullptr) memory = ::operator new(sizeof(Shared));
  auto* const shared = new (memory) Shared{{}, orders};
  group.record = &shared->record;
  group.orders = &shared->orders;
}

volatile protocol::Orders& orders_of(Workspace& workspace) {
  return *const_cast<protocol::Orders*>(workspace.params.group.orders);
}

}  // namespace

int64_t create(const Settings& settings, uint32_t rank, const std::vector<int64_t>& blocks, int64_t multicast,
               uint64_t slot_bytes, protocol::Orders orders, launch::Table table) {
  // A thread may look at a workspace while another one forks: the child must not inherit a mutex that nobody gives back.
  static const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); },
                                               [] {
                                                 mutex.unlock();
                                                 this_process = getpid();
                                               });
  STD_TORCH_CHECK(registered == 0, "workspace: pthread_atfork failed");
  const auto ranks = blocks.size();
  STD_TORCH_CHECK(ranks >= 1 && ranks <= protocol::kMaxRanks, "workspace: world size ", ranks, ", wanted 1 to ",
                  protocol::kMaxRanks);
  STD_TORCH_CHECK(slot_bytes < protocol::kMaxSlotBytes, "workspace: slots of ", slot_bytes,
                  " bytes, wanted fewer than 4 GiB; take a smaller max_tokens");
  STD_TORCH_CHECK(rank < ranks, "workspace: rank ", rank, " of ", ranks);
  auto workspace = std::make_unique<Workspace>();
  workspace->owner = this_process;
  workspace->settings = settings;
  workspace->table = std::move(table);
  workspace->slot_vectors = slot_bytes / protocol::kVectorBytes;
  workspace->params = protocol::Params{};
  protocol::Group& g = workspace->params.group;
  g.rank = rank;
  g.ranks = static_cast<uint32_t>(ranks);
  g.slot_bytes = slot_bytes;
  g.block = reinterpret_cast<uint8_t*>(blocks[rank]);
  g.multicast = reinterpret_cast<uint8_t*>(multicast);
  for (uint32_t i = 0; i < g.ranks; ++i) g.peers[i] = reinterpret_cast<uint8_t*>(blocks[(rank + 1 + i) % g.ranks]);
#if MNNVL_AR_CUDA
  if (settings.device >= 0) {
    const launch::OnDevice guard(static_cast<int>(settings.device));
    const cudaError_t error = guard.ok() ? launch::load_kernels(g.ranks) : cudaErrorDevicesUnavailable;
    if (error == cudaSuccess) share(g, orders, settings.device);
    if (error == cudaSuccess) diagnosis::copier(settings.device);
    STD_TORCH_CHECK(error == cudaSuccess, "workspace: cannot load the kernels on cuda:", settings.device, ": ",
                    cudaGetErrorString(error));
  }
#endif
  if (g.record == nullptr) share(g, orders, settings.device);
  const std::lock_guard<std::mutex> lock(mutex);
  workspaces.push_back(std::move(workspace));
  count_open_blocks(settings.device);
  return static_cast<int64_t>(workspaces.size());
}

Workspace& find_any(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  STD_TORCH_CHECK(handle >= 1 && handle <= static_cast<int64_t>(workspaces.size()), "workspace: handle ", handle,
                  " is unknown in this process, which made ", workspaces.size(), " (wanted Workspace.handle)");
  return *workspaces[static_cast<size_t>(handle - 1)];
}

Workspace& find(int64_t handle, int64_t device) {
  Workspace& workspace = find_any(handle);
  check_open(workspace, handle);
  if (workspace.settings.device != device) {
    const auto name = [](int64_t index) { return index < 0 ? std::string("cpu") : "cuda:" + std::to_string(index); };
    STD_TORCH_CHECK(false, "x: is on ", name(device), ", wanted ", name(workspace.settings.device),
                    ", the device of workspace ", handle);
  }
  return workspace;
}

void check_open(const Workspace& workspace, int64_t handle) {
  STD_TORCH_CHECK(!is_of_another_process(workspace), "workspace: handle ", handle,
                  " belongs to the parent of this forked process; make a new workspace here");
  STD_TORCH_CHECK(!workspace.closed, "workspace: handle ", handle, " is closed");
  STD_TORCH_CHECK(!workspace.asleep, "workspace: handle ", handle, " is asleep; Workspace.wake() first");
}

namespace {

void end_calls(Workspace& workspace) {
  orders_of(workspace).answered = 1;
  diagnosis::end_calls(workspace.blocks());
}

// With `reading` held. What is recorded from here on is of calls that come later.
void forget_fault(Workspace& workspace) {
  *workspace.params.group.record = protocol::FaultRecord{};
  orders_of(workspace).answered = 0;
  workspace.finding = diagnosis::Finding{};
  workspace.found = false;
}

// Sets a flag that keeps calls out, unless a call is under way; with `end`, ends that call. A call says that it is busy and then
// looks at the flags; here it is the other way round, so one of the two sees the other. Returns whether it was set before.
bool shut(Workspace& workspace, int64_t handle, std::atomic<bool>& flag, bool end) {
  if (flag.exchange(true)) return true;
  if (!workspace.busy) return false;
  if (workspace.caller.load() == std::this_thread::get_id()) {  // it goes on only when the handler has returned
    if (end) end_calls(workspace);
    flag = false;
    STD_TORCH_CHECK(false, "workspace: handle ", handle,
                    " is in a call of this thread, which a signal's handler interrupts",
                    end ? ", and which ends now" : "", "; once more when the handler has returned");
  }
  for (int tries = 0; end && workspace.busy && tries < 10000; ++tries) {  // ten seconds; a wait looks every 50 us
    if (tries % 100 == 0) end_calls(workspace);
    usleep(1000);
  }
  if (!workspace.busy) return false;
  flag = false;
  STD_TORCH_CHECK(false, "workspace: handle ", handle, " is in a call of another thread");
  return false;
}

// Until what this rank has queued is done. Without `lock`, of `reading`: the monitor may have to end calls that wait for a peer.
diagnosis::Quiet await_calls(Workspace& workspace, std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  const diagnosis::Quiet quiet = diagnosis::quiesce(workspace.blocks());
  lock.lock();
  return quiet;
}

}  // namespace

void set_deadline(int64_t handle, uint64_t deadline_ns) {
  Workspace& workspace = find_any(handle);
  check_open(workspace, handle);
  orders_of(workspace).deadline_ns = deadline_ns;
}

void set_processors(int64_t handle, uint32_t processors) { find_any(handle).settings.processors = processors; }

bool has_fault(int64_t handle) {
  const volatile protocol::FaultRecord& record = *find_any(handle).params.group.record;
  return record.code != protocol::FaultCode::none;
}

void answer(int64_t handle) {
  Workspace& workspace = find_any(handle);
  const std::lock_guard<std::mutex> lock(workspace.reading);
  // Of a fault that has been forgotten since, it would let go the stream of the next one.
  if (workspace.found || has_fault(handle)) orders_of(workspace).answered = 1;
}

bool close(int64_t handle, bool force) {
  Workspace& workspace = find_any(handle);
  if (is_of_another_process(workspace)) return false;
  shut(workspace, handle, workspace.closed, force && !workspace.asleep);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    count_open_blocks(workspace.settings.device);
  }
  std::unique_lock<std::mutex> lock(workspace.reading);
  if (workspace.unmapped) return true;
  if (workspace.graphs != 0 && !force) return false;
  if (force) end_calls(workspace);
  const diagnosis::Quiet quiet = await_calls(workspace, lock);
  if (workspace.unmapped) return true;                  // another thread has been quicker
  if (force && quiet == diagnosis::Quiet::capturing) {  // its calls have been ended, and it is open to be closed again
    workspace.closed = false;
    const std::lock_guard<std::mutex> counting(mutex);
    count_open_blocks(workspace.settings.device);
    STD_TORCH_CHECK(false, "workspace: handle ", handle,
                    " cannot give its memory back: a CUDA graph is being captured; close it again after that");
  }
  workspace.unmapped = quiet == diagnosis::Quiet::yes || force;
  if (!workspace.unmapped) return false;
  workspace.last_epoch = diagnosis::next_epoch_of(workspace.blocks());
  forget_fault(workspace);
  const std::lock_guard<std::mutex> counting(mutex);
  count_open_blocks(workspace.settings.device);
  return true;
}

void end_calls(int64_t handle) {
  Workspace& workspace = find_any(handle);
  const std::lock_guard<std::mutex> lock(workspace.reading);
  if (!is_of_another_process(workspace) && !workspace.unmapped) end_calls(workspace);
}

uint32_t graphs_of(int64_t handle) { return find_any(handle).graphs; }

diagnosis::Loss lose(int64_t handle, uint32_t peer, diagnosis::Departure how, uint32_t next) {
  Workspace& workspace = find_any(handle);
  const std::lock_guard<std::mutex> lock(workspace.reading);
  const bool has_memory = !is_of_another_process(workspace) && !workspace.unmapped;
  if (!has_memory || peer >= workspace.params.group.ranks) return diagnosis::Loss::done;
  return diagnosis::lose(workspace.blocks(), peer, how, next, workspace.waiting[peer]);
}

uint32_t epoch_of(int64_t handle) {
  Workspace& workspace = find_any(handle);
  const std::lock_guard<std::mutex> lock(workspace.reading);
  if (workspace.unmapped) return workspace.last_epoch;
  return is_of_another_process(workspace) ? protocol::kNoEpoch : diagnosis::next_epoch_of(workspace.blocks());
}

void put_to_sleep(int64_t handle, bool end) {
  Workspace& workspace = find_any(handle);
  STD_TORCH_CHECK(!workspace.closed && !is_of_another_process(workspace), "workspace: handle ", handle, " is closed");
  if (shut(workspace, handle, workspace.asleep, end)) return;  // before the lock, which a call that fails takes
  std::unique_lock<std::mutex> lock(workspace.reading);
  if (end) end_calls(workspace);
  const diagnosis::Quiet quiet = await_calls(workspace, lock);
  if (quiet == diagnosis::Quiet::yes) {
    workspace.last_epoch = diagnosis::next_epoch_of(workspace.blocks());
    forget_fault(workspace);
    workspace.unmapped = true;
    return;
  }
  workspace.asleep = false;
  STD_TORCH_CHECK(false, "workspace: handle ", handle, " cannot sleep: ",
                  quiet == diagnosis::Quiet::capturing ? "a CUDA graph is being captured" : "the GPU has failed");
}

void reset(int64_t handle) {
  Workspace& workspace = find_any(handle);
  const std::lock_guard<std::mutex> lock(workspace.reading);
  forget_fault(workspace);
  workspace.host_calls = 0;
  workspace.waiting = Workspace::nobody();
  workspace.unmapped = false;
  workspace.asleep = false;
}

diagnosis::Finding poll(Workspace& workspace) {
  if (is_of_another_process(workspace)) return {};
  const std::lock_guard<std::mutex> lock(workspace.reading);
  if (workspace.finding.conclusive) return workspace.finding;
  if (workspace.unmapped) {
    diagnosis::look_at_record(workspace.blocks(), workspace.finding);
  } else if (diagnosis::look(workspace.blocks(), workspace.finding)) {
    workspace.found = true;
  }
  return workspace.finding;
}

diagnosis::Finding explain(Workspace& workspace) {
  diagnosis::Finding finding = poll(workspace);
  for (int tries = 0; tries < 20 && finding.code != protocol::FaultCode::none && !finding.conclusive; ++tries) {
    usleep(5000);
    finding = poll(workspace);
  }
  return finding;
}

uint32_t sharers(int64_t device) { return device >= 0 && device < kMaxDevices ? open_blocks[device].load() : 1; }

bool is_row(int64_t row_bytes) {
  return row_bytes > 0 && row_bytes % protocol::kVectorBytes == 0 &&
         row_bytes <= int64_t{protocol::kMaxRowVectors} * protocol::kVectorBytes;
}

namespace {

// Own rows of one-shot have places in slots only where a multicast brings them.
protocol::Shape in_group(const Workspace& workspace, protocol::Shape call) {
  const protocol::Group& group = workspace.params.group;
  return {group.ranks, call.tokens, call.vectors, group.multicast != nullptr};
}

}  // namespace

bool fits(const Workspace& workspace, int64_t strategy, protocol::Shape call) {
  return launch::fits(strategy == launch::kAuto ? workspace.settings.strategy : strategy, in_group(workspace, call),
                      workspace.table, workspace.slot_vectors);
}

launch::Cut cut(const Workspace& workspace, int64_t strategy, protocol::Shape call) {
  const Settings& s = workspace.settings;
  launch::Cut found = launch::cut(strategy == launch::kAuto ? s.strategy : strategy, in_group(workspace, call),
                                  workspace.table, workspace.slot_vectors);
  const auto set = [](uint32_t given, uint32_t* measured) {
    if (given != 0) *measured = given;
  };
  protocol::LaunchShape& shape = found.choice.shape;
  set(s.shape.cluster, &shape.cluster);
  set(s.shape.max_ctas, &shape.max_ctas);
  set(s.shape.batch, &shape.batch);
  set(s.shape.lag, &shape.lag);
  return found;
}

}  // namespace mnnvl_ar
