#include "vmm/machine/cpu_model.hpp"

#include <algorithm>
#include <bit>
#include <cctype>
#include <string_view>

namespace ring3::vmm {
namespace {

enum Word : u8 { k1Ecx, k1Edx, k7Ebx, k7Ecx, k7Edx, k72Edx /* subleaf 2 */, kExtEcx, kExtEdx, kWords };
enum Level : u8 { kBase, kV2, kV3, kExtra };  // kExtra: only with host or by name

struct Feature {
  const char* name;
  Word word;
  u8 bit;
  Level level;
};

// SDM volume 2, CPUID; APM volume 3, appendix E. Levels: x86-64 psABI, 3.1.1.
constexpr Feature kFeatures[] = {
    {"fpu", k1Edx, 0, kBase}, {"vme", k1Edx, 1, kBase}, {"de", k1Edx, 2, kBase}, {"pse", k1Edx, 3, kBase},
    {"tsc", k1Edx, 4, kBase}, {"msr", k1Edx, 5, kBase}, {"pae", k1Edx, 6, kBase}, {"mce", k1Edx, 7, kBase},
    {"cx8", k1Edx, 8, kBase}, {"apic", k1Edx, 9, kBase}, {"sep", k1Edx, 11, kBase}, {"mtrr", k1Edx, 12, kBase},
    {"pge", k1Edx, 13, kBase}, {"mca", k1Edx, 14, kBase}, {"cmov", k1Edx, 15, kBase}, {"pat", k1Edx, 16, kBase},
    {"pse36", k1Edx, 17, kBase}, {"clflush", k1Edx, 19, kBase}, {"mmx", k1Edx, 23, kBase}, {"fxsr", k1Edx, 24, kBase},
    {"sse", k1Edx, 25, kBase}, {"sse2", k1Edx, 26, kBase}, {"ss", k1Edx, 27, kBase}, {"ht", k1Edx, 28, kBase},

    {"pni", k1Ecx, 0, kV2}, {"sse3", k1Ecx, 0, kV2}, {"pclmulqdq", k1Ecx, 1, kBase}, {"monitor", k1Ecx, 3, kExtra},
    {"ssse3", k1Ecx, 9, kV2}, {"fma", k1Ecx, 12, kV3}, {"cx16", k1Ecx, 13, kV2}, {"pcid", k1Ecx, 17, kBase},
    {"sse4-1", k1Ecx, 19, kV2}, {"sse4.1", k1Ecx, 19, kV2}, {"sse4-2", k1Ecx, 20, kV2}, {"sse4.2", k1Ecx, 20, kV2},
    {"x2apic", k1Ecx, 21, kBase}, {"movbe", k1Ecx, 22, kV3}, {"popcnt", k1Ecx, 23, kV2},
    {"tsc-deadline-timer", k1Ecx, 24, kBase}, {"aes", k1Ecx, 25, kBase}, {"xsave", k1Ecx, 26, kBase},
    {"osxsave", k1Ecx, 27, kBase}, {"avx", k1Ecx, 28, kV3}, {"f16c", k1Ecx, 29, kV3}, {"rdrand", k1Ecx, 30, kBase},
    {"hypervisor", k1Ecx, 31, kBase},

    {"fsgsbase", k7Ebx, 0, kBase}, {"tsc-adjust", k7Ebx, 1, kBase}, {"bmi1", k7Ebx, 3, kV3}, {"hle", k7Ebx, 4, kExtra},
    {"avx2", k7Ebx, 5, kV3}, {"smep", k7Ebx, 7, kBase}, {"bmi2", k7Ebx, 8, kV3}, {"erms", k7Ebx, 9, kBase},
    {"invpcid", k7Ebx, 10, kBase}, {"rtm", k7Ebx, 11, kExtra}, {"avx512f", k7Ebx, 16, kExtra},
    {"avx512dq", k7Ebx, 17, kExtra}, {"rdseed", k7Ebx, 18, kBase}, {"adx", k7Ebx, 19, kBase}, {"smap", k7Ebx, 20, kBase},
    {"clflushopt", k7Ebx, 23, kBase}, {"clwb", k7Ebx, 24, kBase}, {"avx512cd", k7Ebx, 28, kExtra},
    {"sha-ni", k7Ebx, 29, kBase}, {"avx512bw", k7Ebx, 30, kExtra}, {"avx512vl", k7Ebx, 31, kExtra},
    {"avx512ifma", k7Ebx, 21, kExtra}, {"avx512vbmi", k7Ecx, 1, kExtra}, {"avx512-vbmi2", k7Ecx, 6, kExtra},
    {"avx512-vnni", k7Ecx, 11, kExtra}, {"avx512-bitalg", k7Ecx, 12, kExtra}, {"avx512-vpopcntdq", k7Ecx, 14, kExtra},
    {"avx512-vp2intersect", k7Edx, 8, kExtra}, {"avx512-fp16", k7Edx, 23, kExtra},

    {"umip", k7Ecx, 2, kBase}, {"pku", k7Ecx, 3, kExtra}, {"gfni", k7Ecx, 8, kExtra}, {"vaes", k7Ecx, 9, kExtra},
    {"vpclmulqdq", k7Ecx, 10, kExtra}, {"la57", k7Ecx, 16, kExtra}, {"rdpid", k7Ecx, 22, kBase},
    {"fsrm", k7Edx, 4, kBase}, {"md-clear", k7Edx, 10, kBase}, {"spec-ctrl", k7Edx, 26, kBase},
    {"stibp", k7Edx, 27, kBase}, {"flush-l1d", k7Edx, 28, kBase}, {"arch-capabilities", k7Edx, 29, kBase},
    {"ssbd", k7Edx, 31, kBase},

    {"bhi-ctrl", k72Edx, 4, kBase}, {"mcdt-no", k72Edx, 5, kBase},

    {"lahf-lm", kExtEcx, 0, kV2}, {"cmp-legacy", kExtEcx, 1, kBase}, {"cr8-legacy", kExtEcx, 4, kBase},
    {"abm", kExtEcx, 5, kV3}, {"lzcnt", kExtEcx, 5, kV3}, {"sse4a", kExtEcx, 6, kBase}, {"misalignsse", kExtEcx, 7, kBase},
    {"3dnowprefetch", kExtEcx, 8, kBase}, {"osvw", kExtEcx, 9, kBase}, {"xop", kExtEcx, 11, kExtra},
    {"fma4", kExtEcx, 16, kExtra}, {"tbm", kExtEcx, 21, kExtra}, {"topoext", kExtEcx, 22, kBase},
    {"syscall", kExtEdx, 11, kBase}, {"nx", kExtEdx, 20, kBase}, {"mmxext", kExtEdx, 22, kBase},
    {"fxsr-opt", kExtEdx, 25, kBase}, {"pdpe1gb", kExtEdx, 26, kBase}, {"rdtscp", kExtEdx, 27, kBase},
    {"lm", kExtEdx, 29, kBase},
};

// In 0x80000001 EDX, AMD repeats these bits of leaf 1 EDX.
constexpr u32 kExtEdxCopies = 0x0183f3ff;

u32* word_of(std::vector<kvm_cpuid_entry2>& entries, Word word) {
  for (auto& e : entries) {
    if (e.function == 1 && word == k1Ecx) return &e.ecx;
    if (e.function == 1 && word == k1Edx) return &e.edx;
    if (e.function == 7 && e.index == 0 && word == k7Ebx) return &e.ebx;
    if (e.function == 7 && e.index == 0 && word == k7Ecx) return &e.ecx;
    if (e.function == 7 && e.index == 0 && word == k7Edx) return &e.edx;
    if (e.function == 7 && e.index == 2 && word == k72Edx) return &e.edx;
    if (e.function == 0x80000001 && word == kExtEcx) return &e.ecx;
    if (e.function == 0x80000001 && word == kExtEdx) return &e.edx;
  }
  return nullptr;
}

const Feature* find_feature(std::string name) {
  std::transform(name.begin(), name.end(), name.begin(),
                 [](char c) { return c == '_' ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c))); });
  for (const auto& f : kFeatures) {
    if (name == f.name) return &f;
  }
  return nullptr;
}

