// image check: counts every reference anew and compares.
#include <algorithm>
#include <cstring>

#include "base/checked.hpp"
#include "storage/qcow2/qcow2_image.hpp"

namespace ring3::storage::qcow2 {

/// One check of one image. Works on the file, with the image's caches empty.
class Checker {
 public:
  Checker(Qcow2Image& image, Repair repair, const CheckProgress& progress) : i_(image), h_(image.header_), repair_(repair), progress_(progress) {}

  Result<CheckReport> run() {
    if (repair_ != Repair::kNone && !i_.writable_) return Error::of(EROFS, i_.name_ + " is not open for writing");
    i_.l2_cache_.clear();
    if (int r = count_all(); r < 0) return Error::from_errno("checking " + i_.name_, -r);
    int r = compare();
    if (r == 0 && repair_ != Repair::kNone) r = mend();
    if (r < 0) return Error::from_errno("checking " + i_.name_, -r);
    return std::move(report_);
  }

 private:
  static constexpr u64 kChunk = 256;  // counts that stand together

  void say(const std::string& text) {
    if (report_.messages.size() < CheckReport::kMostMessages) report_.messages.push_back(text);
  }
  void corruption(const std::string& text) {
    report_.corruptions++;
    say("error: " + text);
  }
  u32& count(u64 cluster) {
    auto& chunk = counts_[cluster / kChunk];
    if (chunk.empty()) chunk.resize(kChunk);
    return chunk[cluster % kChunk];
  }
  bool add(u64 offset, u64 bytes) {
    if (!range_within(offset, bytes, i_.file_end_)) return false;
    for (u64 c = h_.cluster_of(offset); c <= h_.cluster_of(offset + std::max<u64>(bytes, 1) - 1); c++) {
      u32& n = count(c);
      if (n != ~u32{0}) n++;
    }
    return true;
  }
  bool place_ok(u64 offset) const { return offset != 0 && h_.in_cluster(offset) == 0 && i_.in_file(offset); }

  int count_all() {
    // Truncated or not, what is named has to lie in the file.
    add(0, h_.cluster_size());
    add(h_.refcount_table_offset, u64{h_.refcount_table_clusters} << h_.cluster_bits);
    for (u64 k = 0; k < i_.refcounts_->table().size(); k++) {
      const u64 at = i_.refcounts_->table()[k];
      if (at == 0) continue;
      if (!place_ok(at)) {
        corruption("refcount table entry " + std::to_string(k) + " cannot be");
        rebuild_ = true;
      } else {
        add(at, h_.cluster_size());
        if (count(h_.cluster_of(at)) != 1) {
          corruption("refcount block " + std::to_string(k) + " overlaps other metadata");
          rebuild_ = true;
        }
      }
    }
    if (int r = tree("the active image", i_.l1_, h_.l1_offset, true); r < 0) return r;
    u64 bytes = 0;
    auto list = i_.load_snapshots(bytes);
    if (!list) {
      corruption(list.error().message);
      report_.messages.push_back("the snapshot table cannot be read: nothing is repaired");
      hopeless_ = true;
    } else {
      if (h_.snapshot_count != 0) add(h_.snapshots_offset, bytes);
      for (const auto& s : *list) {
        std::vector<u64> l1;
        if (int r = i_.read_l1(s.l1_offset, s.l1_size, l1); r < 0) return r;
        trees_++;
        if (int r = tree("snapshot " + s.id, l1, s.l1_offset, false); r < 0) return r;
      }
    }
    for (const Extension& e : h_.extensions) {
      if (e.type == kExtBitmaps && (h_.autoclear & 1) != 0) has_bitmaps_ = true;
    }
    return 0;
  }

