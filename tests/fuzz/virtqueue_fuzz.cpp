/// libFuzzer target of virtqueues and of the virtio-pci registers: the input is what a hostile driver puts into its rings,
/// tables and registers, and in which order the device looks at them.
#include <spdlog/spdlog.h>

#include <algorithm>
#include <memory>

#include "devices/virtio/pci/test_bus.hpp"

using namespace ring3;
using namespace ring3::virtio;

namespace {

/// Serves its queues when it is told to, on the fuzzer's only thread.
class Device final : public virtio::Device {
 public:
  DeviceType type() const override { return DeviceType::kEntropy; }
  u64 features() const override { return 3; }
  std::vector<u16> queue_sizes() const override { return {64, 8}; }
  void read_config(u64 offset, std::span<u8> data) override { read_config_struct(config_, offset, data); }
  void write_config(u64 offset, std::span<const u8> data) override {
    if (offset < sizeof config_ && data.size() <= sizeof config_ - offset) std::memcpy(reinterpret_cast<u8*>(&config_) + offset, data.data(), data.size());
  }
  void start(u64, std::span<Queue* const> queues) override { queues_.assign(queues.begin(), queues.end()); }
  void stop() override { queues_.clear(); }
  bool can_reset_queues() const override { return true; }
  void stop_queue(u16 index) override { queues_[index] = nullptr; }
  void start_queue(u16 index, Queue& queue) override { queues_[index] = &queue; }
  void serve() {
    for (Queue* q : queues_) {
      if (q == nullptr) continue;
      q->clear_kick();
      for (int i = 0; i < 100 && q->pop(chain_) == Queue::Pop::kChain; i++) {
        u8 bytes[64];
        (void)chain_.write(0, bytes, chain_.read(0, bytes, sizeof bytes));
        q->complete(chain_, 64);
      }
      q->notify();
      (void)q->enable_kicks();
    }
  }

 private:
  u32 config_[4] = {};
  std::vector<Queue*> queues_;
  Chain chain_;
};

struct Input {
  const u8* data;
  std::size_t size;
  u64 take(std::size_t n) {
    u64 v = 0;
    n = std::min(n, size);
    std::memcpy(&v, data, n);
    data += n, size -= n;
    return v;
  }
};

void queue(Input in) {
  static test::Guest guest;
  const u64 how = in.take(1);
  const bool packed = how & 1;
  const u16 size = packed ? static_cast<u16>(1 + (how >> 3)) : static_cast<u16>(1u << (how >> 3 & 7));
  Queue::Setup s = test::Driver::layout(size, packed, (how & 2) != 0);
  s.indirect = (how & 4) != 0;
  const auto bytes = ring::sizes(size, packed);
  // The areas' bytes, then tables of descriptors, then what is done.
  const auto fill = [&](u64 at, u64 n) {
    std::memset(guest.at(at), 0, n);
    const std::size_t have = std::min<std::size_t>(n, in.size);
    std::memcpy(guest.at(at), in.data, have);
    in.data += have, in.size -= have;
  };
  fill(s.driver.value, bytes.driver);
  fill(s.descriptors.value, std::min<u64>(bytes.descriptors, in.size / 2));
  fill(s.device.value, bytes.device);
  auto made = Queue::create(guest.memory(), s, -1, {});
  if (!made) return;
  Queue& q = **made;
  q.set_state({static_cast<u16>(in.take(2)), static_cast<u16>(in.take(2)), (how & 8) != 0, (how & 16) != 0});
  fill(0x60000, std::min<u64>(in.size / 2, 1024));
  static std::vector<Chain> held(4);
  std::size_t count = 0;
  while (in.size != 0) {
    const u64 op = in.take(1);
    switch (op & 7) {
      case 0: case 1: case 2:
        if (count < held.size() && q.pop(held[count]) == Queue::Pop::kChain) count++;
        break;
      case 3:
        if (count != 0) q.complete(held[--count], static_cast<u32>(op << 4));
        break;
      case 4: q.notify(); break;
      case 5: (op & 8) != 0 ? (void)q.enable_kicks() : q.disable_kicks(); break;
      case 6: {  // the driver goes on writing
        const u64 at = in.take(2);
        *guest.at((op & 8) != 0 ? s.driver.value + at % bytes.driver : s.descriptors.value + at % bytes.descriptors) = static_cast<u8>(in.take(1));
        break;
      }
      default:
        for (std::size_t i = 0; i < count; i++) {
          u8 b[300];
          (void)held[i].write(op, b, held[i].read(op >> 3, b, sizeof b));
        }
    }
  }
}

void registers(Input in) {
  test::TestBus bus;
  auto device = std::make_shared<Device>();
  if (!bus.add(device)) return;
  const u64 features = feature::kVersion1 | (in.take(1) & 3) << 28 | (in.take(1) & 1) << 34 | (in.take(1) & 1) << 40;
  (void)bus.start(1, features, 2, 8);
  // Starting anew is most of the time and says little the third time: few of it, and no more steps than it takes to fill the rings.
  int starts = 2;
  for (int step = 0; step < 96 && in.size != 0; step++) {
    const u64 op = in.take(1);
    switch (op & 7) {
      case 0: device->serve(); break;
      case 1: bus.kick(1, static_cast<u16>(op >> 3)); break;
      case 2: bus.write<u32>(bus.config(1, static_cast<u32>(in.take(1))), static_cast<u32>(in.take(4))); break;
      case 3: bus.write<u8>(bus.bar(1) + 0x14, static_cast<u8>(in.take(1))); break;
      case 4: {
        const u64 at = in.take(2);
        bus.write<u16>(bus.bar(1) + at % VirtioPci::kBarSize, static_cast<u16>(in.take(2)));
        break;
      }
      case 5: {
        const u64 at = in.take(1);
        bus.write<u64>(bus.bar(1) + at % 0x40, in.take(op >> 3 & 8));
        break;
      }
      case 6: {
        const u64 at = in.take(2);
        bus.guest.put<u32>(at & ~u64{3}, static_cast<u32>(in.take(4)));
        break;
      }
      default:
        (void)bus.read<u64>(bus.bar(1) + in.take(2));
        if (starts-- > 0) (void)bus.start(1, features, 2, static_cast<u16>(op));
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t size) {
  spdlog::set_level(spdlog::level::off);
  if (size < 8) return 0;
  const Input rest{data + 1, size - 1};
  if (data[0] % 16 == 0) {
    registers(rest);
  } else {
    queue(rest);
  }
  return 0;
}
