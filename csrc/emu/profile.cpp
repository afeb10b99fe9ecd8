// How well accesses of one block are laid out, per place in the code: shared-memory wavefronts over
// the fewest possible (1 is free of bank conflicts), 32 byte sectors of global memory over the
// fewest. Counts, not times.
#include <link.h>
#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <unordered_map>

#include "emu/runtime.h"

namespace rlir::emu {
namespace {

struct Request {
  const void* pc;
  uint32_t occurrence, warp;  // the n-th time that this warp came by
  uint64_t address;
  uint32_t bytes;
  int lane;
  bool read, shared;
};

std::vector<Request> requests_;
std::map<std::pair<int, const void*>, uint32_t> occurrences;
uintptr_t begin_of_image, end_of_image;

// Lanes of one access that the hardware serves together: 128 bytes' worth.
void count_wavefronts(const std::vector<const Request*>& lanes, double* wavefronts,
                      double* fewest) {
  const uint32_t bytes = lanes[0]->bytes;
  const int together = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
  for (int phase = 0; phase < 32 / together; ++phase) {
    std::map<uint64_t, std::set<uint64_t>> banks;
    for (const Request* a : lanes) {
      if (a->lane / together != phase) continue;
      const uint64_t last = (a->address + a->bytes - 1) / 4;
      for (uint64_t word = a->address / 4; word <= last; ++word) banks[word % 32].insert(word);
    }
    size_t most = 0;
    for (const auto& [bank, words] : banks) most = std::max(most, words.size());
    *wavefronts += static_cast<double>(most);
    *fewest += banks.empty() ? 0 : 1;
  }
}

void count_sectors(const std::vector<const Request*>& lanes, double* sectors, double* fewest) {
  std::set<uint64_t> touched, bytes;
  for (const Request* a : lanes) {
    for (uint64_t i = a->address; i < a->address + a->bytes; ++i) {
      bytes.insert(i);
      touched.insert(i / 32);
    }
  }
  *sectors += static_cast<double>(touched.size());
  *fewest += static_cast<double>((bytes.size() + 31) / 32);
}

int find_image(struct dl_phdr_info* info, size_t, void*) {
  uintptr_t begin = UINTPTR_MAX, end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    const uintptr_t at = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    begin = std::min(begin, at);
    end = std::max<uintptr_t>(end, at + info->dlpi_phdr[i].p_memsz);
  }
  const uintptr_t own = reinterpret_cast<uintptr_t>(&find_image);
  if (own < begin || own >= end) return 0;
  begin_of_image = info->dlpi_addr;
  end_of_image = end;
  return 1;
}
__attribute__((constructor)) void remember_image() { dl_iterate_phdr(find_image, nullptr); }

}  // namespace

uintptr_t image_begin() { return begin_of_image; }
uintptr_t image_end() { return end_of_image; }

void clear_profile() {
  requests_.clear();
  occurrences.clear();
}

void record_access(const void* p, size_t bytes, bool read, bool shared, const void* pc) {
  requests_.push_back({pc, occurrences[{current->linear, pc}]++,
                       static_cast<uint32_t>(current->linear / 32), reinterpret_cast<uint64_t>(p),
                       static_cast<uint32_t>(bytes), current->lane, read, shared});
}

// A line per place: "@pc space read|write bytes requests ratio".
const char* profile_text() {
  static std::string text;
  text.clear();
  std::map<const void*, std::map<std::pair<uint32_t, uint32_t>, std::vector<const Request*>>>
      places;
  for (const Request& a : requests_) places[a.pc][{a.warp, a.occurrence}].push_back(&a);
  for (const auto& [pc, requests] : places) {
    double done = 0, fewest = 0;
    const Request& any = *requests.begin()->second[0];
    for (const auto& [key, lanes] : requests) {
      (any.shared ? count_wavefronts : count_sectors)(lanes, &done, &fewest);
    }
    char line[160];
    snprintf(line, sizeof line, "@%zx %s %s %u %zu %.3f\n",
             static_cast<size_t>(reinterpret_cast<uintptr_t>(pc) - begin_of_image),
             any.shared ? "shared" : "global", any.read ? "read" : "write", any.bytes,
             requests.size(), done / fewest);
    text += line;
  }
  return text.c_str();
}

}  // namespace rlir::emu
