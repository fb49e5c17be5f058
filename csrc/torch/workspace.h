// Workspaces as the ops know them: by a small integer, since the stable ABI has no custom classes and Dynamo must not see one.
//
// Contract
//   * Handles are 1, 2, ... in order of creation in this process, alike on all ranks of a group, so that compiled code that holds
//     one is the same on every rank, where all ranks made the same workspaces. A handle is never used again.
//   * find() throws for a handle that is unknown, closed, asleep, of a forked parent, or of another device.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "diagnosis/diagnosis.h"
#include "launch/pace.h"
#include "launch/strategy.h"
#include "protocol/params.h"

namespace mnnvl_ar {

struct Settings {
  int64_t device;               // CUDA device index, or -1: host
  int64_t strategy;             // protocol::Strategy or launch::kAuto, for calls that do not say
  int64_t pdl;                  // protocol::Pdl or launch::kAuto, for calls that do not say
  protocol::LaunchShape shape;  // wins over the table's; 0 leaves it to that
  bool concurrent;              // calls on other workspaces of the device may run at the same time
  launch::Link link;
  uint32_t processors = 0;  // that calls may count on, as ranks have agreed; 0: all of the device
};

struct Workspace {
  pid_t owner;  // the process that made it; a forked child has its handle, but not the right to use it
  Settings settings;
  launch::Table table;      // what "auto" goes by
  protocol::Params params;  // `group`; the rest is each call's
  uint64_t slot_vectors;
  std::atomic<bool> closed = false;
  std::atomic<bool> asleep = false;  // or on its way: no call may begin
  std::atomic<bool> unmapped =
      false;  // asleep, or closed and no graph is left: the addresses are without memory; set under `reading`
  std::atomic<uint32_t> graphs = 0;  // that hold our addresses (graphs.h)
  unsigned long long last_capture = 0;
  std::atomic<bool> busy = false;                           // a thread is in a call
  std::atomic<std::thread::id> caller = std::thread::id();  // that thread
  std::atomic<bool> found = false;                          // `finding` says what is wrong
  std::mutex reading;                                       // held by whoever reads or writes blocks outside of calls
  diagnosis::Finding finding;
  uint32_t last_epoch = protocol::kNoEpoch;  // of the next call when the memory went, under `reading`
  std::array<uint32_t, protocol::kMaxRanks> waiting = nobody();  // diagnosis::lose(), by peer
  uint32_t launches =
      0;  // numbers launches, by the thread that is in a call (protocol::Launch::number). No index into the ring
  uint32_t host_calls = 0;  // test builds: what a host counter would say

  static constexpr std::array<uint32_t, protocol::kMaxRanks> nobody() {
    std::array<uint32_t, protocol::kMaxRanks> none{};
    none.fill(protocol::kNoEpoch);
    return none;
  }
  diagnosis::Blocks blocks() const { return {params, slot_vectors, settings.device}; }
};

// `blocks`: each rank's block as mapped here, by rank. `multicast`: 0 without.
int64_t create(const Settings& settings, uint32_t rank, const std::vector<int64_t>& blocks, int64_t multicast,
               uint64_t slot_bytes, protocol::Orders orders, launch::Table table);
// Ends the handle. Returns whether the blocks' memory may be given back: not while captured graphs may run, unless `force`, which
// also ends a call that waits in another thread. If not, it may be asked again.
bool close(int64_t handle, bool force);
// Calls that wait end now, without their result: for who is to close or recover, and waits for another thread that waits for them.
// Nothing if there is no memory here any more.
void end_calls(int64_t handle);
// Captured graphs that hold the addresses of the blocks. While there are any, something has to be mapped there.
uint32_t graphs_of(int64_t handle);
// Ops raise from here on; no call of this rank runs any more. With `end`, calls that wait end now, without their result.
void put_to_sleep(int64_t handle, bool end);
// The blocks have been filled anew: the fault is forgotten, and ops run.
void reset(int64_t handle);
// For calls from now on and those that wait, captured ones too. 0: none.
void set_deadline(int64_t handle, uint64_t deadline_ns);
// What ranks have agreed on, for calls from now on. 0: all of the device.
void set_processors(int64_t handle, uint32_t processors);
// Whether a call of this rank has left a record: one look at host memory.
bool has_fault(int64_t handle);
// The host has heard of it: the call that holds its stream for that ends.
void answer(int64_t handle);
// A peer is gone: diagnosis::lose(). Also done if there is no memory here any more. Takes workspace.reading.
diagnosis::Loss lose(int64_t handle, uint32_t peer, diagnosis::Departure how, uint32_t next);
// Of this rank's next call, now or when it closed or slept; kNoEpoch if that is not known.
uint32_t epoch_of(int64_t handle);
// Workspaces on a device whose calls may run, those on one block counted once.
uint32_t sharers(int64_t device);
Workspace& find(int64_t handle, int64_t device);
Workspace& find_any(int64_t handle);
// Throws if the workspace cannot take a call: of another process, closed or asleep.
void check_open(const Workspace& workspace, int64_t handle);

// What is wrong with the workspace now. Takes workspace.reading.
diagnosis::Finding poll(Workspace& workspace);
// The same for a call that has just failed or is refused; waits some milliseconds for a peer's note if that may help.
diagnosis::Finding explain(Workspace& workspace);

bool is_row(int64_t row_bytes);
// `call`: tokens and vectors count. `strategy`: what the call asks for, or kAuto.
bool fits(const Workspace& workspace, int64_t strategy, protocol::Shape call);
// How a call runs that asks for `strategy`, or kAuto: what the workspace was given wins over the table. Throws if it does not fit.
launch::Cut cut(const Workspace& workspace, int64_t strategy, protocol::Shape call);

}  // namespace mnnvl_ar
