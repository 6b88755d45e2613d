#include "storage/iso/iso.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>

namespace ring3::iso {
namespace {

constexpr std::size_t kSector = 2048;
constexpr u64 kMostBytes = u64{64} << 20;
constexpr u32 kFirstSector = 16;  // the ones before are the boot area

using Bytes = std::vector<u8>;

void put8(Bytes& b, u32 v) { b.push_back(static_cast<u8>(v)); }
void put_le(Bytes& b, u32 v, int bytes) {
  for (int i = 0; i < bytes; i++) b.push_back(static_cast<u8>(v >> (8 * i)));
}
void put_be(Bytes& b, u32 v, int bytes) {
  for (int i = bytes - 1; i >= 0; i--) b.push_back(static_cast<u8>(v >> (8 * i)));
}
/// Both byte orders, as ECMA-119 wants most numbers (7.2.3, 7.3.3).
void put_both(Bytes& b, u32 v, int bytes) {
  put_le(b, v, bytes);
  put_be(b, v, bytes);
}
void put_text(Bytes& b, const std::string& s, std::size_t width, char pad = ' ') {
  for (std::size_t i = 0; i < width; i++) b.push_back(static_cast<u8>(i < s.size() ? s[i] : pad));
}
void pad_to(Bytes& b, std::size_t size) { b.resize(std::max(b.size(), size)); }

/// UTF-8 to UCS-2, big-endian; nothing when it is neither.
std::optional<Bytes> ucs2(const std::string& s) {
  Bytes out;
  for (std::size_t i = 0; i < s.size();) {
    const u8 c = static_cast<u8>(s[i]);
    const int more = c < 0x80 ? 0 : (c >> 5) == 6 ? 1 : (c >> 4) == 14 ? 2 : -1;
    if (more < 0 || i + static_cast<std::size_t>(more) >= s.size()) return std::nullopt;
    u32 v = more == 0 ? c : c & (0x3fu >> more);
    for (int k = 1; k <= more; k++) {
      const u8 next = static_cast<u8>(s[i + static_cast<std::size_t>(k)]);
      if ((next >> 6) != 2) return std::nullopt;
      v = v << 6 | (next & 0x3fu);
    }
    if (v < (more == 2 ? 0x800u : more == 1 ? 0x80u : 0u) || (v >= 0xd800 && v < 0xe000)) return std::nullopt;
    put_be(out, v, 2);
    i += static_cast<std::size_t>(more) + 1;
  }
  return out;
}

/// "user-data" as "USER_DAT.;1": 8.3, letters, digits and '_' (level 1), unique among `taken`.
std::string short_name(const std::string& name, std::set<std::string>& taken) {
  const auto clean = [](const std::string& s, std::size_t most) {
    std::string out;
    for (const char c : s) {
      if (out.size() == most) break;
      if (c >= 'a' && c <= 'z') out += static_cast<char>(c - 'a' + 'A');
      else out += (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ? c : '_';
    }
    return out;
  };
  const auto dot = name.find_last_of('.');
  const bool has_ending = dot != std::string::npos && dot > 0;
  const std::string stem = clean(has_ending ? name.substr(0, dot) : name, 8);
  const std::string ending = has_ending ? clean(name.substr(dot + 1), 3) : "";
  std::string result = stem + "." + ending + ";1";
  for (int n = 1; !taken.insert(result).second; n++) {
    const std::string number = std::to_string(n);
    result = stem.substr(0, 8 - number.size()) + number + "." + ending + ";1";
  }
  return result;
}

struct Entry {
  const File* file = nullptr;
  std::string identifier;  ///< of the primary volume
  Bytes joliet;            ///< of the supplementary one
  u32 sector = 0;
};

class Writer {
 public:
  Writer(std::string label, std::time_t time) : label_(std::move(label)) { gmtime_r(&time, &time_); }

  Result<Bytes> write(std::span<const File> files) {
    if (auto status = take(files); !status) return status.error();
    // Sizes of directories do not depend on where things lie, so they are made twice.
    const u32 root_sectors = sectors(directory(false, 0, 0).size());
    const u32 joliet_sectors = sectors(directory(true, 0, 0).size());
    u32 next = kFirstSector + 3;  // two volume descriptors and the terminator
    const u32 path_le = next, path_be = next + 1, joliet_le = next + 2, joliet_be = next + 3;
    next += 4;
    const u32 root = next;
    next += root_sectors;
    const u32 joliet = next;
    next += joliet_sectors;
    for (Entry& entry : entries_) {
      entry.sector = next;
      next += sectors(entry.file->content.size());
    }
    Bytes image(static_cast<std::size_t>(next) * kSector);
    const auto place = [&](u32 sector, const Bytes& bytes) { std::memcpy(image.data() + std::size_t{sector} * kSector, bytes.data(), bytes.size()); };
    place(kFirstSector, volume(false, next, path_le, path_be, root, root_sectors));
    place(kFirstSector + 1, volume(true, next, joliet_le, joliet_be, joliet, joliet_sectors));
    place(kFirstSector + 2, Bytes{255, 'C', 'D', '0', '0', '1', 1});  // 8.3
    place(path_le, path_table(root, false));
    place(path_be, path_table(root, true));
    place(joliet_le, path_table(joliet, false));
    place(joliet_be, path_table(joliet, true));
    place(root, directory(false, root, root_sectors));
    place(joliet, directory(true, joliet, joliet_sectors));
    for (const Entry& entry : entries_) {
      const std::string& content = entry.file->content;
      if (!content.empty()) std::memcpy(image.data() + std::size_t{entry.sector} * kSector, content.data(), content.size());
    }
    return image;
  }

 private:
  static u32 sectors(u64 bytes) { return static_cast<u32>((bytes + kSector - 1) / kSector); }

  Status take(std::span<const File> files) {
    if (label_.empty() || label_.size() > 16 || !std::all_of(label_.begin(), label_.end(), [](char c) { return c > 32 && c < 127; })) {
      return Error::of(EINVAL, "a CD's label has 1 to 16 printable characters");
    }
    std::set<std::string> names, identifiers;
    u64 bytes = 0;
    for (const File& file : files) {
      auto joliet = ucs2(file.name);
      const bool good = joliet && !joliet->empty() && joliet->size() <= 128 && file.name.find('/') == std::string::npos &&
                        file.name.find('\0') == std::string::npos && file.name != "." && file.name != "..";
      if (!good) return Error::of(EINVAL, "a file on a CD cannot be named '" + file.name.substr(0, 80) + "'");
      if (!names.insert(file.name).second) return Error::of(EINVAL, "two files on the CD are named " + file.name);
      bytes += file.content.size();
      if (bytes > kMostBytes) return Error::of(EFBIG, "the files for the CD are larger than 64 MiB");
      entries_.push_back({&file, short_name(file.name, identifiers), std::move(*joliet), 0});
    }
    std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.identifier < b.identifier; });
    return Ok{};
  }

