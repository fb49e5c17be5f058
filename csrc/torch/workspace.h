// Workspaces as the ops know them: by a small integer, since the stable ABI has no custom classes and Dynamo must not see one.
//
// Contract
//   * Handles are 1, 2, ... in order of creation in this process, alike on all ranks of a group, so that compiled code that holds
//     one is the same on every rank, where all ranks made the same workspaces. A handle is never used again.
//   * find() throws for a handle that is unknown, closed, asleep, of a forked parent, or of another device.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "protocol/call_params.h"
#include "torch/diagnosis.h"
#include "torch/strategy.h"

namespace mnnvl_ar {

struct Settings {
  int64_t device;  // CUDA device index, or -1: host
  int64_t rank;
  int64_t slot_bytes;
  int64_t deadline_ns;                    // 0: none
  int64_t strategy;                       // protocol::Strategy or kAuto
  int64_t pdl;                            // protocol::Pdl
  int64_t cluster, max_ctas, batch, lag;  // LaunchShape; win over the table's, 0 leaves it to that
  int64_t concurrent;                     // calls on other workspaces of the device may run at the same time
};

struct Workspace {
  pid_t owner;  // the process that made it; a forked child has its handle, but not the right to use it
  Settings settings;
  Table table;              // what "auto" goes by
  protocol::Params params;  // what does not change from call to call
  uint64_t slot_vectors;
  std::atomic<bool> closed = false;
  std::atomic<bool> asleep = false;  // addresses without memory
  std::atomic<uint32_t> graphs = 0;  // that hold our addresses (graphs.h)
  unsigned long long last_capture = 0;
  std::atomic<bool> busy = false;   // a thread is in a call
  std::atomic<bool> found = false;  // `finding` says what is wrong
  std::mutex reading;               // held by whoever reads or writes blocks outside of calls
  uint32_t launches = 0;            // counted by the thread that is in a call, and never again from the start
  Finding finding;
  uint32_t host_calls = 0;  // test builds: what a host counter would say
};

// `blocks`: each rank's block as mapped here, by rank. `multicast`: 0 without.
int64_t create(const Settings& settings, const std::vector<int64_t>& blocks, int64_t multicast, Table table);
// Ends the handle. Returns whether the blocks may be unmapped: not while captured graphs may run, unless `force`. If not, it may be
// asked again.
bool close(int64_t handle, bool force);
// Ops raise from here on; no call of this rank runs any more. With `end`, calls that wait end now, without their result.
void put_to_sleep(int64_t handle, bool end);
// The blocks have been filled anew: the fault is forgotten, and ops run.
void reset(int64_t handle);
bool is_of_another_process(const Workspace& workspace);
// Open workspaces on a device, those on one block counted once.
uint32_t sharers(int64_t device);
Workspace& find(int64_t handle, int64_t device);
// Throws if the workspace cannot take a call: of another process, closed or asleep.
void check_open(const Workspace& workspace, int64_t handle);
Workspace& find_any(int64_t handle);

bool is_row(int64_t row_bytes);
bool fits(const Workspace& workspace, protocol::Shape shape);
// How a call runs that asks for `strategy`, or kAuto: what the workspace was told wins over the table. Throws if it does not fit.
Pick choose(const Workspace& workspace, int64_t strategy, protocol::Shape shape);

}  // namespace mnnvl_ar
