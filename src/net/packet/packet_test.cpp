#include "net/packet/packet.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "net/packet/checksum.hpp"

namespace ring3::net {
namespace {

const Mac kA{{2, 0, 0, 0, 0, 1}};
const Mac kB{{2, 0, 0, 0, 0, 2}};
const Ip kV4a = Ip::v4(10, 0, 2, 15);
const Ip kV4b = Ip::v4(10, 0, 2, 2);
const Ip kV6a = Ip::v6(0xfec0, 15);
const Ip kV6b = Ip::v6(0xfec0, 2);

std::vector<u8> frame(const Ip& from, const Ip& to, u8 protocol, const std::vector<u8>& payload) {
  std::vector<u8> f(kEthHeader + kIp6Header + payload.size());
  const std::size_t n = put_headers(f.data(), kA, kB, from, to, protocol, payload.size(), 7);
  f.resize(n + payload.size());
  if (!payload.empty()) std::memcpy(f.data() + n, payload.data(), payload.size());
  return f;
}

void fix_ip4(std::vector<u8>& f) {
  const std::size_t header = static_cast<std::size_t>(f[kEthHeader] & 15) * 4;
  put16(&f[kEthHeader + 10], 0);
  put16(&f[kEthHeader + 10], checksum({&f[kEthHeader], header}));
}

TEST(Address, Text) {
  EXPECT_EQ(to_string(*parse_ip_text("10.0.2.15")), "10.0.2.15");
  EXPECT_EQ(to_string(*parse_ip_text("fec0::2")), "fec0::2");
  EXPECT_FALSE(parse_ip_text("10.0.2"));
  EXPECT_FALSE(parse_ip_text(""));
  EXPECT_TRUE(parse_ip_text("10.0.2.15")->is_v4());
  EXPECT_FALSE(parse_ip_text("::1")->is_v4());
  EXPECT_TRUE(parse_ip_text("::1")->is_loopback());
  EXPECT_TRUE(parse_ip_text("169.254.169.254")->is_link_local());
  EXPECT_TRUE(kV4a.in(Ip::v4(10, 0, 2, 0), 96 + 24));
  EXPECT_FALSE(kV4a.in(Ip::v4(10, 0, 3, 0), 96 + 24));
  EXPECT_EQ(to_string(Endpoint{kV6a, 80, 0}), "[fec0::f]:80");
  EXPECT_EQ(to_string(*parse_mac("52:54:00:AB:cd:ef")), "52:54:00:ab:cd:ef");
  for (const char* bad : {"", "52:54:00:ab:cd", "53:54:00:ab:cd:ef", "52-54-00-ab-cd-ef", "00:00:00:00:00:00", "52:54:00:ab:cd:eg"}) {
    EXPECT_FALSE(parse_mac(bad)) << bad;
  }
}

TEST(Checksum, KnownValue) {
  // RFC 1071's example, 3.
  const std::vector<u8> bytes{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7};
  EXPECT_EQ(sum_fold(sum_add(0, bytes)), 0xddf2);
  EXPECT_EQ(checksum(bytes), 0x220d);
}

TEST(Checksum, AnyLengthAgainstTheDefinition) {
  std::vector<u8> bytes;
  for (unsigned n = 0; n < 300; n++) {
    u32 sum = 0;
    for (std::size_t i = 0; i < bytes.size(); i += 2) sum += static_cast<u32>(bytes[i] << 8) + (i + 1 < bytes.size() ? bytes[i + 1] : 0);
    while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
    ASSERT_EQ(sum_fold(sum_add(0, bytes)), sum) << n;
    bytes.push_back(static_cast<u8>(n * 37 + 11));
  }
}

TEST(ParseIp, WhatPutHeadersWrote) {
  for (const bool v4 : {true, false}) {
    auto f = frame(v4 ? kV4a : kV6a, v4 ? kV4b : kV6b, kProtoUdp, {1, 2, 3});
    f.resize(60);  // Ethernet's padding is none of the packet
    IpPacket p;
    ASSERT_EQ(parse_ip(f, p), Drop::kNone);
    EXPECT_EQ(p.source, v4 ? kV4a : kV6a);
    EXPECT_EQ(p.destination, v4 ? kV4b : kV6b);
    EXPECT_EQ(p.protocol, kProtoUdp);
    EXPECT_EQ(p.payload.size(), 3u);
    EXPECT_EQ(p.ttl, 64);
    EXPECT_FALSE(p.fragment);
  }
}

TEST(ParseIp, EveryTruncationIsRefusedOrExact) {
  for (const bool v4 : {true, false}) {
    const auto f = frame(v4 ? kV4a : kV6a, v4 ? kV4b : kV6b, kProtoUdp, std::vector<u8>(20));
    for (std::size_t n = 0; n < f.size(); n++) {
      IpPacket p;
      EXPECT_EQ(parse_ip(std::span(f).first(n), p), Drop::kTruncated) << n;
    }
  }
}

TEST(ParseIp, Ip4Fields) {
  IpPacket p;
  auto bad = frame(kV4a, kV4b, kProtoUdp, std::vector<u8>(20));
  bad[kEthHeader + 8] ^= 1;
  EXPECT_EQ(parse_ip(bad, p), Drop::kChecksum);
  bad = frame(kV4a, kV4b, kProtoUdp, std::vector<u8>(20));
  bad[kEthHeader] = 0x44;  // a header of 16 bytes
  EXPECT_EQ(parse_ip(bad, p), Drop::kMalformed);
  bad[kEthHeader] = 0x65;
  EXPECT_EQ(parse_ip(bad, p), Drop::kMalformed);
  bad = frame(kV4a, kV4b, kProtoUdp, std::vector<u8>(20));
  put16(&bad[kEthHeader + 2], 19);  // total shorter than the header
  fix_ip4(bad);
  EXPECT_EQ(parse_ip(bad, p), Drop::kMalformed);
}

TEST(ParseIp, Ip4Options) {
  const auto with = [&](std::vector<u8> options) {
    auto f = frame(kV4a, kV4b, kProtoUdp, std::vector<u8>(20));
    options.resize((options.size() + 3) & ~std::size_t{3});
    f.insert(f.begin() + kEthHeader + 20, options.begin(), options.end());
    f[kEthHeader] = static_cast<u8>(0x45 + options.size() / 4);
    put16(&f[kEthHeader + 2], static_cast<u32>(40 + options.size()));
    fix_ip4(f);
    IpPacket p;
    const Drop d = parse_ip(f, p);
    EXPECT_TRUE(d != Drop::kNone || p.payload.size() == 20u);
    return d;
  };
  EXPECT_EQ(with({1, 1, 1, 0}), Drop::kNone);
  EXPECT_EQ(with({148, 4, 0, 0}), Drop::kNone);                       // router alert
  EXPECT_EQ(with({131, 7, 4, 1, 2, 3, 4}), Drop::kOption);            // loose source route
  EXPECT_EQ(with({137, 7, 4, 1, 2, 3, 4}), Drop::kOption);
  EXPECT_EQ(with({7, 0, 0, 0}), Drop::kMalformed);                    // a length that would loop for ever
  EXPECT_EQ(with({7, 1, 0, 0}), Drop::kMalformed);
  EXPECT_EQ(with({7, 200, 0, 0}), Drop::kMalformed);
  EXPECT_EQ(with({1, 1, 1, 7}), Drop::kMalformed);                    // the length is not there
}

TEST(ParseIp, Ip6ExtensionHeaders) {
  const auto with = [&](std::vector<u8> chain, u8 first) {
    chain.insert(chain.end(), 12, 0xee);
    auto f = frame(kV6a, kV6b, first, chain);
    IpPacket p;
    const Drop d = parse_ip(f, p);
    EXPECT_TRUE(d != Drop::kNone || p.fragment || p.protocol == kProtoUdp);
    return d;
  };
  EXPECT_EQ(with({kProtoUdp, 0, 1, 4, 0, 0, 0, 0}, kProtoHopByHop), Drop::kNone);
  EXPECT_EQ(with({kProtoUdp, 0, 0, 0, 0, 0, 0, 0}, kProtoRouting), Drop::kNone);
  EXPECT_EQ(with({kProtoUdp, 0, 0, 1, 0, 0, 0, 0}, kProtoRouting), Drop::kOption);
  EXPECT_EQ(with({kProtoUdp, 255, 0, 0, 0, 0, 0, 0}, kProtoDestOptions), Drop::kTruncated);
  EXPECT_EQ(with({kProtoUdp, 0, 0, 0, 0, 0, 0, 9}, kProtoFragment), Drop::kNone);
  std::vector<u8> nine;
  for (int i = 0; i < 9; i++) nine.insert(nine.end(), {i == 8 ? kProtoUdp : kProtoDestOptions, 0, 1, 4, 0, 0, 0, 0});
  EXPECT_EQ(with(nine, kProtoDestOptions), Drop::kOption);
  std::vector<u8> twice{kProtoFragment, 0, 0, 0, 0, 0, 0, 1, kProtoUdp, 0, 0, 9, 0, 0, 0, 1};
  EXPECT_EQ(with(twice, kProtoFragment), Drop::kNone);  // an atomic one, then a real one: still a piece
}

TEST(ParseIp, MappedAddressesDoNotCross) {
  Ip mapped = Ip::v4(127, 0, 0, 1);
  auto f = frame(kV6a, kV6b, kProtoUdp, std::vector<u8>(20));
  std::memcpy(&f[kEthHeader + 24], mapped.b.data(), 16);
  IpPacket p;
  EXPECT_EQ(parse_ip(f, p), Drop::kAddress);
}

TEST(ParseTcp, OptionsAndOffsets) {
  std::vector<u8> s(28);
  put16(&s[0], 1000);
  put16(&s[2], 80);
  put32(&s[4], 0x01020304);
  s[12] = 7 << 4;
  s[13] = kTcpSyn;
  const u8 options[8] = {2, 4, 5, 0xb4, 1, 3, 3, 200};
  std::memcpy(&s[20], options, 8);
  TcpSegment t;
  ASSERT_EQ(parse_tcp(s, t), Drop::kNone);
  EXPECT_EQ(t.mss, 1460);
  EXPECT_EQ(t.window_scale, 14);  // no more than that
  EXPECT_EQ(t.seq, 0x01020304u);
  s[21] = 0;  // an option of length 0 ends them
  ASSERT_EQ(parse_tcp(s, t), Drop::kNone);
  EXPECT_FALSE(t.mss);
  s[12] = 8 << 4;
  EXPECT_EQ(parse_tcp(s, t), Drop::kTruncated);
  s[12] = 4 << 4;
  EXPECT_EQ(parse_tcp(s, t), Drop::kMalformed);
  s.resize(19);
  EXPECT_EQ(parse_tcp(s, t), Drop::kTruncated);
}

TEST(ParseUdp, Lengths) {
  std::vector<u8> s(12);
  UdpDatagram d;
  put16(&s[4], 10);
  ASSERT_EQ(parse_udp(s, d), Drop::kNone);
  EXPECT_EQ(d.data.size(), 2u);
  put16(&s[4], 13);
  EXPECT_EQ(parse_udp(s, d), Drop::kTruncated);
  put16(&s[4], 7);
  EXPECT_EQ(parse_udp(s, d), Drop::kMalformed);
}

}  // namespace
}  // namespace ring3::net
