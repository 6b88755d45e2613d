#include "engine/translate/kept_code.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/split_mix.hpp"
#include "engine/mmu/mmu.hpp"

namespace ring3::engine {
namespace {

constexpr u32 kNoBias = 0xffff;
constexpr char kMagic[] = "ring3kc2";
constexpr u64 kTop = 0xffffffff80000000;  ///< the 2 GiB that code moves in
enum RecordFlags : u8 { kPic = 1, kMoves = 2 };
enum ExitFlags : u16 { kFrameFlags = 1, kWide = 2, kToUngrouped = 4, kUnguarded = 8 };
enum FaultFlags : u32 { kWindow = 1, kFlagsInFrame = 2 };

struct KeptExit {
  u64 target;
  u16 field, slot, stub, tag, bias, flags;
};
struct KeptFault {
  u64 rip;
  u32 offset, flags;
};

u64 load(const u8* at) {
  u64 v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

template <class T>
void append(RawBytes* to, std::span<const T> values) {
  const std::size_t at = to->size();
  to->resize(at + values.size_bytes());
  if (!values.empty()) std::memcpy(to->data() + at, values.data(), values.size_bytes());
}

/// A field of the TLB entry of a page, in the entry of the page that many bytes further.
constexpr u32 kTlbBytes = Mmu::kTlbSize * sizeof(Mmu::TlbEntry);
u32 moved_in_tlb(u32 offset, u64 move) {
  constexpr u32 kEntry = sizeof(Mmu::TlbEntry);
  return ((offset / kEntry + static_cast<u32>(move >> kPageShift)) % Mmu::kTlbSize) * kEntry + offset % kEntry;
}

std::size_t aligned(std::size_t n) { return (n + 7) & ~std::size_t{7}; }

}  // namespace

void FileSum::add(std::span<const u8> bytes) {
  u64 h[4] = {h_[0], h_[1], h_[2], h_[3]};
  for (; done_ + 32 <= bytes.size(); done_ += 32) {
    for (unsigned n = 0; n < 4; n++) {
      h[n] = (h[n] ^ load(bytes.data() + done_ + 8 * n)) * 0x9e3779b97f4a7c15;
      h[n] ^= h[n] >> 29;
    }
  }
  std::copy_n(h, 4, h_);
}

u64 FileSum::value_of(std::span<const u8> bytes) {
  add(bytes);
  u64 rest = bytes.size();
  for (u8 byte : bytes.subspan(done_)) rest = SplitMix64::mix(rest ^ byte);
  for (u64 v : h_) rest = SplitMix64::mix(rest ^ v);
  return rest;
}

struct KeptCode::Header {
  char magic[8];
  u64 build, records, bytes, checksum;  ///< bytes, checksum: of what follows
  u64 reserved[3];
};

/// Of a record: where it begins in the file in units of 8, and its hash.
struct KeptCode::Place {
  u32 at, hash;
};

/// Followed by exits and faults, then the u16s of addresses, relatives, moves and lefts, then guest bytes, then code.
struct KeptCode::Record {
  u64 context, rip;
  u32 size;  ///< of everything, a multiple of 8
  u16 offset, read, bytes, insns;
  u16 code, cold, entry, frame_entry, dead_stub, left;
  u16 exits, faults, addresses, relatives, moves, lefts;
  u8 mode, flags;
  u64 numbers() const { return 2u * (u64{addresses} + relatives + moves + lefts); }
  u64 numbers_at() const { return sizeof(Record) + sizeof(KeptExit) * exits + sizeof(KeptFault) * faults; }
  u64 guest_at() const { return numbers_at() + numbers(); }
  u64 code_at() const { return guest_at() + read; }
  u64 end() const { return code_at() + code; }
};

/// Code that moves keeps its place in 2 MiB; of code at any address more bytes tell one from the other.
u32 KeptCode::hash_of(u64 context, u64 rip, u8 mode, bool pic, const u8* bytes, bool eight) {
  const u64 place = pic ? rip & (kPageSize - 1) : rip & (kTop >= rip ? ~u64{0} : 0x1fffff);
  return static_cast<u32>(SplitMix64::mix((eight ? load(bytes) : bytes[0]) ^ context ^ place << 9 ^ u64{mode} << 52 ^ u64{pic} << 60 ^ u64{eight} << 61));
}

u32 KeptCode::hash_of(const Record& r, const u8* guest) {
  const bool pic = (r.flags & kPic) != 0;
  return hash_of(r.context, pic ? r.offset : r.rip, r.mode, pic, guest, pic && r.read >= 8);
}

void KeptCode::Table::insert(u32 hash, u32 at) {
  if (2 * ++count > slots.size()) grow();
  std::size_t n = hash & (slots.size() - 1);
  while (slots[n] != 0) n = (n + 1) & (slots.size() - 1);
  slots[n] = at / 8 + 1;
}

void KeptCode::Table::grow() {
  std::vector<u32> old = std::move(slots);
  slots.assign(std::bit_ceil(std::max<std::size_t>(1024, 4 * count)), 0);
  for (u32 slot : old) {
    if (slot == 0) continue;
    Record r;
    const u8* at = bytes.data() + std::size_t{slot - 1} * 8;
    std::memcpy(&r, at, sizeof r);
    std::size_t n = hash_of(r, at + r.guest_at()) & (slots.size() - 1);
    while (slots[n] != 0) n = (n + 1) & (slots.size() - 1);
    slots[n] = slot;
  }
}

bool KeptCode::take(const Table& t, std::size_t at, Record* r) {
  if (at < t.first || at >= t.bytes.size() || t.bytes.size() - at < sizeof *r) return false;
  std::memcpy(r, t.bytes.data() + at, sizeof *r);
  return r->size % 8 == 0 && r->size <= t.bytes.size() - at && aligned(r->end()) == r->size && r->read != 0;
}

/// Takes the places off the records. False: they are none. What stands at them is looked at when it is wanted: to go through all of it at every start
/// would take as long as reading it.
bool KeptCode::index(Table* t, u64 records) {
  if (records > (t->bytes.size() - t->first) / (sizeof(Record) + sizeof(Place))) return false;
  const std::size_t end = t->bytes.size() - records * sizeof(Place);
  t->slots.assign(std::bit_ceil(std::max<u64>(1024, 2 * records + 2)), 0);
  for (const u8* at = t->bytes.data() + end; at != t->bytes.data() + t->bytes.size(); at += sizeof(Place)) {
    Place p;
    std::memcpy(&p, at, sizeof p);
    if (u64{p.at} * 8 < t->first || u64{p.at} * 8 >= end) return false;
    t->insert(p.hash, p.at * 8);
  }
  t->bytes.resize(end);
  return true;
}

bool KeptCode::matches(const Record& r, const u8* at, const Source& s) {
  if (r.context != s.context || r.mode != s.mode || r.offset != (s.rip & (kPageSize - 1)) || ((r.flags & kPic) != 0) != s.pic) return false;
  if (!s.pic && r.rip != s.rip && ((r.flags & kMoves) == 0 || s.rip < kTop)) return false;
  if (r.read > s.bytes.size()) return false;
  const u8* guest = at + r.guest_at();
  u32 done = 0;
  const u32 move = static_cast<u32>(s.rip - r.rip);
  for (unsigned n = 0; move != 0 && !s.pic && n < r.addresses; n++) {
    u16 field;
    std::memcpy(&field, at + r.numbers_at() + 2 * n, 2);
    const u32 by = (field & kAgainst) != 0 ? 0 - move : move;
    field &= static_cast<u16>(~kAgainst);
    if (field < done || field + 4 > r.read || std::memcmp(guest + done, s.bytes.data() + done, field - done) != 0) return false;
    u32 here, there;
    std::memcpy(&here, guest + field, 4);
    std::memcpy(&there, s.bytes.data() + field, 4);
    if (there != here + by) return false;
    done = field + 4u;
  }
  return std::memcmp(guest + done, s.bytes.data() + done, r.read - done) == 0;
}

const u8* KeptCode::lookup(const Table& t, const Source& s) {
  if (t.slots.empty() || s.bytes.empty()) return nullptr;
  for (const bool eight : {true, false}) {
    if (eight && (!s.pic || s.bytes.size() < 8)) continue;
    const u32 hash = hash_of(s.context, s.rip, s.mode, s.pic, s.bytes.data(), eight);
    for (std::size_t n = hash & (t.slots.size() - 1); t.slots[n] != 0; n = (n + 1) & (t.slots.size() - 1)) {
      const std::size_t at = std::size_t{t.slots[n] - 1} * 8;
      Record r;
      if (take(t, at, &r) && (s.pic && r.read >= 8) == eight && matches(r, t.bytes.data() + at, s)) return t.bytes.data() + at;
    }
  }
  return nullptr;
}

bool KeptCode::expand(const u8* record, const Source& s, u32 first_tag, Block* out) {
  Record r;
  std::memcpy(&r, record, sizeof r);
  const u8* at = record + sizeof r;
  const u64 move = s.pic ? 0 : s.rip - r.rip;
  TranslatedBlock& b = *out->code;
  // A field lies in one of the two parts.
  const auto holds = [&](u32 offset, u32 size) {
    return offset < r.cold ? offset + size <= r.cold : offset + size <= r.code;
  };
  if (r.cold == 0 || r.cold >= r.code || r.entry >= r.cold || !holds(r.frame_entry, 5) || r.frame_entry >= r.cold) return false;
  if (r.dead_stub >= r.code || r.insns > kMaxBlockInsns || r.bytes == 0 || r.bytes > r.read) return false;
  if (r.offset + r.read > kPageSize || (r.lefts != 0 && r.left >= r.read)) return false;
  const u8* code = record + r.code_at();
  b.clear();
  b.code.assign(code, code + r.code);
  b.entry = r.entry;
  b.frame_entry = r.frame_entry;
  b.cold = r.cold;
  b.dead_stub = r.dead_stub;
  b.insns = r.insns;
  b.bytes = r.bytes;
  out->left_at = r.left;
  const auto moved = [&](u64 v) { return v + move; };
  for (unsigned n = 0; n < r.exits; n++, at += sizeof(KeptExit)) {
    KeptExit k;
    std::memcpy(&k, at, sizeof k);
    DirectExit e;
    e.wide = (k.flags & kWide) != 0;
    e.frame_flags = (k.flags & kFrameFlags) != 0;
    e.ungrouped = (k.flags & kToUngrouped) != 0;
    e.unguarded = (k.flags & kUnguarded) != 0;
    if (!holds(k.field, 4) || !holds(k.slot, 4) || !holds(k.tag, 4) || k.stub >= r.code) return false;
    if (k.bias != kNoBias && !holds(k.bias, e.wide ? 8 : 4)) return false;
    e.field = k.field;
    e.slot = k.slot;
    e.stub = k.stub;
    e.tag = k.tag;
    e.insns = k.flags >> 8;
    e.target = moved(k.target);
    if (move != 0 && e.target < kTop) return false;
    if (k.bias != kNoBias) e.bias = k.bias;
    const u32 tag = (first_tag + n) | (e.ungrouped ? DirectExit::kUngrouped : 0);
    std::memcpy(b.code.data() + k.tag, &tag, 4);
    b.exits.push_back(e);
  }
  for (unsigned n = 0; n < r.faults; n++, at += sizeof(KeptFault)) {
    KeptFault k;
    std::memcpy(&k, at, sizeof k);
    if (k.offset >= r.code) return false;
    b.faults.push_back({k.offset, moved(k.rip), (k.flags & kWindow) != 0, (k.flags & kFlagsInFrame) != 0});
  }
  const auto number = [&] {
    u16 v;
    std::memcpy(&v, at, 2);
    at += 2;
    return v;
  };
  at += 2 * r.addresses;
  for (unsigned n = 0; n < r.relatives; n++) {
    const u32 field = number();
    if (!holds(field, 4)) return false;
    i32 distance;
    std::memcpy(&distance, b.code.data() + field, 4);
    const i64 target = i64{field} + 4 + distance;
    if (target < 0 || target >= r.code) return false;
    b.relatives.push_back(field);
  }
  for (unsigned n = 0; n < r.moves; n++) {
    const u32 kind = number();
    const u32 field = kind & ~u32{kTlbField};
    if (!holds(field, 4)) return false;
    u32 value;
    std::memcpy(&value, b.code.data() + field, 4);
    if ((kind & kTlbField) != 0) {
      if (value >= kTlbBytes) return false;
      value = moved_in_tlb(value, move);
    } else {
      const u64 there = (u64{value} | 0xffffffff00000000) + move;
      if (there < kTop) return false;
      value = static_cast<u32>(there);
    }
    std::memcpy(b.code.data() + field, &value, 4);
  }
  for (unsigned n = 0; n < r.lefts; n++) {
    const u32 field = number();
    if (!holds(field, 4)) return false;
    b.left_at.push_back(field);
  }
  return true;
}

bool KeptCode::find(const Source& source, u32 first_tag, Block* out) {
  const u8* record = lookup(kept_, source);
  if (record != nullptr) {
    used_[static_cast<std::size_t>(record - kept_.bytes.data()) / 64].store(1, std::memory_order_relaxed);
    if (!expand(record, source, first_tag, out)) return false;
  } else {
    const std::lock_guard lock(mutex_);
    record = lookup(fresh_, source);
    if (record == nullptr || !expand(record, source, first_tag, out)) return false;
  }
  found_.fetch_add(1, std::memory_order_relaxed);
  return true;
}

std::optional<std::vector<u16>> moving_fields(const TranslatedBlock& a, const TranslatedBlock& b) {
  constexpr u64 move = KeptCode::kMove;
  if (a.code.size() > 0x7fff) return {};
  if (a.code.size() != b.code.size() || a.entry != b.entry || a.frame_entry != b.frame_entry || a.cold != b.cold) return {};
  if (a.dead_stub != b.dead_stub || a.relatives != b.relatives || a.left_at != b.left_at || a.left != b.left) return {};
  if (a.exits.size() != b.exits.size() || a.faults.size() != b.faults.size() || a.insns != b.insns || a.bytes != b.bytes) return {};
  for (std::size_t n = 0; n < a.exits.size(); n++) {
    const DirectExit &x = a.exits[n], &y = b.exits[n];
    if (x.field != y.field || x.slot != y.slot || x.stub != y.stub || x.tag != y.tag || x.bias != y.bias) return {};
    if (x.frame_flags != y.frame_flags || x.wide != y.wide || x.ungrouped != y.ungrouped || x.insns != y.insns) return {};
    if (y.target - x.target != move || x.target < kTop) return {};
  }
  for (std::size_t n = 0; n < a.faults.size(); n++)
    if (a.faults[n].offset != b.faults[n].offset || a.faults[n].window || b.faults[n].window || b.faults[n].rip - a.faults[n].rip != move || a.faults[n].rip < kTop) return {};
  std::vector<u16> fields;
  // The move leaves an address's lowest byte as it is and changes the second, and a TLB place's lowest: which bytes
  // belong to a field follows from the first that differs.
  static_assert((move & 0xff) == 0 && (move & 0xff00) != 0 && ((move >> kPageShift) * sizeof(Mmu::TlbEntry) & 0xff) != 0);
  const auto both = [&](std::size_t at, u32* x, u32* y) {
    if (at + 4 > a.code.size()) return false;
    std::memcpy(x, a.code.data() + at, 4);
    std::memcpy(y, b.code.data() + at, 4);
    return true;
  };
  std::size_t done = 0;  // what lies before was compared
  for (std::size_t at = 0; at < a.code.size();) {
    u32 x, y;
    if (a.code[at] == b.code[at]) {
      at++;
    } else if (at > done && both(at - 1, &x, &y) && y - x == static_cast<u32>(move) && y > x && x >= static_cast<u32>(kTop)) {
      fields.push_back(static_cast<u16>(at - 1));
      done = at += 3;
    } else if (both(at, &x, &y) && x < kTlbBytes && y == moved_in_tlb(x, move)) {
      fields.push_back(static_cast<u16>(at | kTlbField));
      done = at += 4;
    } else {
      return {};
    }
  }
  return fields;
}

void KeptCode::add(const Source& source, unsigned read, const Block& block, const Moved* moved) {
  const TranslatedBlock& b = *block.code;
  constexpr std::size_t kMost = 0x7fff;
  if (read == 0 || read > source.bytes.size() || b.bytes > read || b.code.size() > kMost || b.exits.size() > kMost ||
      b.faults.size() > kMost || b.relatives.size() > kMost)
    return;
  std::optional<std::vector<u16>> fields;
  if (moved != nullptr) fields = moving_fields(b, *moved->code);
  Record r{};
  r.context = source.context;
  r.rip = source.pic ? 0 : source.rip;
  r.offset = static_cast<u16>(source.rip & (kPageSize - 1));
  r.read = static_cast<u16>(read);
  r.bytes = static_cast<u16>(b.bytes);
  r.insns = static_cast<u16>(b.insns);
  r.code = static_cast<u16>(b.code.size());
  r.cold = static_cast<u16>(b.cold);
  r.entry = static_cast<u16>(b.entry);
  r.frame_entry = static_cast<u16>(b.frame_entry);
  r.dead_stub = static_cast<u16>(b.dead_stub);
  r.left = static_cast<u16>(block.left_at);
  r.exits = static_cast<u16>(b.exits.size());
  r.faults = static_cast<u16>(b.faults.size());
  r.addresses = fields ? static_cast<u16>(moved->addresses.size()) : u16{0};
  r.relatives = static_cast<u16>(b.relatives.size());
  r.moves = fields ? static_cast<u16>(fields->size()) : u16{0};
  r.lefts = static_cast<u16>(b.left_at.size());
  r.mode = source.mode;
  r.flags = static_cast<u8>((source.pic ? kPic : 0) | (fields ? kMoves : 0));
  r.size = static_cast<u32>(aligned(r.end()));

  std::vector<KeptExit> exits;
  for (const DirectExit& e : b.exits) {
    exits.push_back({e.target, static_cast<u16>(e.field), static_cast<u16>(e.slot), static_cast<u16>(e.stub),
                     static_cast<u16>(e.tag), static_cast<u16>(e.bias == DirectExit::kSamePage ? kNoBias : e.bias),
                     static_cast<u16>((e.frame_flags ? kFrameFlags : 0) | (e.wide ? kWide : 0) | (e.ungrouped ? kToUngrouped : 0) |
                                      (e.unguarded ? kUnguarded : 0) | e.insns << 8)});
  }
  std::vector<KeptFault> faults;
  for (const HostFaultPoint& f : b.faults) faults.push_back({f.rip, f.offset, (f.window ? u32{kWindow} : 0) | (f.frame_flags ? u32{kFlagsInFrame} : 0)});
  std::vector<u16> numbers;
  if (fields) numbers.assign(moved->addresses.begin(), moved->addresses.end());
  numbers.insert(numbers.end(), b.relatives.begin(), b.relatives.end());
  if (fields) numbers.insert(numbers.end(), fields->begin(), fields->end());
  numbers.insert(numbers.end(), b.left_at.begin(), b.left_at.end());

  const std::lock_guard lock(mutex_);
  if (kept_.bytes.size() + fresh_.bytes.size() + r.size > 2 * kMaxBytes || lookup(fresh_, source) != nullptr) return;
  const std::size_t start = fresh_.bytes.size();
  if (start + r.size > kMaxBytes - sizeof(Header)) return;
  append(&fresh_.bytes, std::span<const Record>(&r, 1));
  append(&fresh_.bytes, std::span<const KeptExit>(exits));
  append(&fresh_.bytes, std::span<const KeptFault>(faults));
  append(&fresh_.bytes, std::span<const u16>(numbers));
  append(&fresh_.bytes, source.bytes.first(read));
  append(&fresh_.bytes, std::span<const u8>(b.code));
  fresh_.bytes.resize(start + r.size, u8{0});
  fresh_.insert(hash_of(r, fresh_.bytes.data() + start + r.guest_at()), static_cast<u32>(start));
}

KeptCode::Stats KeptCode::stats() const {
  const std::lock_guard lock(mutex_);
  return {found_.load(std::memory_order_relaxed), fresh_.count};
}

std::shared_ptr<KeptCode> KeptCode::parse(RawBytes file, u64 build, std::string* refused, FileSum sum) {
  std::shared_ptr<KeptCode> k(new KeptCode);
  k->build_ = build;
  refused->clear();
  Header h{};
  static_assert(sizeof h == FileSum::kHeader);
  if (file.size() >= sizeof h) std::memcpy(&h, file.data(), sizeof h);
  if (std::memcmp(h.magic, kMagic, sizeof h.magic) != 0) *refused = "it is no file of kept code";
  else if (h.build != build) *refused = "another build of the engine wrote it";
  else if (file.size() > kMaxBytes || h.bytes != file.size() - sizeof h) *refused = "it is cut off";
  else if (h.checksum != sum.value_of(std::span<const u8>(file).subspan(sizeof h))) *refused = "it is damaged";
  if (refused->empty()) {
    k->kept_.bytes = std::move(file);
    k->kept_.first = sizeof h;
    if (!index(&k->kept_, h.records)) *refused = "its records are damaged";
  }
  if (!refused->empty()) k->kept_ = Table{};
  k->used_.reset(new std::atomic<u8>[k->kept_.bytes.size() / 64 + 1]());
  return k;
}

RawBytes KeptCode::file(u64 build) const {
  const std::lock_guard lock(mutex_);
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof h.magic);
  RawBytes out(sizeof h, u8{0});
  out.reserve(std::min(kMaxBytes, kept_.bytes.size() + fresh_.bytes.size() + sizeof h + (kept_.count + fresh_.count) * sizeof(Place)));
  std::vector<Place> places;
  const auto copy = [&](const Table& t, auto&& wanted) {
    Record r;
    for (std::size_t at = t.first; take(t, at, &r); at += r.size) {
      const std::size_t size = out.size() + r.size + (places.size() + 1) * sizeof(Place);
      if (!wanted(at) || size > kMaxBytes) continue;
      const u8* record = t.bytes.data() + at;
      places.push_back({static_cast<u32>(out.size() / 8), hash_of(r, record + r.guest_at())});
      out.insert(out.end(), record, record + r.size);
    }
  };
  const auto used = [&](std::size_t at) { return used_[at / 64].load(std::memory_order_relaxed) != 0; };
  copy(fresh_, [](std::size_t) { return true; });
  copy(kept_, used);
  copy(kept_, [&](std::size_t at) { return !used(at); });
  append(&out, std::span<const Place>(places));
  h.records = places.size();
  std::memcpy(out.data(), &h, sizeof h);
  seal(&out, build);
  return out;
}

void KeptCode::seal(RawBytes* file, u64 build) {
  Header h;
  if (file->size() < sizeof h) return;
  std::memcpy(&h, file->data(), sizeof h);
  h.build = build;
  h.bytes = file->size() - sizeof h;
  h.checksum = FileSum().value_of(std::span<const u8>(*file).subspan(sizeof h));
  std::memcpy(file->data(), &h, sizeof h);
}

bool KeptCode::source_of(std::size_t* at, Source* s) const {
  Record r;
  if (!take(kept_, *at, &r)) return false;
  const u8* record = kept_.bytes.data() + *at;
  *at += r.size;
  *s = {r.context, (r.flags & kPic) != 0 ? r.offset : r.rip, r.mode, (r.flags & kPic) != 0, {record + r.guest_at(), r.read}};
  return true;
}

KeptCode::~KeptCode() { save(); }

}  // namespace ring3::engine
