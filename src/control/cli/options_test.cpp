#include "control/cli/options.hpp"

#include <gtest/gtest.h>

namespace ring3::control {
namespace {

RunOptions run_of(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), {"run", "--kernel", "k"});
  auto command = parse_command_line(arguments);
  EXPECT_TRUE(command.ok()) << command.error().message;
  return std::get<RunOptions>(command.value());
}

std::string error_of(const std::vector<std::string>& arguments) {
  auto command = parse_command_line(arguments);
  if (command.ok()) return "";
  EXPECT_EQ(command.error().code, EINVAL);
  EXPECT_EQ(command.error().message.find('\n'), std::string::npos);
  return command.error().message;
}

TEST(Options, Defaults) {
  const RunOptions run = run_of({});
  EXPECT_EQ(run.memory_bytes, u64{1} << 30);
  EXPECT_EQ(run.cpus, 1u);
  EXPECT_FALSE(run.engine.has_value());
  EXPECT_EQ(run.console, "stdio");
  EXPECT_FALSE(run.append.has_value());
  EXPECT_FALSE(run.no_reboot);
  EXPECT_FALSE(run.test_device);
}

TEST(Options, AllOfRun) {
  const RunOptions run = run_of({"-n", "one", "-m", "512M", "-c", "3", "--engine", "soft", "--cpu", "x86-64-v2", "--initrd", "i",
                                 "--append", "console=ttyS0 a=b", "--console", "file:x y", "--no-reboot", "--test-device", "--log",
                                 "debug", "--engine-option", "a=1", "--engine-option", "b=2,3=4"});
  EXPECT_EQ(run.name, "one");
  EXPECT_EQ(run.memory_bytes, u64{512} << 20);
  EXPECT_EQ(run.cpus, 3u);
  EXPECT_EQ(run.engine, EngineKind::kSoft);
  EXPECT_EQ(run.cpu, "x86-64-v2");
  EXPECT_EQ(run.initrd, "i");
  EXPECT_EQ(run.append, "console=ttyS0 a=b");
  EXPECT_EQ(run.console, "file:x y");
  EXPECT_TRUE(run.no_reboot);
  EXPECT_TRUE(run.test_device);
  EXPECT_EQ(run.log, "debug");
  EXPECT_EQ(run.engine_options, (EngineOptionMap{{"a", "1"}, {"b", "2,3=4"}}));
  EXPECT_EQ(run_of({"--engine-option", "interpreter"}).engine_options, (EngineOptionMap{{"engine", "interpreter"}}));
}

TEST(Options, ValuesThatLookLikeSomethingElse) {
  EXPECT_EQ(run_of({"--append", ""}).append, "");
  EXPECT_EQ(run_of({"--append="}).append, "");
  EXPECT_EQ(run_of({"--append", "--help"}).append, "--help");
  EXPECT_EQ(run_of({"--append", "[a,b] \"c\""}).append, "[a,b] \"c\"");
  EXPECT_EQ(run_of({"-m2G"}).memory_bytes, u64{2} << 30);
}

TEST(Options, WhatIsNotThereIsUnknown) {
  for (const char* option : {"--net", "--cdrom", "--firmware", "--vsock", "--display", 
                             "--api-socket", "--bogus", "-x", "--kern"}) {
    EXPECT_NE(error_of({"run", "--kernel", "k", option, "v"}).find(option), std::string::npos) << option;
  }
  EXPECT_NE(error_of({"run", "--kernel", "k", "disk.img"}).find("disk.img"), std::string::npos);
  EXPECT_NE(error_of({"run", "doctor"}).find("doctor"), std::string::npos);
}

TEST(Options, BadInputIsNamed) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{}, "ring3 run"},
      {{""}, "verb"},
      {{"run"}, "--kernel"},
      {{"run", "--kernel"}, "--kernel"},
      {{"run", "--kernel", ""}, "--kernel"},
      {{"run", "--kernel", "k", "-m", "0"}, "--memory"},
      {{"run", "--kernel", "k", "-m", "-1"}, "-1"},
      {{"run", "--kernel", "k", "-m", "99999999T"}, "99999999T"},
      {{"run", "--kernel", "k", "-m", "1000T"}, "1000T"},
      {{"run", "--kernel", "k", "-m", "2000001"}, "2000001"},
      {{"run", "--kernel", "k", "-m", "1G", "-m", "2G"}, "more than once"},
      {{"run", "--kernel", "k", "-c", "0"}, "--cpus"},
      {{"run", "--kernel", "k", "-c", "-1"}, "-1"},
      {{"run", "--kernel", "k", "-c", "1e9"}, "1e9"},
      {{"run", "--kernel", "k", "-c", "100000"}, "100000"},
      {{"run", "--kernel", "k", "-c", ""}, "--cpus"},
      {{"run", "--kernel", "k", "-n", "a/b"}, "--name"},
      {{"run", "--kernel", "k", "-n", ""}, "--name"},
      {{"run", "--kernel", "k", "--engine", "tcg"}, "tcg"},
      {{"run", "--kernel", "k", "--console", "vga"}, "vga"},
      {{"run", "--kernel", "k", "--console", "file:"}, "file:"},
      {{"run", "--kernel", "k", "--log", "loud"}, "loud"},
      {{"run", "--kernel", "k", "--engine-option", "x"}, "KEY=VALUE"},
      {{"run", "--kernel", "k", "--engine-option", "=x"}, "KEY=VALUE"},
      {{"run", "--kernel", "k", "--engine-option", "a=1", "--engine-option", "a=2"}, "twice"},
      {{"run", "--kernel", "k", "--engine-option", "interpreter", "--engine-option", "engine=translator"}, "twice"},
      {{"run", "--kernel", "k", "--engine", "kvm", "--engine-option", "a=1"}, "--engine-option"},
      {{"run", "--kernel", "k", "--no-reboot=1"}, "--no-reboot"},
      {{"run", "--kernel", "k", "--disk", ""}, "path"},
      {{"run", "--kernel", "k", "--disk", "d,format=vmdk"}, "vmdk"},
      {{"run", "--kernel", "k", "--disk", "d,cache=odd"}, "odd"},
      {{"run", "--kernel", "k", "--disk", "d,serial=123456789012345678901"}, "20 characters"},
      {{"run", "--kernel", "k", "--disk", "d,rw"}, "'rw'"},
      {{"run", "--kernel", "k", "--net", "bridge"}, "bridge"},
      {{"run", "--kernel", "k", "--net", "user,hostfwd=tcp:22"}, "hostfwd"},
      {{"run", "--kernel", "k", "--net", ""}, "--net"},
      {{"run", "--kernel", "k", "--vsock", "cid=2,socket=s"}, "cid"},
      {{"run", "--kernel", "k", "--vsock", "cid=3"}, "socket=PATH"},
      {{"doctor", "x"}, "x"},
  };
  for (const auto& [arguments, part] : cases) {
    const std::string message = error_of(arguments);
    EXPECT_NE(message.find(part), std::string::npos) << "got: " << message << ", wanted: " << part;
  }
}

