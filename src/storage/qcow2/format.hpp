#pragma once
#include <optional>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "storage/block/file.hpp"

/// qcow2 as it stands in the file: constants, the header, big-endian access.
///
/// Spec: QEMU's docs/interop/qcow2.txt, version 2 and 3. Numbers are big-endian.
namespace ring3::storage::qcow2 {

inline constexpr u32 kMagic = 0x514649fb;
inline constexpr u32 kMinClusterBits = 9, kMaxClusterBits = 21;
inline constexpr u64 kMaxL1Bytes = u64{32} << 20;            ///< 4 Mi entries; QEMU's limit too
inline constexpr u64 kMaxRefcountTableBytes = u64{8} << 20;
inline constexpr u32 kMaxSnapshots = 65536;
inline constexpr u64 kMaxSnapshotBytes = u64{64} << 20;
inline constexpr u32 kMaxBackingName = 1023;

inline constexpr u64 kCopied = u64{1} << 63;                 ///< refcount is exactly one
inline constexpr u64 kCompressedFlag = u64{1} << 62;
inline constexpr u64 kZeroFlag = 1;                          ///< version 3, standard L2 entries
inline constexpr u64 kOffsetMask = 0x00fffffffffffe00;
inline constexpr u64 kL2Reserved = 0x3f000000000001fe;       ///< of a standard entry
inline constexpr u64 kL1Reserved = 0x7f000000000001ff;

// Incompatible features.
inline constexpr u64 kDirty = 1, kCorrupt = 2, kExternalData = 4, kCompressionType = 8, kExtendedL2 = 16;
// Compatible features.
inline constexpr u64 kLazyRefcounts = 1;
// Autoclear features: bitmaps 1, raw external data 2. We keep neither up, so they are cleared when we write.

inline u16 get16(const u8* p) { return static_cast<u16>(p[0] << 8 | p[1]); }
inline u32 get32(const u8* p) { return u32{get16(p)} << 16 | get16(p + 2); }
inline u64 get64(const u8* p) { return u64{get32(p)} << 32 | get32(p + 4); }
inline void put16(u8* p, u64 v) { p[0] = static_cast<u8>(v >> 8), p[1] = static_cast<u8>(v); }
inline void put32(u8* p, u64 v) { put16(p, v >> 16), put16(p + 2, v); }
inline void put64(u8* p, u64 v) { put32(p, v >> 32), put32(p + 4, v); }

struct Extension {
  u32 type = 0;
  std::vector<u8> data;
};
inline constexpr u32 kExtEnd = 0, kExtBackingFormat = 0xe2792aca, kExtFeatureNames = 0x6803f857,
                     kExtBitmaps = 0x23852875, kExtEncryption = 0x0537be77, kExtDataFile = 0x44415441;

/// The header, checked: sizes are sane and the tables it names lie in the file, at whole clusters, apart from the
/// header and from one another.
struct Header {
  u32 version = 3;
  u32 cluster_bits = 16;
  u64 size = 0;                        ///< of the disk, bytes
  u32 l1_size = 0;                     ///< entries
  u64 l1_offset = 0;
  u64 refcount_table_offset = 0;
  u32 refcount_table_clusters = 0;
  u32 snapshot_count = 0;
  u64 snapshots_offset = 0;
  u64 incompatible = 0, compatible = 0, autoclear = 0;
  u32 refcount_order = 4;
  u32 header_length = 112;
  u8 compression = 0;                  ///< 0: deflate, 1: zstd
  std::string backing_file;
  std::string backing_format;          ///< empty: not said
  std::vector<Extension> extensions;   ///< those that we do not know but keep

  u64 cluster_size() const { return u64{1} << cluster_bits; }
  bool extended_l2() const { return (incompatible & kExtendedL2) != 0; }
  u32 l2_entry_size() const { return extended_l2() ? 16 : 8; }
  u32 l2_bits() const { return cluster_bits - (extended_l2() ? 4 : 3); }
  u32 subclusters() const { return extended_l2() ? 32 : 1; }
  u64 subcluster_size() const { return cluster_size() / subclusters(); }
  u64 l2_reach() const { return u64{1} << (l2_bits() + cluster_bits); }
  u64 l1_needed(u64 disk_size) const { return (disk_size + l2_reach() - 1) / l2_reach(); }
  u64 cluster_of(u64 offset) const { return offset >> cluster_bits; }
  u64 in_cluster(u64 offset) const { return offset & (cluster_size() - 1); }
  u64 round_up(u64 n) const { return (n + cluster_size() - 1) & ~(cluster_size() - 1); }

  /// Reads and checks the header. `name` stands in messages. Errors: EINVAL (no qcow2, or broken), ENOTSUP
  /// (a feature we do not have), or the host's.
  static Result<Header> read(File& file, const std::string& name);
  /// The first cluster's bytes: header, extensions, backing file name. Error: they do not fit in a cluster.
  Result<std::vector<u8>> serialize() const;
};

/// The names that an image may give its backing file: a plain local path, no protocol ("nbd:", "json:", "file:").
bool plain_path(const std::string& name);

/// Position and length, bytes, of the compressed cluster that an L2 entry names.
struct CompressedSpan {
  u64 offset = 0;
  u64 length = 0;
};
CompressedSpan compressed_span(const Header& h, u64 entry);
u64 compressed_entry(const Header& h, u64 offset, u64 length);

}  // namespace ring3::storage::qcow2