// Leaf 0xd: only the state components that the remaining features have.
void trim_xsave(std::vector<kvm_cpuid_entry2>& entries, bool xsave, u32 components) {
  std::erase_if(entries, [&](const auto& e) {
    return e.function == 0xd && (!xsave || e.index > 31 || (e.index >= 2 && !(components >> e.index & 1)));
  });
  u32 size = 576;  // SDM volume 1, 13.5: legacy and header, and the components behind
  for (const auto& e : entries)
    if (e.function == 0xd && e.index >= 2) size = std::max(size, e.ebx + e.eax);
  for (auto& e : entries) {
    if (e.function != 0xd) continue;
    if (e.index == 0) {
      e.eax &= components;
      e.edx = 0;
      e.ecx = size;
      e.ebx = std::min(e.ebx, e.ecx);
    } else if (e.index == 1) {
      e.eax &= 0xf;
      e.ecx = e.edx = 0;
    }
  }
}

/// Programs that are compiled for several processors choose by family and model alone (GCC's target_clones, arch=): a model must not
/// have more than is offered. 0: as it is.
u32 signature_for(std::vector<kvm_cpuid_entry2>& entries) {
  constexpr u32 kIntel = 0x756e6547, kAmd = 0x68747541;  // leaf 0 EBX
  constexpr u32 kHaswell = 0x306c3, kNehalem = 0x106a3, kCore2 = 0x6fb, kMilan = 0xa00f11;
  const auto reaches = [&](Level level) {
    return std::all_of(std::begin(kFeatures), std::end(kFeatures), [&](const Feature& f) {
      const u32* const w = word_of(entries, f.word);
      return f.level == kBase || f.level > level || (w != nullptr && (*w >> f.bit & 1) != 0);
    });
  };
  const auto leaf = [&](u32 function) {
    return std::find_if(entries.begin(), entries.end(), [&](const auto& e) { return e.function == function; });
  };
  const auto vendor = leaf(0), first = leaf(1);
  if (vendor == entries.end() || first == entries.end()) return 0;
  if (vendor->ebx == kIntel) return reaches(kV3) ? kHaswell : reaches(kV2) ? kNehalem : kCore2;
  // Those before Zen 4 have not much more.
  const u32 family = 0xf + (first->eax >> 20 & 0xff), model = (first->eax >> 12 & 0xf0) | (first->eax >> 4 & 0xf);
  const bool zen4 = family > 0x19 || (family == 0x19 && ((model >= 0x10 && model <= 0x1f) || model >= 0x60));
  return vendor->ebx == kAmd && zen4 ? kMilan : 0;
}

}  // namespace