TEST(Options, Disks) {
  auto command = parse_command_line({"run", "--kernel", "k", "--disk", "a,,b.raw", "--disk", "c,ro,format=qcow2,serial=S1,cache=none", "--disk", "d.raw,readonly,discard,id=D2"});
  ASSERT_TRUE(command.ok()) << command.error().message;
  const auto& disks = std::get<RunOptions>(command.value()).disks;
  ASSERT_EQ(disks.size(), 3u);
  EXPECT_TRUE(disks[2].read_only);
  EXPECT_EQ(disks[2].serial, "D2");
  EXPECT_EQ(disks[0].path, "a,b.raw");
  EXPECT_FALSE(disks[0].read_only || disks[0].direct);
  EXPECT_EQ(disks[1].path, "c");
  EXPECT_EQ(disks[1].format, "qcow2");
  EXPECT_EQ(disks[1].serial, "S1");
  EXPECT_TRUE(disks[1].read_only && disks[1].direct);
}

TEST(Options, Shares) {
  const RunOptions run = run_of({"--share", "src", "--share", "/a:b/c:work,ro,owner=7,cache=60"});
  ASSERT_EQ(run.shares.size(), 2u);
  EXPECT_EQ(run.shares[0].directory, "src");
  EXPECT_EQ(run.shares[0].cache_ms, 1000u);
  EXPECT_FALSE(run.shares[0].read_only);
  EXPECT_EQ(run.shares[1].directory, "/a:b/c");
  EXPECT_EQ(run.shares[1].tag, "work");
  EXPECT_EQ(run.shares[1].own_id, 7u);
  EXPECT_EQ(run.shares[1].cache_ms, 60'000u);
  EXPECT_TRUE(run.shares[1].read_only);
  for (const char* bad : {"d,cache=", "d,cache=-1", "d,cache=1.5", "d,cache=86401", "d,cache"}) {
    EXPECT_NE(error_of({"run", "--kernel", "k", "--share", bad}).find("cache"), std::string::npos) << bad;
  }
}

TEST(Options, Networks) {
  auto command = parse_command_line({"run", "--kernel", "k", "--net", "user,hostfwd=tcp::2222-:22", "--net", "tap,ifname=t0",
                                     "--vsock", "socket=a.sock,cid=7"});
  ASSERT_TRUE(command.ok()) << command.error().message;
  const auto& run = std::get<RunOptions>(command.value());
  ASSERT_EQ(run.nets.size(), 2u);
  EXPECT_EQ(run.nets[0].forwards.size(), 1u);
  EXPECT_EQ(run.nets[1].interface, "t0");
  EXPECT_EQ(run.vsock->cid, 7u);
  EXPECT_EQ(run.vsock->socket, "a.sock");
}

TEST(Options, Help) {
  for (const char* verb : {"run", "doctor", "version"}) {
    auto command = parse_command_line({verb, "--help"});
    ASSERT_TRUE(command.ok());
    const std::string text = std::get<HelpText>(command.value()).text;
    EXPECT_NE(text.find(std::string("Usage: ring3 ") + verb + " [OPTIONS]"), std::string::npos) << text;
    EXPECT_NE(text.find("Examples:"), std::string::npos);
  }
  EXPECT_TRUE(std::holds_alternative<HelpText>(parse_command_line({"--help"}).value()));
  EXPECT_TRUE(std::holds_alternative<VersionOptions>(parse_command_line({"--version"}).value()));
  EXPECT_TRUE(std::get<DoctorOptions>(parse_command_line({"doctor", "--json"}).value()).json);
  EXPECT_TRUE(std::get<VersionOptions>(parse_command_line({"version", "--json"}).value()).json);
}

}  // namespace
}  // namespace ring3::control
