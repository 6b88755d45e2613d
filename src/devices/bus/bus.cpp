#include "devices/bus/bus.hpp"

#include <algorithm>
#include <cstdio>

namespace ring3::devices {

Status Bus::add(u64 start, u64 size, std::shared_ptr<Device> device, std::string name) {
  char where[64];
  std::snprintf(where, sizeof where, " at %#llx, size %#llx", static_cast<unsigned long long>(start),
                static_cast<unsigned long long>(size));
  const u64 highest = limit_ - 1;  // limit 0 wraps to 2^64-1: the whole space
  if (size == 0 || start > highest || size - 1 > highest - start) {
    return Error::of(EINVAL, "device " + name + where + " does not fit in the address space");
  }
  const u64 last = start + (size - 1);
  auto next = std::upper_bound(ranges_.begin(), ranges_.end(), start,
                               [](u64 a, const Range& r) { return a < r.start; });
  if (next != ranges_.end() && next->start <= last) {
    return Error::of(EEXIST, "device " + name + where + " overlaps " + next->name);
  }
  if (next != ranges_.begin() && std::prev(next)->last >= start) {
    return Error::of(EEXIST, "device " + name + where + " overlaps " + std::prev(next)->name);
  }
  ranges_.insert(next, Range{start, last, std::move(device), std::move(name)});
  return Ok{};
}

const Bus::Range* Bus::find(u64 address) const {
  auto next = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                               [](u64 a, const Range& r) { return a < r.start; });
  if (next == ranges_.begin()) return nullptr;
  const Range& r = *std::prev(next);
  return address <= r.last ? &r : nullptr;
}

bool Bus::read(u64 address, std::span<u8> data) const {
  std::fill(data.begin(), data.end(), u8{0xff});
  bool taken = false;
  while (!data.empty()) {
    const std::size_t n = std::min<std::size_t>(data.size(), 8);
    if (const Range* r = find(address)) {
      r->device->read(address - r->start, data.first(n));
      taken = true;
    }
    address += n;
    data = data.subspan(n);
  }
  return taken;
}

bool Bus::write(u64 address, std::span<const u8> data) const {
  bool taken = false;
  while (!data.empty()) {
    const std::size_t n = std::min<std::size_t>(data.size(), 8);
    if (const Range* r = find(address)) {
      r->device->write(address - r->start, data.first(n));
      taken = true;
    }
    address += n;
    data = data.subspan(n);
  }
  return taken;
}

}  // namespace ring3::devices
