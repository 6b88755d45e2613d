/// libFuzzer target of the qcow2 reader and writer: the input is an image, and the last bytes are what is done with it, or
/// that it is checked and repaired (on a disk as it came, so that one does not depend on the other).
#include <spdlog/spdlog.h>

#include "storage/block/memory_file.hpp"
#include "storage/qcow2/qcow2_image.hpp"

using namespace ring3;
using namespace ring3::storage;
using qcow2::Qcow2Image;

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  spdlog::set_level(spdlog::level::off);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t size) {
  constexpr std::size_t kOperations = 32;
  // Offsets far out make files grow, which takes time and shows nothing: the disk under them is full early.
  constexpr u64 kDisk = u64{512} << 10;
  if (size < kOperations) return 0;
  const std::vector<u8> bytes(data, data + size - kOperations);
  const u8* op = data + size - kOperations;
  const auto file = [&] { return std::make_unique<MemoryFile>(bytes, kDisk); };
  if ((op[0] & 2) != 0) {
    const auto repair = (op[0] & 4) != 0 ? qcow2::Repair::kAll : (op[0] & 8) != 0 ? qcow2::Repair::kLeaks : qcow2::Repair::kNone;
    if (auto image = Qcow2Image::open(file(), "fuzz", {repair != qcow2::Repair::kNone, true})) (void)(*image)->check(repair);
    return 0;
  }
  if (auto image = Qcow2Image::open(file(), "fuzz", {(op[0] & 1) != 0, false})) {
    Qcow2Image& i = **image;
    std::vector<u8> buffer(8192);
    for (std::size_t k = 1; k + 4 < kOperations; k += 4) {
      const u64 at = i.size() == 0 ? 0 : (u64{op[k + 1]} << 20 | u64{op[k + 2]} << 12 | u64{op[k + 3]} << 4) % i.size();
      const u64 n = std::min<u64>({i.size() - at, buffer.size(), 1 + u64{op[k + 3]} * 32});
      const auto part = std::span(buffer).first(n);
      Image::Extent e;
      switch (op[k] % 8) {
        case 0: (void)i.read(at, part); break;
        case 1: case 2: (void)i.write(at, std::span<const u8>(part)); break;
        case 3: (void)i.write_zeroes(at, n, true); break;
        case 4: (void)i.discard(at, n); break;
        case 5: (void)i.flush(); break;
        case 6: if (n != 0) (void)i.map(at, n, e); break;
        default:
          if (i.writable()) (void)i.create_snapshot("f", 0, 0);
          if (i.writable()) (void)i.apply_snapshot("f");
          if (i.writable()) (void)i.delete_snapshot("f");
      }
    }
    (void)i.snapshots();
    (void)i.close();
  }
  return 0;
}
