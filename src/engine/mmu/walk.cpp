#include "engine/mmu/impl.hpp"

/// Page walks. SDM vol. 3A 4.3 (32-bit), 4.4 (PAE), 4.5 (4-level), 4.6 (access rights), 4.7 (error codes),
/// 4.8 (accessed and dirty flags).
namespace ring3::engine {
namespace {

constexpr u64 kP = 1, kW = 2, kU = 4, kA = 0x20, kD = 0x40, kPS = 0x80, kG = 0x100, kNX = 1ull << 63;
constexpr u64 kAddress = 0x000ffffffffff000;

/// An entry used by a walk: kept to set its flags afterwards.
struct Used {
  u8* host = nullptr;  // null: not in writable RAM, flags cannot be set
  const memory::Slot* slot = nullptr;
  Gpa gpa;
  u64 value = 0;
  u64 want = 0;
};

u64 bits_from(unsigned low, unsigned high_exclusive) {
  return ((high_exclusive >= 64 ? 0 : 1ull << high_exclusive) - 1) & ~((1ull << low) - 1);
}

RING3_GUEST_RACE u64 load_entry(const u8* host, unsigned size) {
  // SAFETY: host is aligned to size: tables and indices are.
  if (size == 8) return __atomic_load_n(reinterpret_cast<const u64*>(host), __ATOMIC_RELAXED);
  return __atomic_load_n(reinterpret_cast<const u32*>(host), __ATOMIC_RELAXED);
}

bool exchange_entry(u8* host, unsigned size, u64 expected, u64 desired) {
  if (size == 8) {
    return __atomic_compare_exchange_n(reinterpret_cast<u64*>(host), &expected, desired, false,
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  }
  u32 expected32 = static_cast<u32>(expected);
  return __atomic_compare_exchange_n(reinterpret_cast<u32*>(host), &expected32, static_cast<u32>(desired),
                                     false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

}  // namespace

void Mmu::Impl::configure() {
  const bool on = s.cr0 & cr0::PG;
  paging = !on                       ? Paging::None
           : (s.efer & efer::LMA)    ? Paging::Long
           : (s.cr4 & cr4::PAE) != 0 ? Paging::Pae
                                     : Paging::Legacy;
  wp = s.cr0 & cr0::WP;
  nxe = has_nx && (s.efer & efer::NX) && paging >= Paging::Pae;
  smep = s.cr4 & cr4::SMEP;
  pse = s.cr4 & cr4::PSE;
  pge = s.cr4 & cr4::PGE;
  // Long mode ignores bits 62:52, PAE reserves them.
  reserved_high = bits_from(maxphyaddr, paging == Paging::Pae ? 63 : 52);
  if (!nxe) reserved_high |= kNX;
}

bool Mmu::Impl::is_canonical(u64 linear) const {
  return static_cast<u64>(static_cast<i64>(linear << 16) >> 16) == linear;
}

bool Mmu::Impl::walk(u64 linear, const WalkFor& why, bool set_flags, Walk* out) {
  *out = Walk{};
  if (paging == Paging::None) {
    out->ok = out->writable = out->user = out->dirty = true;
    out->gpa = Gpa(linear & 0xffffffff);
    return true;
  }
  const u32 kind =
      (why.write ? pferr::W : 0) | (why.user ? pferr::U : 0) | (why.fetch && (nxe || smep) ? pferr::I : 0);
  const auto fault = [&](u32 extra) {
    out->error = kind | extra;
    return false;
  };

  for (;;) {
    Used used[4];
    unsigned count = 0;
    bool writable = true, user = true, no_execute = false;
    u64 table_gpa = 0, entry = 0;
    unsigned shift = 0;
    unsigned size = 8;
    switch (paging) {
      case Paging::Long:
        table_gpa = s.cr3 & kAddress;
        shift = 39;
        break;
      case Paging::Pae: {
        const u64 pdpte = s.pdptr[(linear >> 30) & 3];
        if (!(pdpte & kP)) return fault(0);
        table_gpa = pdpte & kAddress;
        shift = 21;
        break;
      }
      default:
        table_gpa = s.cr3 & 0xfffff000;
        shift = 22;
        size = 4;
        break;
    }

    for (;;) {
      const u64 index = size == 8 ? (linear >> shift) & 511 : (linear >> shift) & 1023;
      Used& u = used[count++];
      u.gpa = Gpa(table_gpa + index * size);
      u.slot = find(u.gpa);
      if (u.slot != nullptr) {
        u8* const host = u.slot->host(u.gpa);
        entry = load_entry(host, size);
        if (!u.slot->readonly()) u.host = host;
      } else {
        entry = size == 8 ? ~0ull : 0xffffffff;  // nothing answers on the bus
      }
      u.value = entry;
      if (!(entry & kP)) return fault(0);
      u64 reserved = size == 8 ? reserved_high : 0;
      bool leaf = shift == 12;
      if (shift == 39) {
        reserved |= kPS | (amd ? kG : 0);
      } else if (shift == 30) {
        if (!(entry & kPS)) {
          reserved |= amd ? kG : 0;
        } else if (has_1g) {
          leaf = true;
          reserved |= bits_from(13, 30);
        } else {
          reserved |= kPS;
        }
      } else if (shift == 21 && (entry & kPS)) {
        leaf = true;
        reserved |= bits_from(13, 21);
      } else if (shift == 22 && (entry & kPS) && pse) {
        leaf = true;
        const unsigned top = maxphyaddr < 40 ? (maxphyaddr < 32 ? 32 : maxphyaddr) : 40;
        reserved |= bits_from(13 + (top - 32), 22);
      }
      if (entry & reserved) return fault(pferr::P | pferr::RSVD);
      writable = writable && (entry & kW);
      user = user && (entry & kU);
      no_execute = no_execute || (size == 8 && (entry & kNX) != 0);
      u.want = entry | kA;
      if (leaf) {
        if (why.write) u.want |= kD;
        break;
      }
      table_gpa = entry & (size == 8 ? kAddress : 0xfffff000);
      shift -= size == 8 ? 9 : 10;
    }

    // Access rights (SDM 4.6.1).
    bool denied = false;
    if (why.user) {
      denied = !user || (why.write && !writable) || (why.fetch && no_execute);
    } else if (why.fetch) {
      denied = no_execute || (smep && user);
    } else {
      denied = (why.write && wp && !writable) || (why.no_user && user);
    }
    if (denied) return fault(pferr::P);

    bool again = false;
    for (unsigned i = 0; set_flags && i < count; i++) {
      Used& u = used[i];
      if (u.want == u.value || u.host == nullptr) continue;
      const bool tracked = prepare_store(*u.slot, u.gpa);
      if (!exchange_entry(u.host, size, u.value, u.want)) {
        again = true;  // another processor changed it, or the tables alias: look again
        break;
      }
      if (tracked) {
        Part part;
        part.host = u.host;
        part.gpa = u.gpa;
        part.size = size;
        part.tracked = true;
        stored(part);
      }
    }
    if (again) continue;

    out->settled = true;
    for (unsigned i = 0; !set_flags && i < count; i++) out->settled &= used[i].want == used[i].value;

    const u64 offset_mask = (1ull << shift) - 1;
    u64 base = entry & kAddress;
    if (size == 4) {
      base = entry & 0xfffff000;
      if (shift == 22) base = (entry & 0xffc00000) | ((entry >> 13) & 0xff) << 32;
    }
    out->ok = true;
    out->gpa = Gpa((base & ~offset_mask) | (linear & offset_mask));
    out->shift = static_cast<u8>(shift);
    out->writable = writable;
    out->user = user;
    out->no_execute = no_execute && nxe;
    out->global = pge && (entry & kG);
    out->dirty = entry & kD;
    return true;
  }
}

bool Mmu::load_pdptrs(u64 cr3) {
  const u64 base = cr3 & 0xffffffe0;
  u64 loaded[4];
  impl_->refresh_table();
  for (unsigned i = 0; i < 4; i++) {
    const Gpa at(base + i * 8);
    const memory::Slot* slot = impl_->find(at);
    loaded[i] = slot != nullptr ? load_entry(slot->host(at), 8) : ~0ull;
    const u64 reserved = 0x1e6 | bits_from(impl_->maxphyaddr, 64);
    if ((loaded[i] & kP) && (loaded[i] & reserved)) return false;
  }
  std::memcpy(state_.pdptr, loaded, sizeof loaded);
  return true;
}

Mmu::Translation Mmu::translate(u64 linear) {
  Translation t;
  impl_->refresh_table();
  impl_->configure();
  if (impl_->paging != Impl::Paging::Long) {
    linear &= 0xffffffff;
  } else if (!impl_->is_canonical(linear)) {
    return t;
  }
  Impl::Walk w;
  if (!impl_->walk(linear, Impl::WalkFor{}, false, &w)) return t;
  t.valid = true;
  t.gpa = w.gpa;
  t.writable = w.writable;
  t.user = w.user;
  t.executable = !w.no_execute;
  t.page_size = 1ull << w.shift;
  return t;
}

}  // namespace ring3::engine
