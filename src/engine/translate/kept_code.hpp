#pragma once
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/raw_bytes.hpp"
#include "base/result.hpp"
#include "base/unique_fd.hpp"
#include "engine/translate/block_translator.hpp"

/// Translations of a VM by what they were made from, shared by its vCPUs and kept in a file between runs: who finds one
/// here skips decoding and translation. docs/adr/0012-kept-code-cache.md.
///
/// A translation is used for guest bytes that are compared with those it was made from in full, in the same mode, at the
/// same offset in a page, with the same features. Supervisor code in the topmost 2 GiB, which KASLR moves about, is
/// used at another address when a second translation at another one has shown which numbers in it move along.
///
/// File:      Header, then records, then where each one begins and the hash that finds it. Host byte order; what another
///            build of the engine wrote is not read.
/// Trust:     the file's code runs in this process, so it is taken from nobody but the user: a regular file of his that
///            nobody else may write, reached without a symbolic link. Its checksum finds damage, not malice; even so,
///            whatever its bytes say, no number in a record is used before it is known to lie in range.
///            Guests decide the bytes that are translated, and see by their time what was translated before:
///            guests that must not know of each other have files of their own.
/// Written:   when the last user lets go of it and enough is new: to a temporary file beside it that then takes its
///            name. Several VMs with one file: the last one's stays.
/// Threading: any; what the file held is read without a lock, what is new under one.
namespace ring3::engine {

/// The checksum of a file's records, taken while they come in: what was just read is in the caches still.
class FileSum {
 public:
  static constexpr std::size_t kHeader = 64;  ///< bytes of a file that it is not of
  /// bytes: all so far, each time.
  void add(std::span<const u8> bytes);
  u64 value_of(std::span<const u8> bytes);

 private:
  u64 h_[4] = {1, 2, 3, 4};
  std::size_t done_ = 0;
};

class KeptCode {
 public:
  static constexpr std::size_t kMaxBytes = 128u << 20;  ///< of the file

  /// What a block is made from.
  struct Source {
    u64 context = 0;  ///< what is the same for all blocks of a vCPU: hash of its features and options
    u64 rip = 0;
    u8 mode = 0;      ///< CodeCache's key
    bool pic = false;
    std::span<const u8> bytes;  ///< from rip on, in its page: at least what the translation read
  };
  struct Block {
    TranslatedBlock* code = nullptr;
    u32 left_at = 0;  ///< offset of the instruction that is left to the interpreter, where code->left_at is not empty
  };
  struct Stats {
    u64 found = 0, added = 0;
  };

  /// path empty: for one VM alone. A file that is missing, damaged, somebody else's or of another build is not an error:
  /// it is begun anew, and a warning says so; one that must not be replaced is EPERM.
  static Result<std::shared_ptr<KeptCode>> create(const std::string& path);
  /// The same of a file's bytes. sum: of as many of them as may be.
  static std::shared_ptr<KeptCode> parse(RawBytes file, u64 build, std::string* refused, FileSum sum = {});
  ~KeptCode();
  KeptCode(const KeptCode&) = delete;
  KeptCode& operator=(const KeptCode&) = delete;

  /// False: it is not here. Exits get tags from first_tag on. insns, bytes and left_at of *out are set.
  bool find(const Source& source, u32 first_tag, Block* out);
  /// How a block moves: the offsets of u32s in its bytes that the loader of a moved kernel adjusts (absolute addresses,
  /// which move with it; with kAgainst, distances to what stays, which move the other way), and what is made at
  /// rip + kMove of bytes in which they have moved.
  struct Moved {
    std::span<const u16> addresses;
    const TranslatedBlock* code = nullptr;
  };
  /// Keeps a translation of source. read: how many of its bytes were looked at. moved: null if it stays where it is.
  void add(const Source& source, unsigned read, const Block& block, const Moved* moved);
  static bool may_move(const Source& source) { return !source.pic && source.rip >> 31 == 0x1ffffffff && source.rip + kMove > source.rip; }
  static constexpr u64 kMove = 0x213000;
  static constexpr u16 kAgainst = 0x8000;
  /// A number this near to an instruction is taken for an address that moves with it. (If it is none, the block is
  /// not found again in a kernel that has moved, that is all.)
  static bool near(u64 number, u64 rip) { return number - rip + (64u << 20) < 128u << 20 && may_move({.rip = number}); }

  RawBytes file(u64 build) const;  ///< what is to be written
  /// Makes length, checksum and build of these bytes right, for tests; they begin with a header.
  static void seal(RawBytes* file, u64 build);
  /// Calls f with what each record of the file would be found for, for tests.
  template <class F>
  void for_each(F&& f) const {
    Source s;
    for (std::size_t at = kept_.first; source_of(&at, &s);) f(s);
  }
  Stats stats() const;
  /// Of the engine's code: changes with every change of it.
  static u64 build_identity();

 private:
  struct Header;
  struct Record;
  /// Records behind each other, found by a hash.
  struct Table {
    RawBytes bytes;
    std::vector<u32> slots;  ///< offset of a record in units of 8, plus 1; 0: free
    std::size_t count = 0, first = 0;  ///< how many; where they begin
    void insert(u32 hash, u32 at);
    void grow();
  };
  KeptCode() = default;
  static u32 hash_of(u64 context, u64 rip, u8 mode, bool pic, const u8* bytes, bool eight);
  static u32 hash_of(const Record& r, const u8* guest);
  struct Place;
  /// The record there, if it is whole and lies in the table.
  static bool take(const Table& t, std::size_t at, Record* r);
  static bool matches(const Record& r, const u8* at, const Source& s);
  static const u8* lookup(const Table& t, const Source& s);
  static bool expand(const u8* record, const Source& s, u32 first_tag, Block* out);
  static bool index(Table* t, u64 records);
  bool source_of(std::size_t* at, Source* s) const;
  void save();

  std::string name_, path_;
  UniqueFd directory_;
  u64 build_ = 0;
  Table kept_;  ///< does not change after create()
  std::unique_ptr<std::atomic<u8>[]> used_;  ///< by a kept record's offset in units of 64
  mutable std::mutex mutex_;
  Table fresh_;  ///< guarded by mutex_
  std::atomic<u64> found_{0};
};

/// Where two translations of the same bytes at addresses KeptCode::kMove apart differ: u32s that differ by it and stay in
/// the topmost 2 GiB, and, with kTlbField, places in the TLB of pages that far apart. Nothing when they differ otherwise.
std::optional<std::vector<u16>> moving_fields(const TranslatedBlock& a, const TranslatedBlock& b);
inline constexpr u16 kTlbField = 0x8000;

}  // namespace ring3::engine