Result<std::vector<kvm_cpuid_entry2>> cpu_model(const std::string& specification, std::vector<kvm_cpuid_entry2> entries) {
  std::vector<std::string> parts;
  for (std::size_t at = 0; at <= specification.size();) {
    const std::size_t comma = std::min(specification.find(',', at), specification.size());
    parts.push_back(specification.substr(at, comma - at));
    at = comma + 1;
  }
  const std::string model = parts.front();
  const bool host = model == "host";
  const bool v2 = model == "x86-64-v2";
  const bool v3 = model == "x86-64-v3";
  if (!host && !v2 && !v3 && model != "default") {
    return Error::of(EINVAL, "unknown CPU model '" + model + "': there are default, host, x86-64-v2, x86-64-v3");
  }
  const auto supported = entries;
  const auto has = [&](const Feature& f) {
    auto copy = supported;
    const u32* w = word_of(copy, f.word);
    return w != nullptr && (*w >> f.bit & 1) != 0;
  };
  const std::string lacks = "this KVM does not offer the CPU feature ";
  if (v2 || v3) {
    for (const auto& f : kFeatures) {
      if ((f.level == kV2 || (v3 && f.level == kV3)) && !has(f)) {
        return Error::of(EINVAL, lacks + f.name + ", which " + model + " needs: choose another --cpu");
      }
    }
  }
  u32 keep[kWords] = {};
  if (host) {
    std::fill(std::begin(keep), std::end(keep), ~u32{0});
  } else {
    for (const auto& f : kFeatures) {
      if (f.level == kBase || f.level == kV2 || (f.level == kV3 && !v2)) keep[f.word] |= u32{1} << f.bit;
    }
    keep[kExtEdx] |= kExtEdxCopies;
  }
  for (std::size_t i = 1; i < parts.size(); i++) {
    const std::string& part = parts[i];
    const Feature* f = part.size() > 1 ? find_feature(part.substr(1)) : nullptr;
    if (f == nullptr || (part[0] != '+' && part[0] != '-')) {
      return Error::of(EINVAL, "'" + part + "' is no CPU feature: write +name or -name with a name as in /proc/cpuinfo");
    }
    if (part[0] == '+') {
      if (!has(*f)) return Error::of(EINVAL, lacks + f->name);
      keep[f->word] |= u32{1} << f->bit;
    } else {
      keep[f->word] &= ~(u32{1} << f->bit);
    }
  }
  const bool xsave = keep[k1Ecx] >> 26 & 1;
  if (!xsave) keep[k1Ecx] &= ~(u32{1} << 28 | u32{1} << 12 | u32{1} << 29);  // AVX, FMA, F16C need it
  if (!(keep[k1Ecx] >> 28 & 1)) {
    keep[k1Ecx] &= ~(u32{1} << 12 | u32{1} << 29);
    keep[k7Ebx] &= ~(u32{1} << 5);
  }
  // AVX-512's extensions need its foundation.
  const bool avx512 = (keep[k7Ebx] >> 16 & 1) && (keep[k1Ecx] >> 28 & 1);
  if (!avx512) {
    keep[k7Ebx] &= ~(u32{1} << 16 | u32{1} << 17 | u32{1} << 21 | u32{1} << 28 | u32{1} << 30 | u32{1} << 31);
    keep[k7Ecx] &= ~(u32{1} << 1 | u32{1} << 6 | u32{1} << 11 | u32{1} << 12 | u32{1} << 14);
    keep[k7Edx] &= ~(u32{1} << 8 | u32{1} << 23);
    for (auto& e : entries)
      if (e.function == 7 && e.index == 1) e.eax &= ~(u32{1} << 5);
    const auto leaf_d = std::find_if(entries.begin(), entries.end(), [](const auto& e) { return e.function == 0xd && e.index == 0; });
    if (host && leaf_d != entries.end() && (leaf_d->eax & 0xe0) != 0) trim_xsave(entries, xsave, leaf_d->eax & ~0xe0u);
  }
  for (u8 w = 0; w < kWords; w++) {
    if (u32* word = word_of(entries, static_cast<Word>(w))) *word &= keep[w];
  }
  const bool pku = keep[k7Ecx] >> 3 & 1;
  if (!host) {
    if (!pku) trim_xsave(entries, xsave, 3u | (keep[k1Ecx] >> 28 & 1 ? 4u : 0) | (avx512 ? 0xe0u : 0));
    // Performance counters and what newer sub-leaves add, but for the features above, are not part of a stable model.
    const u32* const newer = word_of(entries, k72Edx);
    const bool subleaf2 = newer != nullptr && *newer != 0;
    for (auto& e : entries) {
      const u32 kept = e.function == 7 && e.index == 2 ? e.edx : 0;
      if (e.function == 0xa || (e.function == 7 && e.index > 0)) e.eax = e.ebx = e.ecx = e.edx = 0;
      if (e.function == 7 && e.index == 0) e.eax = subleaf2 ? 2 : 0;
      e.edx |= kept;
    }
    if (const u32 signature = signature_for(entries); signature != 0)
      for (auto& e : entries)
        if (e.function == 1) e.eax = signature;
  }
  return entries;
}