  void put_short_date(Bytes& b) const {  // 9.1.5
    for (const int v : {time_.tm_year, time_.tm_mon + 1, time_.tm_mday, time_.tm_hour, time_.tm_min, time_.tm_sec, 0}) put8(b, static_cast<u32>(v));
  }
  void put_long_date(Bytes& b) const {  // 8.4.26.1
    char text[64];
    std::strftime(text, sizeof text, "%Y%m%d%H%M%S00", &time_);
    put_text(b, text, 16, '0');
    put8(b, 0);
  }

  /// A directory record (9.1). `system`: the system use field.
  Bytes record(u32 sector, u32 size, bool is_directory, const Bytes& identifier, const Bytes& system) const {
    Bytes b;
    put8(b, 0);
    put8(b, 0);
    put_both(b, sector, 4);
    put_both(b, size, 4);
    put_short_date(b);
    put8(b, is_directory ? 2 : 0);
    put8(b, 0);
    put8(b, 0);
    put_both(b, 1, 2);
    put8(b, static_cast<u32>(identifier.size()));
    b.insert(b.end(), identifier.begin(), identifier.end());
    if (b.size() % 2 != 0) put8(b, 0);
    b.insert(b.end(), system.begin(), system.end());
    if (b.size() % 2 != 0) put8(b, 0);
    b[0] = static_cast<u8>(b.size());
    return b;
  }

  static Bytes posix_attributes(u32 mode, u32 links) {  // RRIP 4.1.1
    Bytes b{'P', 'X', 36, 1};
    for (const u32 v : {mode, links, u32{0}, u32{0}}) put_both(b, v, 4);
    return b;
  }