  int tree(const std::string& whose, std::vector<u64>& l1, u64 l1_offset, bool active) {
    if (!l1.empty()) add(l1_offset, l1.size() * 8);
    std::vector<u8> raw(h_.cluster_size());
    bool l1_changed = false;
    u64 last_host = 0;
    for (u64 k = 0; k < l1.size(); k++) {
      if (progress_) progress_(std::min(h_.size, trees_ * h_.size / whole_trees() + k * h_.l2_reach() / whole_trees()));
      if (l1[k] == 0) continue;
      const u64 table = l1[k] & kOffsetMask;
      const std::string where = "L1 entry " + std::to_string(k) + " of " + whose;
      if (!place_ok(table) || (l1[k] & kL1Reserved) != 0 || is_fixed(table)) {
        corruption(where + " cannot be");
        if (repair_ == Repair::kAll) l1[k] = 0, l1_changed = true, report_.corruptions_fixed++;
        continue;
      }
      if (active && !tables_.insert(h_.cluster_of(table))) {
        corruption(where + " names a table that another entry names");
        if (repair_ == Repair::kAll) l1[k] = 0, l1_changed = true, report_.corruptions_fixed++;
        continue;
      }
      add(table, h_.cluster_size());
      if (int r = i_.file_->read(table, std::span<u8>(raw)); r < 0) return r;
      bool changed = false;
      for (u64 at = 0; at < raw.size(); at += h_.l2_entry_size()) {
        const u64 e = get64(&raw[at]);
        const u64 bitmap = h_.extended_l2() ? get64(&raw[at + 8]) : 0;
        if (e == 0 && bitmap == 0) continue;
        bool bad = false;
        if ((e & kCompressedFlag) != 0) {
          const CompressedSpan s = compressed_span(h_, e);
          // The last sector may be cut off by the file's end.
          bad = s.offset < h_.cluster_size() || (e & kCopied) != 0 || bitmap != 0 || !i_.in_file(s.offset) ||
                !add(s.offset, std::min(s.length, i_.file_end_ - s.offset));
          if (!bad && active) report_.compressed_clusters++, report_.allocated_clusters++;
        } else {
          const u64 host = e & kOffsetMask;
          const bool zero_bad = (e & kZeroFlag) != 0 && (h_.version < 3 || h_.extended_l2());
          bad = (e & kL2Reserved) != 0 || zero_bad || (static_cast<u32>(bitmap) & static_cast<u32>(bitmap >> 32)) != 0 ||
                (host == 0 && (static_cast<u32>(bitmap) != 0 || (e & kCopied) != 0)) || (host != 0 && (!place_ok(host) || is_fixed(host)));
          if (!bad && host != 0) {
            add(host, h_.cluster_size());
            if (active) {
              report_.allocated_clusters++;
              if (last_host != 0 && host != last_host + h_.cluster_size()) report_.fragmented_clusters++;
              last_host = host;
            }
          }
        }
        if (bad) {
          corruption("L2 entry " + std::to_string(at / h_.l2_entry_size()) + " under " + where + " cannot be");
          if (repair_ == Repair::kAll) {
            std::memset(&raw[at], 0, h_.l2_entry_size());
            changed = true;
            report_.corruptions_fixed++;
          }
        }
      }
      if (changed) {
        if (int r = i_.file_->write(table, std::span<const u8>(raw)); r < 0) return r;
      }
    }
    if (l1_changed) {
      std::vector<u8> words(l1.size() * 8);
      for (std::size_t k = 0; k < l1.size(); k++) put64(&words[k * 8], l1[k]);
      if (int r = i_.file_->write(l1_offset, std::span<const u8>(words)); r < 0) return r;
    }
    if (active) report_.total_clusters = (h_.size + h_.cluster_size() - 1) >> h_.cluster_bits;
    return 0;
  }

  // The header and the active L1 table, and the refcount structures: never an L2 table or data.
  bool is_fixed(u64 offset) const {
    const auto in = [&](u64 from, u64 bytes) { return offset >= from && offset < from + h_.round_up(std::max<u64>(bytes, 1)); };
    if (in(0, 1) || in(h_.l1_offset, u64{h_.l1_size} * 8) ||
        in(h_.refcount_table_offset, u64{h_.refcount_table_clusters} << h_.cluster_bits)) {
      return true;
    }
    if (blocks_.empty()) {
      for (const u64 at : i_.refcounts_->table()) {
        if (at != 0) blocks_.push_back(at);
      }
      std::sort(blocks_.begin(), blocks_.end());
      blocks_.push_back(~u64{0});
    }
    return std::binary_search(blocks_.begin(), blocks_.end(), offset);
  }

