// torch.ops.mnnvl_ar._*: what mnnvl_ar.Workspace is made of. Private; every argument and result has a name.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "torch/checks.h"
#include "torch/workspace.h"

namespace mnnvl_ar {
namespace {

using Numbers = std::vector<int64_t>;

launch::Table table_of(int64_t one_shot_bytes, Numbers row_bytes, Numbers max_tokens, Numbers strategies,
                       Numbers clusters, Numbers max_ctas, Numbers batches, Numbers lags, Numbers pdls) {
  return launch::Table({one_shot_bytes, std::move(row_bytes), std::move(max_tokens), std::move(strategies),
                        std::move(clusters), std::move(max_ctas), std::move(batches), std::move(lags),
                        std::move(pdls)});
}

int64_t workspace_create(int64_t rank, Numbers blocks, int64_t multicast, int64_t slot_bytes, int64_t device,
                         int64_t deadline_ns, int64_t hold_ns, int64_t strategy, int64_t pdl, int64_t cluster,
                         int64_t max_ctas, int64_t batch, int64_t lag, bool concurrent, int64_t table_one_shot_bytes,
                         Numbers table_row_bytes, Numbers table_max_tokens, Numbers table_strategies,
                         Numbers table_clusters, Numbers table_max_ctas, Numbers table_batches, Numbers table_lags,
                         Numbers table_pdls, int64_t link_hop_clocks, int64_t link_queued_hop_clocks,
                         int64_t link_burst_bytes_per_clock, int64_t link_paced_bytes_per_clock,
                         int64_t link_paced_from_bytes) {
  const auto word = [](int64_t value, const char* name, int64_t least) {
    STD_TORCH_CHECK(value >= least && value <= INT32_MAX, name, ": is ", value, ", wanted ", least, " to ", INT32_MAX);
    return static_cast<uint32_t>(value);
  };
  const Settings settings{
      .device = device,
      .strategy = strategy,
      .pdl = pdl,
      .shape = {.cluster = word(cluster, "cluster", 0),
                .max_ctas = word(max_ctas, "max_ctas", 0),
                .batch = word(batch, "batch", 0),
                .lag = word(lag, "lag", 0)},
      .concurrent = concurrent,
      .link = {.hop_clocks = word(link_hop_clocks, "link_hop_clocks", 0),
               .queued_hop_clocks = word(link_queued_hop_clocks, "link_queued_hop_clocks", 0),
               .burst_bytes_per_clock = word(link_burst_bytes_per_clock, "link_burst_bytes_per_clock", 1),
               .paced_bytes_per_clock = word(link_paced_bytes_per_clock, "link_paced_bytes_per_clock", 1),
               .paced_from_bytes = word(link_paced_from_bytes, "link_paced_from_bytes", 0)}};
  return create(settings, word(rank, "rank", 0), blocks, multicast, static_cast<uint64_t>(slot_bytes),
                {static_cast<uint64_t>(deadline_ns), static_cast<uint64_t>(hold_ns), 0},
                table_of(table_one_shot_bytes, std::move(table_row_bytes), std::move(table_max_tokens),
                         std::move(table_strategies), std::move(table_clusters), std::move(table_max_ctas),
                         std::move(table_batches), std::move(table_lags), std::move(table_pdls)));
}

bool workspace_close(int64_t handle, bool force) { return close(handle, force); }

void workspace_end_calls(int64_t handle) { end_calls(handle); }

int64_t workspace_graphs(int64_t handle) { return graphs_of(handle); }

void workspace_sleep(int64_t handle, bool end) { put_to_sleep(handle, end); }

void workspace_reset(int64_t handle) { reset(handle); }

void workspace_deadline(int64_t handle, int64_t deadline_ns) {
  set_deadline(handle, static_cast<uint64_t>(deadline_ns));
}

void workspace_processors(int64_t handle, int64_t processors) {
  STD_TORCH_CHECK(processors >= 0 && processors <= INT32_MAX, "processors: is ", processors, ", wanted 0 to ",
                  INT32_MAX);
  set_processors(handle, static_cast<uint32_t>(processors));
}

bool workspace_has_fault(int64_t handle) { return has_fault(handle); }

void workspace_answer(int64_t handle) { answer(handle); }

// A diagnosis::Loss.
int64_t workspace_lose(int64_t handle, int64_t peer, int64_t how, int64_t next) {
  const uint32_t first = next < 0 ? protocol::kNoEpoch : static_cast<uint32_t>(next);
  return static_cast<int64_t>(lose(handle, static_cast<uint32_t>(peer), static_cast<diagnosis::Departure>(how), first));
}

int64_t workspace_epoch(int64_t handle) {
  const uint32_t epoch = epoch_of(handle);
  return epoch == protocol::kNoEpoch ? -1 : int64_t{epoch};
}

protocol::Shape shape_of(int64_t ranks, int64_t tokens, int64_t row_bytes) {
  return {static_cast<uint32_t>(ranks), static_cast<uint32_t>(tokens),
          static_cast<uint32_t>(row_bytes / protocol::kVectorBytes)};
}

bool workspace_fits(int64_t handle, int64_t tokens, int64_t row_bytes, int64_t strategy) {
  const Workspace& w = find_any(handle);
  return tokens >= 0 && tokens <= INT32_MAX && is_row(row_bytes) &&
         fits(w, strategy, shape_of(w.params.group.ranks, tokens, row_bytes));
}

void check_row(int64_t row_bytes) {
  STD_TORCH_CHECK(is_row(row_bytes), "hidden: rows of ", row_bytes, " bytes, wanted a multiple of 16 bytes up to ",
                  protocol::kMaxRowVectors * protocol::kVectorBytes);
}

// strategy, cluster, max_ctas, batch, lag, pdl, pieces, rows (of a piece).
std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> workspace_choice(int64_t handle,
                                                                                                    int64_t tokens,
                                                                                                    int64_t row_bytes,
                                                                                                    int64_t strategy) {
  const Workspace& w = find_any(handle);
  check_row(row_bytes);
  STD_TORCH_CHECK(tokens >= 0 && tokens <= INT32_MAX, "tokens: is ", tokens, ", wanted 0 to ", INT32_MAX);
  const launch::Cut found = cut(w, strategy, shape_of(w.params.group.ranks, tokens, row_bytes));
  const protocol::LaunchShape& s = found.choice.shape;
  return {static_cast<int64_t>(found.choice.strategy), s.cluster,          s.max_ctas,       s.batch, s.lag,
          static_cast<int64_t>(found.choice.pdl),      found.pieces.count, found.pieces.rows};
}

// `max_bytes`: of a block, at most; 0: as much as is of use.
int64_t workspace_slot_bytes(int64_t ranks, int64_t tokens, int64_t row_bytes, int64_t strategy, bool own_too,
                             int64_t max_bytes, int64_t table_one_shot_bytes, Numbers table_row_bytes,
                             Numbers table_max_tokens, Numbers table_strategies, Numbers table_clusters,
                             Numbers table_max_ctas, Numbers table_batches, Numbers table_lags, Numbers table_pdls) {
  check_row(row_bytes);
  STD_TORCH_CHECK(tokens >= 1 && tokens <= INT32_MAX, "max_tokens: is ", tokens, ", wanted 1 to ", INT32_MAX);
  STD_TORCH_CHECK(ranks >= 1 && ranks <= protocol::kMaxRanks, "group: has ", ranks, " ranks, wanted 1 to ",
                  protocol::kMaxRanks);
  const launch::Table table =
      table_of(table_one_shot_bytes, std::move(table_row_bytes), std::move(table_max_tokens),
               std::move(table_strategies), std::move(table_clusters), std::move(table_max_ctas),
               std::move(table_batches), std::move(table_lags), std::move(table_pdls));
  protocol::Shape largest = shape_of(ranks, tokens, row_bytes);
  largest.own_too = own_too;
  const auto least = static_cast<int64_t>(launch::least_vectors(largest) * protocol::kVectorBytes);
  const uint64_t useful = std::min(launch::useful_vectors(strategy, largest, table) * protocol::kVectorBytes,
                                   protocol::kMaxSlotBytes - protocol::kVectorBytes);
  if (max_bytes == 0) return static_cast<int64_t>(useful);
  STD_TORCH_CHECK(max_bytes >= static_cast<int64_t>(protocol::block_bytes(least)), "max_bytes: is ", max_bytes,
                  ", wanted at least ", protocol::block_bytes(least), " for a row of ", row_bytes, " bytes of ", ranks,
                  " ranks");
  const uint64_t bound = (max_bytes - protocol::kControlBytes) / protocol::kSlots;
  return static_cast<int64_t>(std::min(useful, bound / protocol::kVectorBytes * protocol::kVectorBytes));
}

// nbytes, control_bytes, board_offset, board_bytes, probe_offset, broken_offset, sentinel, no_epoch, asleep, max_ranks.
std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> block_layout(
    int64_t slot_bytes) {
  const auto number = [](uint64_t value) { return static_cast<int64_t>(value); };
  return {number(protocol::block_bytes(static_cast<uint64_t>(slot_bytes))),
          number(protocol::kControlBytes),
          number(protocol::kBoardOffset),
          number(protocol::kBoardBytes),
          number(protocol::kProbeOffset),
          number(protocol::kBrokenOffset),
          protocol::kSentinel,
          protocol::kNoEpoch,
          static_cast<int64_t>(protocol::FaultCode::asleep),
          protocol::kMaxRanks};
}

// word, offsets, nbytes: areas of a block that nobody writes.
std::tuple<int64_t, Numbers, Numbers> block_canaries() {
  Numbers offsets, nbytes;
  for (const diagnosis::Area& area : diagnosis::kCanaries) {
    offsets.push_back(static_cast<int64_t>(area.offset));
    nbytes.push_back(static_cast<int64_t>(area.bytes));
  }
  return {protocol::kCanary, offsets, nbytes};
}

// code, relayed, rank, peer, call_number, waited_ns, when_ns, offset, text, call, peer_call: all of one look, since recover() may
// come in between two. code 0: nothing is wrong. peer, call_number: -1 if not known.
std::tuple<int64_t, bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, std::string, std::string, std::string>
workspace_fault(int64_t handle, bool explained) {
  Workspace& workspace = find_any(handle);
  const diagnosis::Finding f = explained ? explain(workspace) : poll(workspace);
  return {static_cast<int64_t>(f.code),
          f.relayed,
          f.rank,
          f.peer < protocol::kMaxRanks ? int64_t{f.peer} : -1,
          f.call.epoch == protocol::kNoEpoch || f.code == diagnosis::FaultCode::asleep ? -1 : int64_t{f.call.number},
          static_cast<int64_t>(f.waited_ns),
          f.when_ns,
          static_cast<int64_t>(f.offset),
          text_of(f),
          name_of_call(f.call),
          name_of_call(f.peer_call)};
}

#ifdef MNNVL_AR_TEST_BUILD
void sabotage(int64_t handle, int64_t broken, int64_t frozen_dirty, int64_t delay_seed, int64_t delay_ns) {
  find_any(handle).params.sabotage = {static_cast<uint32_t>(broken), 0, static_cast<uint32_t>(frozen_dirty),
                                      static_cast<uint32_t>(delay_seed), static_cast<uint32_t>(delay_ns)};
}
#endif

}  // namespace
}  // namespace mnnvl_ar

