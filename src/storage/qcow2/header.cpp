#include <algorithm>
#include <cstring>

#include "base/checked.hpp"
#include "storage/qcow2/format.hpp"

namespace ring3::storage::qcow2 {
namespace {

std::string visible(const std::string& text) {
  std::string out;
  for (const char c : text.substr(0, 80)) out += c >= 0x20 && c < 0x7f ? c : '?';
  return out;
}


Status check_features(const Header& h, const std::string& name) {
  if ((h.incompatible & kExternalData) != 0) {
    return Error::of(ENOTSUP, name + " keeps its data in another file, which ring3 does not open; convert it with qemu-img");
  }
  const u64 unknown = h.incompatible & ~(kDirty | kCorrupt | kCompressionType | kExtendedL2);
  if (unknown != 0) {
    return Error::of(ENOTSUP, name + " uses a qcow2 feature that ring3 does not know (incompatible feature bit " +
                                  std::to_string(__builtin_ctzll(unknown)) + ")");
  }
  if (h.compression > 1) return Error::of(ENOTSUP, name + ": compression type " + std::to_string(h.compression) + " is not known");
  if (((h.incompatible & kCompressionType) != 0) != (h.compression != 0)) {
    return Error::of(EINVAL, name + ": the compression type and its feature bit contradict each other");
  }
  if (h.extended_l2() && h.cluster_bits < 14) {
    return Error::of(EINVAL, name + ": extended L2 entries want clusters of 16 KiB or more");
  }
  return Ok{};
}

// The tables that the header names: within the file, whole clusters, apart.
Status check_places(const Header& h, u64 file_size, const std::string& name) {
  struct Place {
    const char* what;
    u64 start, length;
    bool required;
  };
  const Place places[] = {
      {"the L1 table", h.l1_offset, u64{h.l1_size} * 8, true},
      {"the refcount table", h.refcount_table_offset, u64{h.refcount_table_clusters} << h.cluster_bits, true},
      {"the snapshot table", h.snapshots_offset, h.snapshot_count != 0 ? u64{1} : 0, h.snapshot_count != 0},
  };
  std::vector<std::pair<u64, u64>> taken{{0, h.cluster_size()}};
  for (const Place& p : places) {
    if (p.length == 0) continue;
    if (h.in_cluster(p.start) != 0) return Error::of(EINVAL, name + ": " + p.what + " stands at no whole cluster");
    if (!range_within(p.start, p.length, h.round_up(file_size))) {
      return Error::of(EINVAL, name + ": " + p.what + " lies outside the file");
    }
    const u64 end = p.start + h.round_up(p.length);
    for (const auto& [from, to] : taken) {
      if (p.start < to && from < end) return Error::of(EINVAL, name + ": " + p.what + " overlaps other metadata");
    }
    taken.push_back({p.start, end});
  }
  return Ok{};
}

}  // namespace

bool plain_path(const std::string& name) {
  if (name.empty() || name.find('\0') != std::string::npos) return false;
  // A colon before the first slash makes a protocol of it.
  const auto colon = name.find(':');
  const auto slash = name.find('/');
  return colon == std::string::npos || (slash != std::string::npos && slash < colon);
}

Result<Header> Header::read(File& file, const std::string& name) {
  const i64 file_size = file.size();
  if (file_size < 0) return Error::from_errno(name, static_cast<int>(-file_size));
  u8 b[112] = {};
  if (const int r = file.read(0, std::span<u8>(b)); r < 0) return Error::from_errno(name, -r);
  if (file_size < 72 || get32(b) != kMagic) return Error::of(EINVAL, name + " is no qcow2 image");
  Header h;
  h.version = get32(b + 4);
  if (h.version != 2 && h.version != 3) {
    return Error::of(ENOTSUP, name + " is qcow2 version " + std::to_string(h.version) + "; versions 2 and 3 are known");
  }
  const u64 backing_offset = get64(b + 8);
  const u32 backing_size = get32(b + 16);
  h.cluster_bits = get32(b + 20);
  h.size = get64(b + 24);
  const u32 crypt = get32(b + 32);
  h.l1_size = get32(b + 36);
  h.l1_offset = get64(b + 40);
  h.refcount_table_offset = get64(b + 48);
  h.refcount_table_clusters = get32(b + 56);
  h.snapshot_count = get32(b + 60);
  h.snapshots_offset = get64(b + 64);
  h.header_length = 72;
  if (h.cluster_bits < kMinClusterBits || h.cluster_bits > kMaxClusterBits) {
    return Error::of(EINVAL, name + ": clusters of 2^" + std::to_string(h.cluster_bits) + " bytes are outside 2^9 to 2^21");
  }
  if (h.version >= 3) {
    if (file_size < 104) return Error::of(EINVAL, name + ": the header is cut off");
    h.incompatible = get64(b + 72);
    h.compatible = get64(b + 80);
    h.autoclear = get64(b + 88);
    h.refcount_order = get32(b + 96);
    h.header_length = get32(b + 100);
    if (h.header_length < 104 || h.header_length % 8 != 0 || h.header_length > h.cluster_size()) {
      return Error::of(EINVAL, name + ": a header of " + std::to_string(h.header_length) + " bytes cannot be");
    }
    if (h.header_length > 104) h.compression = b[104];
  }
  if (crypt != 0) return Error::of(ENOTSUP, name + " is encrypted, which ring3 does not read; convert it with qemu-img");
  if (auto r = check_features(h, name); !r) return r.error();
  if (h.refcount_order > 6) return Error::of(EINVAL, name + ": refcounts of 2^" + std::to_string(h.refcount_order) + " bits cannot be");
  if (h.size > u64{1} << 62) return Error::of(EINVAL, name + ": the disk's size cannot be");
  if (u64{h.l1_size} * 8 > kMaxL1Bytes) return Error::of(EFBIG, name + ": the L1 table is too large");
  if (h.l1_needed(h.size) > h.l1_size) return Error::of(EINVAL, name + ": the L1 table is too small for the disk's size");
  if (h.refcount_table_clusters == 0 || (u64{h.refcount_table_clusters} << h.cluster_bits) > kMaxRefcountTableBytes) {
    return Error::of(EINVAL, name + ": a refcount table of " + std::to_string(h.refcount_table_clusters) + " clusters cannot be");
  }
  if (h.snapshot_count > kMaxSnapshots) return Error::of(EFBIG, name + " has too many snapshots");
  if (auto r = check_places(h, static_cast<u64>(file_size), name); !r) return r.error();

  // The rest of the first cluster: extensions, and the backing file's name.
  std::vector<u8> first(h.cluster_size());
  if (const int r = file.read(0, std::span<u8>(first)); r < 0) return Error::from_errno(name, -r);
  u64 end = first.size();
  if (backing_offset != 0) {
    if (backing_size > kMaxBackingName || !range_within(backing_offset, backing_size, first.size()) ||
        backing_offset < h.header_length) {
      return Error::of(EINVAL, name + ": the backing file's name lies outside the header");
    }
    h.backing_file.assign(reinterpret_cast<const char*>(first.data()) + backing_offset, backing_size);
    end = backing_offset;
  } else if (backing_size != 0) {
    return Error::of(EINVAL, name + ": a backing file's name without a place");
  }
  u64 at = h.header_length;
  while (at + 8 <= end) {
    Extension e;
    e.type = get32(&first[at]);
    const u32 length = get32(&first[at + 4]);
    at += 8;
    if (e.type == kExtEnd) break;
    if (!range_within(at, length, end)) return Error::of(EINVAL, name + ": a header extension is cut off");
    e.data.assign(first.begin() + static_cast<long>(at), first.begin() + static_cast<long>(at + length));
    at += (u64{length} + 7) & ~u64{7};
    if (e.type == kExtBackingFormat) {
      h.backing_format.assign(e.data.begin(), e.data.end());
    } else if (e.type == kExtEncryption || e.type == kExtDataFile) {
      return Error::of(ENOTSUP, name + ": a header extension asks for what ring3 does not open (encryption or an external data file)");
    } else if (e.type != kExtFeatureNames) {
      h.extensions.push_back(std::move(e));
    }
  }
  if (!h.backing_file.empty() && !plain_path(h.backing_file)) {
    return Error::of(ENOTSUP, name + ": the backing file '" + visible(h.backing_file) + "' is no plain local file");
  }
  return h;
}

Result<std::vector<u8>> Header::serialize() const {
  std::vector<u8> b(cluster_size());
  const u32 length = version >= 3 ? std::max<u32>(header_length, 112) : 72;
  put32(&b[0], kMagic);
  put32(&b[4], version);
  put32(&b[20], cluster_bits);
  put64(&b[24], size);
  put32(&b[36], l1_size);
  put64(&b[40], l1_offset);
  put64(&b[48], refcount_table_offset);
  put32(&b[56], refcount_table_clusters);
  put32(&b[60], snapshot_count);
  put64(&b[64], snapshots_offset);
  if (version >= 3) {
    put64(&b[72], incompatible);
    put64(&b[80], compatible);
    put64(&b[88], autoclear);
    put32(&b[96], refcount_order);
    put32(&b[100], length);
    b[104] = compression;
  }
  u64 at = length;
  bool fits = at <= b.size();
  const auto extension = [&](u32 type, std::span<const u8> data) {
    const u64 padded = (data.size() + 7) & ~u64{7};
    if (!fits || !range_within(at, 8 + padded, b.size())) {
      fits = false;
      return;
    }
    put32(&b[at], type);
    put32(&b[at + 4], static_cast<u32>(data.size()));
    std::copy(data.begin(), data.end(), b.begin() + static_cast<long>(at + 8));
    at += 8 + padded;
  };
  const auto bytes = [](const std::string& s) { return std::span(reinterpret_cast<const u8*>(s.data()), s.size()); };
  if (!backing_format.empty()) extension(kExtBackingFormat, bytes(backing_format));
  if (version >= 3) {
    static constexpr struct {
      u8 kind, bit;
      const char* name;
    } kNames[] = {{0, 0, "dirty bit"}, {0, 1, "corrupt bit"}, {0, 2, "external data file"},
                  {0, 3, "compression type"}, {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"}};
    std::vector<u8> table(std::size(kNames) * 48);
    for (std::size_t i = 0; i < std::size(kNames); i++) {
      table[i * 48] = kNames[i].kind;
      table[i * 48 + 1] = kNames[i].bit;
      std::memcpy(&table[i * 48 + 2], kNames[i].name, std::strlen(kNames[i].name));
    }
    // Not in the smallest clusters, which have no room for it.
    if (cluster_size() >= 1024) extension(kExtFeatureNames, table);
  }
  for (const Extension& e : extensions) extension(e.type, e.data);
  extension(kExtEnd, {});
  if (!backing_file.empty() && fits) {
    if (!range_within(at, backing_file.size(), b.size()) || backing_file.size() > kMaxBackingName) {
      fits = false;
    } else {
      put64(&b[8], at);
      put32(&b[16], static_cast<u32>(backing_file.size()));
      std::memcpy(&b[at], backing_file.data(), backing_file.size());
    }
  }
  if (!fits) return Error::of(ENAMETOOLONG, "the backing file's name does not fit in the header; use a shorter one or larger clusters");
  return b;
}

CompressedSpan compressed_span(const Header& h, u64 entry) {
  const u32 x = 62 - (h.cluster_bits - 8);
  const u64 offset = entry & ((u64{1} << x) - 1);
  const u64 sectors = (entry & ~(kCopied | kCompressedFlag)) >> x;
  return {offset, (sectors + 1) * 512 - (offset & 511)};
}

u64 compressed_entry(const Header& h, u64 offset, u64 length) {
  const u32 x = 62 - (h.cluster_bits - 8);
  const u64 sectors = (offset + length - 1) / 512 - offset / 512;
  return kCompressedFlag | sectors << x | offset;
}

}  // namespace ring3::storage::qcow2