  int compare() {
    // Clusters with a count on either side.
    std::vector<u64> chunks;
    for (const auto& [k, chunk] : counts_) chunks.push_back(k);
    std::sort(chunks.begin(), chunks.end());
    for (auto k = chunks.rbegin(); k != chunks.rend() && report_.image_end == 0; ++k) {
      const std::vector<u32>& used = counts_[*k];
      const auto last = std::find_if(used.rbegin(), used.rend(), [](u32 n) { return n != 0; });
      if (last != used.rend()) report_.image_end = (*k * kChunk + static_cast<u64>(used.rend() - last)) << h_.cluster_bits;
    }
    const u64 per = i_.refcounts_->per_block();
    std::vector<u64> blocks;
    for (u64 b = 0; b < i_.refcounts_->table().size(); b++) {
      // What overlaps or cannot be is said already, and all of it is to be made anew.
      const u64 at = i_.refcounts_->table()[b];
      if (at != 0 && place_ok(at) && count(h_.cluster_of(at)) == 1) blocks.push_back(b);
    }
    const auto look = [&](u64 c) {
      u64 refs = 0;
      const auto it = counts_.find(c / kChunk);
      const u64 real = it == counts_.end() ? 0 : it->second[c % kChunk];
      if (const int r = i_.refcounts_->get(c, refs); r < 0) {
        rebuild_ = true;
        return 0;
      }
      if (refs == real) return 0;
      wrong_.push_back({c, real});
      if (refs > real && has_bitmaps_ && real == 0) {
        wrong_.pop_back();
        return 0;  // the bitmaps may stand here, which we do not read
      }
      if (refs > real) report_.leaks++;
      else report_.corruptions++;
      if (report_.messages.size() >= CheckReport::kMostMessages) return 0;
      say(std::string(refs > real ? "leak" : "error") + ": cluster " + std::to_string(c) + " has refcount " + std::to_string(refs) + ", used " +
          std::to_string(real) + (real == 1 ? " time" : " times"));
      return 0;
    };
    const u64 end = h_.cluster_of(i_.file_end_);
    for (const u64 b : blocks) {
      // A block wholly past the file's end can only be looked through, not used.
      for (u64 c = b * per; c < (b + 1) * per; c++) {
        if (i_.refcounts_->next_used(c, (b + 1) * per, c) < 0) {
          rebuild_ = true;
          break;
        }
        if (c < (b + 1) * per) (void)look(c);
      }
      if (wrong_.size() > (u64{1} << 24)) return -EFBIG;
    }
    for (const u64 k : chunks) {
      const std::vector<u32>& used = counts_[k];
      for (u64 j = 0; j < kChunk; j++) {
        const u64 c = k * kChunk + j, b = c / per;
        if (used[j] == 0) continue;
        const bool counted = b < i_.refcounts_->table().size() && i_.refcounts_->table()[b] != 0;
        u64 refs = 0;
        if (counted ? i_.refcounts_->get(c, refs) == 0 && refs == 0 : c < end) (void)look(c);
      }
    }
    return copied_flags(false);
  }