  Bytes directory(bool joliet, u32 sector, u32 count) const {
    Bytes out;
    const auto add = [&](const Bytes& r) {
      // A record does not cross a sector's end (6.8.1.1).
      if (out.size() / kSector != (out.size() + r.size() - 1) / kSector) pad_to(out, (out.size() / kSector + 1) * kSector);
      out.insert(out.end(), r.begin(), r.end());
    };
    const u32 size = count * static_cast<u32>(kSector);
    Bytes self, parent;
    if (!joliet) {
      self = {'S', 'P', 7, 1, 0xbe, 0xef, 0};
      const Bytes px = posix_attributes(040555, 2);
      self.insert(self.end(), px.begin(), px.end());
      const std::string id = "RRIP_1991A";
      self.insert(self.end(), {'E', 'R', static_cast<u8>(8 + id.size()), 1, static_cast<u8>(id.size()), 0, 0, 1});
      self.insert(self.end(), id.begin(), id.end());
      parent = px;
    }
    add(record(sector, size, true, {0}, self));
    add(record(sector, size, true, {1}, parent));
    std::vector<const Entry*> order;
    for (const Entry& entry : entries_) order.push_back(&entry);
    if (joliet) std::sort(order.begin(), order.end(), [](const Entry* a, const Entry* b) { return a->joliet < b->joliet; });
    for (const Entry* entry : order) {
      const u32 bytes = static_cast<u32>(entry->file->content.size());
      Bytes system;
      if (!joliet) {
        system = posix_attributes(0100444, 1);
        const std::string& name = entry->file->name;
        system.insert(system.end(), {'N', 'M', static_cast<u8>(5 + name.size()), 1, 0});  // RRIP 4.1.4
        system.insert(system.end(), name.begin(), name.end());
      }
      const Bytes identifier = joliet ? entry->joliet : Bytes(entry->identifier.begin(), entry->identifier.end());
      add(record(entry->sector, bytes, false, identifier, system));
    }
    pad_to(out, (out.size() + kSector - 1) / kSector * kSector);
    return out;
  }

  static Bytes path_table(u32 root, bool big_endian) {  // 9.4: the root alone
    Bytes b{1, 0};
    if (big_endian) put_be(b, root, 4), put_be(b, 1, 2);
    else put_le(b, root, 4), put_le(b, 1, 2);
    b.insert(b.end(), {0, 0});
    return b;
  }

  Bytes volume(bool joliet, u32 total, u32 path_le, u32 path_be, u32 root, u32 root_sectors) const {  // 8.4, 8.5
    const auto text = [&](Bytes& b, const std::string& s, std::size_t width) {
      if (!joliet) return put_text(b, s, width);
      Bytes wide = *ucs2(s);
      while (wide.size() + 1 < width) wide.insert(wide.end(), {0, ' '});
      wide.resize(width);
      b.insert(b.end(), wide.begin(), wide.end());
    };
    Bytes b;
    put8(b, joliet ? 2 : 1);
    put_text(b, "CD001", 5);
    put8(b, 1);
    put8(b, 0);
    text(b, "LINUX", 32);
    text(b, label_, 32);
    pad_to(b, 80);
    put_both(b, total, 4);
    if (joliet) b.insert(b.end(), {'%', '/', 'E'});  // UCS-2 level 3
    pad_to(b, 120);
    put_both(b, 1, 2);
    put_both(b, 1, 2);
    put_both(b, kSector, 2);
    put_both(b, 10, 4);  // the path table's bytes
    put_le(b, path_le, 4);
    put_le(b, 0, 4);
    put_be(b, path_be, 4);
    put_be(b, 0, 4);
    const Bytes record_of_root = record(root, root_sectors * static_cast<u32>(kSector), true, {0}, {});
    b.insert(b.end(), record_of_root.begin(), record_of_root.end());
    for (int i = 0; i < 4; i++) text(b, i == 3 ? "RING3" : "", 128);  // volume set, publisher, preparer, application
    for (int i = 0; i < 3; i++) text(b, "", 37);
    put_long_date(b);
    put_long_date(b);
    put_text(b, "", 16, '0'), put8(b, 0);  // does not expire
    put_long_date(b);
    put8(b, 1);
    pad_to(b, kSector);
    return b;
  }

  std::string label_;
  std::tm time_{};
  std::vector<Entry> entries_;
};

}  // namespace

Result<std::vector<u8>> build(const std::string& label, std::span<const File> files, std::time_t time) {
  return Writer(label, time).write(files);
}

}  // namespace ring3::iso
