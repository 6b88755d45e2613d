#include "devices/legacy/test_device.hpp"

#include <algorithm>

namespace ring3::devices {

struct TestDevice::Shared {
  Config config;
  std::mutex mutex;
  State s;
};

namespace {

// A window whose accesses go to two functions.
class Window final : public Device {
 public:
  using Read = std::function<void(u64, std::span<u8>)>;
  using Write = std::function<void(u64, std::span<const u8>)>;
  Window(Read read, Write write) : read_(std::move(read)), write_(std::move(write)) {}
  void read(u64 offset, std::span<u8> data) override {
    if (read_) read_(offset, data);
  }
  void write(u64 offset, std::span<const u8> data) override {
    if (write_) write_(offset, data);
  }

 private:
  Read read_;
  Write write_;
};

void copy_out(std::span<const u8> store, u64 offset, std::span<u8> data) {
  for (std::size_t i = 0; i < data.size() && offset + i < store.size(); i++) data[i] = store[offset + i];
}
void copy_in(std::span<u8> store, u64 offset, std::span<const u8> data) {
  for (std::size_t i = 0; i < data.size() && offset + i < store.size(); i++) store[offset + i] = data[i];
}

}  // namespace

TestDevice::TestDevice(Config config) : shared_(std::make_shared<Shared>()) {
  shared_->config = std::move(config);
  shared_->s.memory.resize(kMemorySize);
}
TestDevice::~TestDevice() = default;

Status TestDevice::attach(Bus& ports, Bus& memory) const {
  auto s = shared_;
  const auto window = [](Window::Read r, Window::Write w) {
    return std::make_shared<Window>(std::move(r), std::move(w));
  };
  auto echo = window(
      [s](u64 o, std::span<u8> d) {
        std::lock_guard lock(s->mutex);
        copy_out(s->s.echo, o, d);
      },
      [s](u64 o, std::span<const u8> d) {
        std::lock_guard lock(s->mutex);
        copy_in(s->s.echo, o, d);
      });
  auto flush = window([](u64, std::span<u8> d) { std::fill(d.begin(), d.end(), u8{0}); }, nullptr);
  auto byte_echo = window(
      [s](u64, std::span<u8> d) {
        std::lock_guard lock(s->mutex);
        if (!d.empty()) d[0] = s->s.byte_echo;
      },
      [s](u64, std::span<const u8> d) {
        std::lock_guard lock(s->mutex);
        if (!d.empty()) s->s.byte_echo = d[0];
      });
  auto irq = window(nullptr, [s](u64 o, std::span<const u8> d) {
    if (s->config.irq) s->config.irq(static_cast<u32>(o), load_le(d) != 0);
  });
  auto leave = window(nullptr, [s](u64, std::span<const u8> d) {
    if (s->config.exit) s->config.exit(static_cast<u8>(load_le(d) * 2 + 1));
  });
  auto storage = window(
      [s](u64 o, std::span<u8> d) {
        std::lock_guard lock(s->mutex);
        copy_out(s->s.memory, o, d);
      },
      [s](u64 o, std::span<const u8> d) {
        std::lock_guard lock(s->mutex);
        copy_in(s->s.memory, o, d);
      });
  struct Place {
    Bus& bus;
    u64 start, size;
    std::shared_ptr<Window> device;
  };
  const Place places[] = {{ports, kEchoPort, 4, echo},       {ports, kFlushPort, 1, flush},
                          {ports, kByteEchoPort, 1, byte_echo}, {ports, kExitPort, 1, leave},
                          {ports, kIrqPort, kIrqLines, irq}, {memory, kMemory, kMemorySize, storage}};
  for (const Place& p : places) {
    if (auto r = p.bus.add(p.start, p.size, p.device, "test device"); !r) return r;
  }
  return Ok{};
}

TestDevice::State TestDevice::state() const {
  std::lock_guard lock(shared_->mutex);
  return shared_->s;
}

void TestDevice::restore(const State& state) {
  std::lock_guard lock(shared_->mutex);
  shared_->s = state;
  shared_->s.memory.resize(kMemorySize);
}

}  // namespace ring3::devices
