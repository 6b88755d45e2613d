#include "control/cli/text.hpp"

#include <gtest/gtest.h>

namespace ring3::control {
namespace {

TEST(ParseSize, TakesNumbersWithUnits) {
  EXPECT_EQ(parse_size("512M").value(), u64{512} << 20);
  EXPECT_EQ(parse_size("2G").value(), u64{2} << 30);
  EXPECT_EQ(parse_size("2g").value(), u64{2} << 30);
  EXPECT_EQ(parse_size("2GiB").value(), u64{2} << 30);
  EXPECT_EQ(parse_size("2GB").value(), u64{2} << 30);
  EXPECT_EQ(parse_size("64k").value(), u64{64} << 10);
  EXPECT_EQ(parse_size("1T").value(), u64{1} << 40);
  EXPECT_EQ(parse_size("4096").value(), u64{4096});
  EXPECT_EQ(parse_size("4096B").value(), u64{4096});
  EXPECT_EQ(parse_size("0").value(), u64{0});
  EXPECT_EQ(parse_size("1.5G").value(), u64{1536} << 20);
  EXPECT_EQ(parse_size("0.25M").value(), u64{256} << 10);
}

TEST(ParseSize, RefusesEverythingElse) {
  for (const char* text : {"", "G", "-1", "-512M", "+1G", " 1G", "1G ", "1 G", "1.G", ".5G", "1.5.5G", "1e9", "0x100", "1X", "1Gx",
                           "1GiBs", "12 apples", "1.0000000001G", "99999999999999999999", "99999999T", "16777216T", "NaN", "inf",
                           "1,5G", "1.1"}) {
    const auto size = parse_size(text);
    EXPECT_FALSE(size.ok()) << text;
    if (!size.ok()) {
      EXPECT_EQ(size.error().code, EINVAL) << text;
      EXPECT_EQ(size.error().message.find('\n'), std::string::npos) << text;
    }
  }
}

TEST(ParseCount, KeepsToItsRange) {
  EXPECT_EQ(parse_count("1", "--cpus", 1, 8).value(), 1u);
  EXPECT_EQ(parse_count("8", "--cpus", 1, 8).value(), 8u);
  for (const char* text : {"", "0", "9", "-1", "1e9", "1000000000", "99999999999999999999999", "1.0", " 1", "one", "0x1"}) {
    EXPECT_FALSE(parse_count(text, "--cpus", 1, 8).ok()) << text;
  }
}

TEST(FormatSize, Reads) {
  EXPECT_EQ(format_size(512u << 20), "512 MiB");
  EXPECT_EQ(format_size(u64{3} << 29), "1.5 GiB");
  EXPECT_EQ(format_size(100), "100 B");
}

TEST(Printable, KeepsOneLine) {
  EXPECT_EQ(printable("a\nb"), "a\\x0ab");
  EXPECT_LE(printable(std::string(100000, 'x')).size(), 130u);
}

TEST(Printable, LeavesNothingThatATerminalObeys) {
  EXPECT_EQ(printable("\x1b[2J\x7f"), "\\x1b[2J\\x7f");
  EXPECT_EQ(printable("\xc2\x9b" "31m"), "\\xc2\\x9b31m");  // U+009B begins a sequence as ESC [ does
  EXPECT_EQ(printable("\x9b" "31m"), "\\x9b31m");           // and so it does alone, where the terminal is no UTF-8 one
  EXPECT_EQ(printable("\xe0\x82\x9b\xed\xa0\x80\xf4\x90\x80\x80\xc3"), "\\xe0\\x82\\x9b\\xed\\xa0\\x80\\xf4\\x90\\x80\\x80\\xc3");
  EXPECT_EQ(printable("größe 字 🙂"), "größe 字 🙂");
  EXPECT_EQ(printable(std::string(119, 'x') + "字x"), std::string(119, 'x') + "字…");
}

}  // namespace
}  // namespace ring3::control