// mnnvl_ar/tuning/table.py, Table.columns().
#define MNNVL_AR_TABLE                                                                                      \
  "int table_one_shot_bytes, int[] table_row_bytes, int[] table_max_tokens, int[] table_strategies, int[] " \
  "table_clusters, "                                                                                        \
  "int[] table_max_ctas, int[] table_batches, int[] table_lags, int[] table_pdls"

STABLE_TORCH_LIBRARY(mnnvl_ar, m) {
  m.def(
      "_workspace_create(int rank, int[] blocks, int multicast, int slot_bytes, int device, *, int deadline_ns, "
      "int hold_ns, "
      "int strategy, int pdl, int cluster, int max_ctas, int batch, int lag, bool concurrent, " MNNVL_AR_TABLE
      ", int link_hop_clocks, int link_queued_hop_clocks, int link_burst_bytes_per_clock, int "
      "link_paced_bytes_per_clock, "
      "int link_paced_from_bytes) -> int");
  m.def("_workspace_close(int workspace, bool force=False) -> bool");
  m.def("_workspace_end_calls(int workspace) -> ()");
  m.def("_workspace_graphs(int workspace) -> int");
  m.def("_workspace_sleep(int workspace, bool end) -> ()");
  m.def("_workspace_reset(int workspace) -> ()");
  m.def("_workspace_deadline(int workspace, int deadline_ns) -> ()");
  m.def("_workspace_processors(int workspace, int processors) -> ()");
  m.def("_workspace_has_fault(int workspace) -> bool");
  m.def("_workspace_answer(int workspace) -> ()");
  m.def("_workspace_lose(int workspace, int peer, int how, int next) -> int");
  m.def("_workspace_epoch(int workspace) -> int");
  m.def("_workspace_fits(int workspace, int tokens, int row_bytes, int strategy=-1) -> bool");
  m.def(
      "_workspace_choice(int workspace, int tokens, int row_bytes, int strategy=-1) -> "
      "(int strategy, int cluster, int max_ctas, int batch, int lag, int pdl, int pieces, int rows)");
  m.def(
      "_workspace_slot_bytes(int ranks, int tokens, int row_bytes, int strategy, *, bool own_too, int "
      "max_bytes, " MNNVL_AR_TABLE ") -> int");
  m.def(
      "_workspace_fault(int workspace, bool explained=True) -> (int code, bool relayed, int rank, int peer, int "
      "call_number, "
      "int waited_ns, int when_ns, int offset, str text, str call, str peer_call)");
  m.def(
      "_block_layout(int slot_bytes) -> (int nbytes, int control_bytes, int board_offset, int board_bytes, "
      "int probe_offset, int broken_offset, int sentinel, int no_epoch, int asleep, int max_ranks)");
  m.def("_block_canaries() -> (int word, int[] offsets, int[] nbytes)");
#ifdef MNNVL_AR_TEST_BUILD
  m.def("_sabotage(int workspace, int broken, int frozen_dirty, int delay_seed, int delay_ns) -> ()");
#endif
}