  // The "copied" flag has to say whether the refcount, as it should be, is one.
  int copied_flags(bool fix) {
    std::vector<u8> raw(h_.cluster_size());
    const auto one = [&](u64 offset) { return count(h_.cluster_of(offset)) == 1; };
    bool l1_changed = false;
    for (u64 k = 0; k < i_.l1_.size(); k++) {
      u64& word = i_.l1_[k];
      const u64 table = word & kOffsetMask;
      if (!place_ok(table)) continue;
      if (((word & kCopied) != 0) != one(table)) {
        if (!fix) corruption("L1 entry " + std::to_string(k) + ": the copied flag is wrong");
        else word ^= kCopied, l1_changed = true, report_.corruptions_fixed++;
      }
      if (int r = i_.file_->read(table, std::span<u8>(raw)); r < 0) return r;
      bool changed = false;
      for (u64 at = 0; at < raw.size(); at += h_.l2_entry_size()) {
        const u64 e = get64(&raw[at]);
        const u64 host = e & kOffsetMask;
        if ((e & kCompressedFlag) != 0 || !place_ok(host) || is_fixed(host)) continue;
        if (((e & kCopied) != 0) == one(host)) continue;
        if (!fix) corruption("cluster " + std::to_string(h_.cluster_of(host)) + ": the copied flag is wrong");
        else put64(&raw[at], e ^ kCopied), changed = true, report_.corruptions_fixed++;
      }
      if (changed) {
        if (int r = i_.file_->write(table, std::span<const u8>(raw)); r < 0) return r;
      }
    }
    if (l1_changed) {
      std::vector<u8> words(i_.l1_.size() * 8);
      for (std::size_t k = 0; k < i_.l1_.size(); k++) put64(&words[k * 8], i_.l1_[k]);
      if (int r = i_.file_->write(h_.l1_offset, std::span<const u8>(words)); r < 0) return r;
    }
    return 0;
  }

  int mend() {
    if (hopeless_) return 0;
    if (rebuild_ && repair_ == Repair::kAll) {
      if (const int r = rebuild(); r < 0) return r;
      report_.corruptions_fixed = report_.corruptions;
      report_.leaks_fixed = report_.leaks;
      if (const int r = copied_flags(true); r < 0) return r;
      report_.corruptions_fixed = report_.corruptions;
      return finish();
    }
    for (const auto& [c, real] : wrong_) {
      u64 refs = 0;
      if (const int r = i_.refcounts_->get(c, refs); r < 0) return r;
      if (repair_ == Repair::kLeaks && refs < real) continue;
      int r;
      while ((r = i_.refcounts_->put(c, real)) == kNeedsGrowth) {
        if (r = i_.refcounts_->grow(); r < 0) return r;
      }
      if (r == -ERANGE) continue;
      if (r < 0) return r;
      (refs > real ? report_.leaks_fixed : report_.corruptions_fixed)++;
    }
    if (const int r = i_.refcounts_->write_all(); r < 0) return r;
    if (repair_ == Repair::kAll) {
      if (const int r = copied_flags(true); r < 0) return r;
    }
    return finish();
  }

  int finish() {
    if (int r = i_.file_->sync(); r < 0) return r;
    if (report_.corruptions_left() == 0 && (h_.incompatible & (kDirty | kCorrupt)) != 0) {
      h_.incompatible &= ~(kDirty | kCorrupt);
      if (int r = i_.write_header_fields(); r < 0) return r;
    }
    i_.l2_cache_.clear();
    i_.corrupt_ = i_.corrupt_ && report_.corruptions_left() != 0;
    return i_.file_->sync();
  }

