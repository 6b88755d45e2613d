#include "control/cli/seed.hpp"
#include "base/temporary_directory.hpp"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

namespace ring3::control {
namespace {

class Seed : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_FALSE(root.empty()); }
  std::string put(const std::string& name, const std::string& text) {
    std::ofstream(root + "/" + name) << text;
    return root + "/" + name;
  }
  static bool holds(const std::vector<u8>& image, const std::string& text) {
    return std::string(image.begin(), image.end()).find(text) != std::string::npos;
  }
  const TemporaryDirectory place;
  const std::string root = place.path();
};

TEST_F(Seed, UserDataAndKeys) {
  SeedOptions options;
  options.user_data = put("user", "#cloud-config\nhostname: x\n");
  options.ssh_keys = {put("key.pub", "ssh-ed25519 AAAA me@here\n# a comment\n\necdsa-sha2-nistp256 BBBB\n")};
  auto image = make_seed(options, "web");
  ASSERT_TRUE(image) << image.error().message;
  EXPECT_TRUE(holds(*image, "cidata"));
  EXPECT_TRUE(holds(*image, "hostname: x"));
  EXPECT_TRUE(holds(*image, "local-hostname: web\npublic-keys:\n  - \"ssh-ed25519 AAAA me@here\"\n  - \"ecdsa-sha2-nistp256 BBBB\"\n"));
}

TEST_F(Seed, AnotherContentIsAnotherInstance) {
  const auto id_of = [&](const std::string& text) {
    SeedOptions options;
    options.user_data = put("user", text);
    auto image = make_seed(options, "web");
    const std::string all(image->begin(), image->end());
    return all.substr(all.find("instance-id: "), 60);
  };
  EXPECT_EQ(id_of("#cloud-config\na: 1\n"), id_of("#cloud-config\na: 1\n"));
  EXPECT_NE(id_of("#cloud-config\na: 1\n"), id_of("#cloud-config\na: 2\n"));
}

TEST_F(Seed, GivenMetaDataIsTakenAsItIs) {
  SeedOptions options;
  ASSERT_TRUE(parse_cloud_init(put("a,b", "#!/bin/sh\n").substr(0, root.size() + 1) + "a,,b," + put("meta", "instance-id: mine") + "," +
                                   put("net", "version: 2\n"), options));
  auto image = make_seed(options, "web");
  ASSERT_TRUE(image) << image.error().message;
  EXPECT_TRUE(holds(*image, "instance-id: mine\n"));
  EXPECT_TRUE(holds(*image, "version: 2"));
  EXPECT_FALSE(holds(*image, "local-hostname"));
}

TEST_F(Seed, MistakesAreNamed) {
  const auto error_of = [&](SeedOptions options) {
    auto image = make_seed(options, "web");
    return image ? std::string() : image.error().message;
  };
  SeedOptions none, ignored, directory, secret, noise;
  none.user_data = root + "/none";
  EXPECT_NE(error_of(none).find("No such file"), std::string::npos);
  ignored.user_data = put("user", "hostname: x\n");
  EXPECT_NE(error_of(ignored).find("#cloud-config"), std::string::npos);
  directory.user_data = root;
  EXPECT_NE(error_of(directory), "");
  secret.ssh_keys = {put("key", "-----BEGIN OPENSSH PRIVATE KEY-----\n")};
  EXPECT_NE(error_of(secret).find("private key"), std::string::npos);
  noise.ssh_keys = {put("noise", "hello\n")};
  EXPECT_NE(error_of(noise).find("no public key"), std::string::npos);
  SeedOptions parsed;
  EXPECT_FALSE(parse_cloud_init("", parsed));
  EXPECT_FALSE(parse_cloud_init("a,b,c,d", parsed));
}

}  // namespace
}  // namespace ring3::control