std::vector<kvm_cpuid_entry2> cpuid_for_vcpu(std::span<const kvm_cpuid_entry2> model, u32 id, u32 count,
                                             bool tsc_deadline) {
  std::vector<kvm_cpuid_entry2> out(model.begin(), model.end());
  const u32 id_bits = static_cast<u32>(std::bit_width(count - 1));
  const auto field = [](u32 value, u32 high, u32 low, u32 with) {
    const u32 width = high - low + 1;
    const u32 mask = (width >= 32 ? ~u32{0} : (u32{1} << width) - 1);
    return (value & ~(mask << low)) | (std::min(with, mask) << low);
  };
  u32 max_leaf = 0;
  for (auto& e : out) {
    switch (e.function) {
      case 0:
        max_leaf = e.eax;
        break;
      case 1:
        e.ebx = field(e.ebx, 31, 24, id & 0xff);
        e.ebx = field(e.ebx, 23, 16, std::min(u32{1} << id_bits, u32{255}));
        e.edx = field(e.edx, 28, 28, count > 1);
        e.ecx |= u32{1} << 31;
        if (tsc_deadline) e.ecx |= u32{1} << 24;
        e.ecx &= ~(u32{1} << 27);  // OSXSAVE follows CR4 at run time
        break;
      case 4:
      case 0x8000001d: {
        const u32 level = e.eax >> 5 & 7;
        if ((e.eax & 0x1f) == 0) break;
        e.eax = field(e.eax, 25, 14, level >= 3 ? (u32{1} << id_bits) - 1 : 0);
        if (e.function == 4) e.eax = field(e.eax, 31, 26, (u32{1} << id_bits) - 1);
        break;
      }
      case 0x80000001:
        // CmpLegacy: AMD's way to say that the logical processors of a package are cores.
        if (e.ecx & 2 && count == 1) e.ecx &= ~u32{2};
        break;
      case 0x80000008:
        e.ecx = field(e.ecx, 7, 0, count - 1);
        e.ecx = field(e.ecx, 15, 12, id_bits);
        break;
      case 0x8000001e:
        e.eax = id;
        e.ebx = id & 0xff;  // core id; one thread a core
        e.ecx = 0;
        break;
      default:
        break;
    }
  }
  // Leaves 0xb and 0x1f: SMT level of one, then cores.
  const auto topology = [&](u32 leaf) {
    std::erase_if(out, [&](const auto& e) { return e.function == leaf; });
    const u32 rows[3][3] = {{0, 1, 0x100}, {id_bits, count, 0x201}, {0, 0, 2}};
    for (u32 i = 0; i < 3; i++) {
      kvm_cpuid_entry2 e{};
      e.function = leaf;
      e.index = i;
      e.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
      e.eax = rows[i][0], e.ebx = rows[i][1], e.ecx = rows[i][2], e.edx = id;
      out.push_back(e);
    }
  };
  if (max_leaf >= 0xb) topology(0xb);
  if (max_leaf >= 0x1f) topology(0x1f);
  return out;
}

}  // namespace ring3::vmm