  // Refcount structures from nothing, past the end of all that is in use; then the header points to them.
  int rebuild() {
    for (const u64 at : i_.refcounts_->table()) {
      if (place_ok(at) && count(h_.cluster_of(at)) != 0) count(h_.cluster_of(at))--;
    }
    for (u64 k = 0; k < h_.refcount_table_clusters; k++) count(h_.cluster_of(h_.refcount_table_offset) + k)--;
    const u64 per = i_.refcounts_->per_block(), cs = h_.cluster_size();
    const u64 start = h_.cluster_of(i_.file_end_);
    u64 blocks = 1, table_clusters = 1;
    for (;;) {
      const u64 last = start + blocks + table_clusters;
      const u64 b = (last + per - 1) / per, t = (b * 8 + cs - 1) / cs;
      if (b <= blocks && t <= table_clusters) break;
      blocks = std::max(b, blocks), table_clusters = std::max(t, table_clusters);
      if (table_clusters * cs > kMaxRefcountTableBytes || blocks > (u64{1} << 16)) return -EFBIG;
    }
    for (u64 c = start; c < start + blocks + table_clusters; c++) count(c) = 1;
    std::vector<u8> table(table_clusters * cs), raw(cs);
    const u32 bits = 1u << h_.refcount_order;
    for (u64 b = 0; b < blocks; b++) {
      std::fill(raw.begin(), raw.end(), u8{0});
      for (u64 j = 0; j < per;) {
        const u64 first = b * per + j, end = j + std::min(per - j, kChunk - first % kChunk);
        const auto it = counts_.find(first / kChunk);
        if (it == counts_.end()) {
          j = end;
          continue;
        }
        for (const u32* used = &it->second[first % kChunk]; j < end; j++, used++) {
          const u64 n = *used;
          if (n == 0) continue;
          if (n > i_.refcounts_->most()) return -ERANGE;
          if (bits < 8) {
            const u64 per_byte = 8 / bits;
            raw[j / per_byte] = static_cast<u8>(raw[j / per_byte] | n << (bits * (j % per_byte)));
          } else {
            for (u32 k = 0; k < bits / 8; k++) raw[(j + 1) * bits / 8 - 1 - k] = static_cast<u8>(k < 8 ? n >> (8 * k) : 0);
          }
        }
      }
      if (int r = i_.file_->write((start + b) << h_.cluster_bits, std::span<const u8>(raw)); r < 0) return r;
      put64(&table[b * 8], (start + b) << h_.cluster_bits);
    }
    const u64 at = (start + blocks) << h_.cluster_bits;
    if (int r = i_.file_->write(at, std::span<const u8>(table)); r < 0) return r;
    if (int r = i_.file_->sync(); r < 0) return r;
    h_.refcount_table_offset = at;
    h_.refcount_table_clusters = static_cast<u32>(table_clusters);
    if (int r = i_.write_header_fields(); r < 0) return r;
    if (int r = i_.file_->sync(); r < 0) return r;
    i_.file_end_ = at + table_clusters * cs;
    if (i_.zero_from_ != ~u64{0}) i_.zero_from_ = std::max(i_.zero_from_, i_.file_end_);
    blocks_.clear();
    // What stood in memory of the old ones goes.
    i_.metadata_ = ClusterSet();
    i_.refcounts_ = std::make_unique<Refcounts>(*i_.file_, h_, i_.metadata_, [this_image = &i_] { return this_image->write_header_fields(); });
    if (auto r = i_.load_l1({true, true}); !r) return -EIO;
    return i_.refcounts_->load(i_.name_, true) ? 0 : -EIO;
  }

  /// The disk itself and its snapshots; the count is the file's.
  u64 whole_trees() const { return u64{h_.snapshot_count} + 1; }

  Qcow2Image& i_;
  Header& h_;
  Repair repair_;
  const CheckProgress& progress_;
  u64 trees_ = 0;  // walked already
  CheckReport report_;
  std::unordered_map<u64, std::vector<u32>> counts_;
  ClusterSet tables_;
  mutable std::vector<u64> blocks_;
  std::vector<std::pair<u64, u64>> wrong_;  // cluster, what its refcount should be
  bool rebuild_ = false, hopeless_ = false, has_bitmaps_ = false;
};

Result<CheckReport> Qcow2Image::check(Repair repair, const CheckProgress& progress) {
  if (!refcounts_) {
    refcounts_ = std::make_unique<Refcounts>(*file_, header_, metadata_, [this] { return write_header_fields(); });
    if (auto r = refcounts_->load(name_, true); !r) return r.error();
  }
  if (writable_ && !corrupt_ && owns_format_) {
    for (int i = 0; i < 2; i++) {
      if (const int r = commit(); r < 0) return Error::from_errno("checking " + name_, -r);
    }
  }
  return Checker(*this, repair, progress).run();
}

}  // namespace ring3::storage::qcow2