#undef MNNVL_AR_TABLE

STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CompositeExplicitAutograd, m) {
  m.impl("_workspace_create", TORCH_BOX(&mnnvl_ar::workspace_create));
  m.impl("_workspace_close", TORCH_BOX(&mnnvl_ar::workspace_close));
  m.impl("_workspace_end_calls", TORCH_BOX(&mnnvl_ar::workspace_end_calls));
  m.impl("_workspace_graphs", TORCH_BOX(&mnnvl_ar::workspace_graphs));
  m.impl("_workspace_sleep", TORCH_BOX(&mnnvl_ar::workspace_sleep));
  m.impl("_workspace_reset", TORCH_BOX(&mnnvl_ar::workspace_reset));
  m.impl("_workspace_deadline", TORCH_BOX(&mnnvl_ar::workspace_deadline));
  m.impl("_workspace_processors", TORCH_BOX(&mnnvl_ar::workspace_processors));
  m.impl("_workspace_has_fault", TORCH_BOX(&mnnvl_ar::workspace_has_fault));
  m.impl("_workspace_answer", TORCH_BOX(&mnnvl_ar::workspace_answer));
  m.impl("_workspace_lose", TORCH_BOX(&mnnvl_ar::workspace_lose));
  m.impl("_workspace_epoch", TORCH_BOX(&mnnvl_ar::workspace_epoch));
  m.impl("_workspace_fits", TORCH_BOX(&mnnvl_ar::workspace_fits));
  m.impl("_workspace_choice", TORCH_BOX(&mnnvl_ar::workspace_choice));
  m.impl("_workspace_slot_bytes", TORCH_BOX(&mnnvl_ar::workspace_slot_bytes));
  m.impl("_workspace_fault", TORCH_BOX(&mnnvl_ar::workspace_fault));
  m.impl("_block_layout", TORCH_BOX(&mnnvl_ar::block_layout));
  m.impl("_block_canaries", TORCH_BOX(&mnnvl_ar::block_canaries));
#ifdef MNNVL_AR_TEST_BUILD
  m.impl("_sabotage", TORCH_BOX(&mnnvl_ar::sabotage));
#endif
}
