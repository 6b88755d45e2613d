#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <numeric>
#include <sstream>
#include <string>

#include "vmm/acpi/aml.hpp"
#include "vmm/acpi/tables.hpp"

namespace ring3::acpi {
namespace {

constexpr u64 kBase = 0xe0000;

u64 get(const std::vector<u8>& b, u64 at, int n) {
  u64 v = 0;
  for (int i = 0; i < n; i++) v |= u64{b.at(at + static_cast<u64>(i))} << (8 * i);
  return v;
}
u8 sum(const std::vector<u8>& b, u64 at, u64 n) {
  return static_cast<u8>(std::accumulate(b.begin() + static_cast<long>(at), b.begin() + static_cast<long>(at + n), 0));
}
std::string signature(const std::vector<u8>& b, u64 at) { return std::string(b.begin() + static_cast<long>(at), b.begin() + static_cast<long>(at) + 4); }

TEST(Aml, Encodings) {
  using aml::Bytes;
  EXPECT_EQ(aml::integer(0), Bytes{0});
  EXPECT_EQ(aml::integer(1), Bytes{1});
  EXPECT_EQ(aml::integer(5), (Bytes{0x0a, 5}));
  EXPECT_EQ(aml::integer(0x1234), (Bytes{0x0b, 0x34, 0x12}));
  EXPECT_EQ(aml::integer(0x12345678), (Bytes{0x0c, 0x78, 0x56, 0x34, 0x12}));
  EXPECT_EQ(aml::integer(u64{1} << 32).size(), 9u);
  EXPECT_EQ(aml::eisa_id("PNP0501"), (Bytes{0x0c, 0x41, 0xd0, 0x05, 0x01}));
  EXPECT_EQ(aml::name_string("\\_SB_"), (Bytes{'\\', '_', 'S', 'B', '_'}));
  EXPECT_EQ(aml::name_string("A.B"), (Bytes{0x2e, 'A', '_', '_', '_', 'B', '_', '_', '_'}));
  EXPECT_EQ(aml::buffer(Bytes{1, 2}), (Bytes{0x11, 5, 0x0a, 2, 1, 2}));
}

TEST(Aml, PackageLengths) {
  // One byte up to 63, then two with the low nibble first (20.2.4).
  const auto lead = [](std::size_t n) { return aml::scope("X", aml::Bytes(n, 0xaa)); };
  EXPECT_EQ(lead(58)[1], 0x3f);
  EXPECT_EQ(lead(59)[1], 0x40 | ((59 + 4 + 2) & 15));
  EXPECT_EQ(lead(59)[2], (59 + 4 + 2) >> 4);
  const auto big = lead(0x2000);
  const std::size_t total = 0x2000 + 4 + 3;
  EXPECT_EQ(big[1], 0x80 | (total & 15));
  EXPECT_EQ(big[2], (total >> 4) & 0xff);
  EXPECT_EQ(big[3], total >> 12);
  EXPECT_EQ(big.size(), total + 1);
}

class TablesTest : public testing::TestWithParam<u32> {};

TEST_P(TablesTest, ChecksumsAndPointers) {
  Platform p;
  p.cpus = GetParam();
  auto built = build(p, Gpa(kBase), 0x20000);
  ASSERT_TRUE(built.ok()) << built.error().message;
  const auto& b = built->bytes;
  EXPECT_EQ(std::string(b.begin(), b.begin() + 8), "RSD PTR ");
  EXPECT_EQ(sum(b, 0, 20), 0);
  EXPECT_EQ(sum(b, 0, 36), 0);
  const u64 xsdt = get(b, 24, 8) - kBase;
  ASSERT_EQ(signature(b, xsdt), "XSDT");
  EXPECT_EQ(sum(b, xsdt, get(b, xsdt + 4, 4)), 0);
  const u64 fadt = get(b, xsdt + 36, 8) - kBase;
  const u64 madt = get(b, xsdt + 44, 8) - kBase;
  ASSERT_EQ(signature(b, fadt), "FACP");
  ASSERT_EQ(signature(b, madt), "APIC");
  EXPECT_EQ(get(b, fadt + 4, 4), 276u);  // revision 6
  EXPECT_EQ(sum(b, fadt, 276), 0);
  EXPECT_EQ(sum(b, madt, get(b, madt + 4, 4)), 0);
  const u64 facs = get(b, fadt + 36, 4) - kBase;
  EXPECT_EQ(signature(b, facs), "FACS");
  EXPECT_EQ(facs % 64, 0u);
  const u64 dsdt = get(b, fadt + 40, 4) - kBase;
  EXPECT_EQ(get(b, fadt + 140, 8) - kBase, dsdt);
  ASSERT_EQ(signature(b, dsdt), "DSDT");
  EXPECT_EQ(sum(b, dsdt, get(b, dsdt + 4, 4)), 0);
  EXPECT_EQ(dsdt + get(b, dsdt + 4, 4), b.size());

  // FADT fields that power off, reset and keep time.
  EXPECT_EQ(get(b, fadt + 46, 2), 9u);
  EXPECT_EQ(get(b, fadt + 48, 4), 0u);
  EXPECT_EQ(get(b, fadt + 56, 4), 0x600u);
  EXPECT_EQ(get(b, fadt + 64, 4), 0x604u);
  EXPECT_EQ(get(b, fadt + 76, 4), 0x608u);
  EXPECT_EQ(get(b, fadt + 80, 4), 0x620u);
  EXPECT_EQ(b[fadt + 108], 0x32);
  const u64 flags = get(b, fadt + 112, 4);
  EXPECT_EQ(flags & (1 << 10), u64{1 << 10});
  EXPECT_EQ(flags & (1 << 20), 0u);  // not hardware-reduced
  EXPECT_EQ(get(b, fadt + 120, 8), 0xcf9u);
  EXPECT_EQ(b[fadt + 128], 6);

  // MADT: walk the entries.
  u32 processors = 0, ioapics = 0, overrides = 0;
  const u64 end = madt + get(b, madt + 4, 4);
  for (u64 at = madt + 44; at < end; at += b[at + 1]) {
    ASSERT_GE(b[at + 1], 2);
    switch (b[at]) {
      case 0:
        EXPECT_EQ(b[at + 3], processors);
        processors++;
        break;
      case 9:
        EXPECT_EQ(get(b, at + 4, 4), processors);
        processors++;
        break;
      case 1:
        ioapics++;
        break;
      case 2:
        overrides++;
        EXPECT_EQ(get(b, at + 4, 4), b[at + 3] == 0 ? 2u : b[at + 3]);
        break;
      default:
        break;
    }
  }
  EXPECT_EQ(processors, p.cpus);
  EXPECT_EQ(ioapics, 1u);
  EXPECT_EQ(overrides, 2u);
}

INSTANTIATE_TEST_SUITE_P(Sizes, TablesTest, testing::Values(1, 2, 64, 254, 300));

TEST(Tables, PciIsToldOnlyWhenThere) {
  Platform p;
  const auto names = [&] {
    auto t = build(p, Gpa(kBase), 0x20000);
    const auto& b = t.value().bytes;
    std::map<std::string, u64> found;
    const u64 xsdt = get(b, 24, 8) - kBase;
    for (u64 at = 36; at < get(b, xsdt + 4, 4); at += 8) {
      const u64 table = get(b, xsdt + at, 8) - kBase;
      EXPECT_EQ(sum(b, table, get(b, table + 4, 4)), 0);
      found[signature(b, table)] = get(b, table + 44, 8);
    }
    return found;
  };
  EXPECT_EQ(names().count("MCFG"), 0u);
  const auto without = build_dsdt(p);
  p.pci = true;
  EXPECT_EQ(names().at("MCFG"), 0xe0000000u);
  EXPECT_GT(build_dsdt(p).size(), without.size() + 32 * 10);  // _PRT
}

TEST(Tables, SaysWhenTheyDoNotFit) {
  Platform p;
  p.cpus = 254;
  auto r = build(p, Gpa(kBase), 0x1000);
  ASSERT_FALSE(r.ok());
  EXPECT_EQ(r.error().code, ENOSPC);
}

// The reference compiler reads our DSDT back, where it is installed (acpica-tools).
TEST(Tables, IaslDisassemblesTheDsdt) {
  if (std::system("command -v iasl >/dev/null 2>&1") != 0) GTEST_SKIP() << "iasl is not installed";
  char dir[] = "/tmp/ring3-acpi-XXXXXX";
  ASSERT_NE(mkdtemp(dir), nullptr);
  Platform p;
  p.cpus = 20;
  p.pci = true;
  const auto dsdt = build_dsdt(p);
  const std::string base = std::string(dir) + "/dsdt";
  std::ofstream(base + ".aml", std::ios::binary).write(reinterpret_cast<const char*>(dsdt.data()), static_cast<long>(dsdt.size()));
  // Disassembled, and compiled again without an error.
  EXPECT_EQ(std::system(("cd " + std::string(dir) + " && iasl -d dsdt.aml >d.log 2>&1 && iasl -p again dsdt.dsl >c.log 2>&1").c_str()), 0);
  std::ifstream in(base + ".dsl");
  std::stringstream text;
  text << in.rdbuf();
  for (const char* wanted : {"PNP0501", "PNP0B00", "QEMU0001", "_S5", "ACPI0007", "0x03F8", "0x0505", "Device (C013)", "PNP0A08", "_PRT", "PNP0C02", "0xC0000000"}) {
    EXPECT_NE(text.str().find(wanted), std::string::npos) << wanted;
  }
  EXPECT_EQ(std::system(("rm -r " + std::string(dir)).c_str()), 0);
}

}  // namespace
}  // namespace ring3::acpi
